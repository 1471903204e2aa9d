"""The card's switch: Ethernet frames from one `net.vf` slice to others. Nothing leaves the card."""

from __future__ import annotations

import hashlib
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

CAPABILITY: Final = "net.vf"
MIN_FRAME, MAX_FRAME = 14, 9216
_WAITING: Final = 256
"""Frames that wait in a port."""
_GROUP: Final = 0x01


def derive_mac(serial: str, name: str) -> bytes:
    """A locally administered address, the same after each start."""
    digest = hashlib.sha256(f"{serial}/{name}".encode()).digest()
    return bytes([digest[0] & 0xFC | 0x02, *digest[1:6]])


class Port:
    """One slice's; `dropped` counts frames for which there was no room."""

    def __init__(self, switch: Switch, mac: bytes, arrived: Callable[[], None]) -> None:
        self.mac = mac
        self.dropped = 0
        self._switch = switch
        self._arrived = arrived
        self._waiting: deque[bytes] = deque()

    def send(self, frame: bytes) -> None:
        """To whom it is for: one port, or all others."""
        self._switch._forward(self, frame)  # noqa: SLF001

    def receive(self) -> bytes | None:
        """The oldest frame; None if there is none."""
        return self._waiting.popleft() if self._waiting else None

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def deliver(self, frame: bytes) -> None:
        """A frame came."""
        if len(self._waiting) >= _WAITING:
            self.dropped += 1
            return
        self._waiting.append(frame)
        self._arrived()


class Switch:
    """All ports of a card. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._ports: dict[bytes, Port] = {}

    def join(self, mac: bytes, arrived: Callable[[], None]) -> Port:
        """A port; `arrived` is called, in any thread, when a frame waits in it."""
        port = Port(self, mac, arrived)
        with self._lock:
            self._ports[mac] = port
        return port

    def leave(self, port: Port) -> None:
        """No more frames for it; safe to repeat."""
        with self._lock:
            if self._ports.get(port.mac) is port:
                del self._ports[port.mac]

    def _forward(self, sender: Port, frame: bytes) -> None:
        to = frame[:6]
        with self._lock:
            one = self._ports.get(to)
            ports = [one] if one else [*self._ports.values()] if to[0] & _GROUP else []
        for port in ports:
            if port is not sender:
                port.deliver(frame)
