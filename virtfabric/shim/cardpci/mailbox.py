"""The mailbox: two rings of bytes in a window that host and card share, and the desk behind them.

The host's side (`open`, `close`, `host_put`, `host_took`) is called by whoever serves the bus and
only notes; `pump` moves bytes, on the firmware's thread. The host may change the window at any
time: bytes are copied out once, and indices are checked.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cardpci.maps import WINDOW_RING, MailboxStatus

if TYPE_CHECKING:
    from virtfabric.shim.firmware.desk import Desk
    from virtfabric.trust.link import Link

WINDOW: Final = 2 * WINDOW_RING
_MODULO: Final = 1 << 32
_PASS: Final = 16 << 10
"""Bytes of a host that are taken in one pass: it does not get the firmware for itself."""


class Window:
    """The shared memory: the rings, and from `WINDOW` on what a transport has there beside them.

    Nobody can make it shorter, which would kill this process by SIGBUS.
    """

    def __init__(self, size: int = WINDOW) -> None:
        self.fd = os.memfd_create("card-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(
            self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        self.memory = mmap.mmap(self.fd, size)

    def close(self) -> None:
        """Give it back; safe to repeat."""
        if self.fd >= 0:
            self.memory.close()
            os.close(self.fd)
            self.fd = -1

    def clear(self) -> None:
        """All zeros in the rings."""
        self.memory[:WINDOW] = bytes(WINDOW)

    def take(self, ring: int, tail: int, count: int) -> bytes:
        """Bytes of a ring (0 or 1) from a count on."""
        at, base = tail % WINDOW_RING, ring * WINDOW_RING
        first = min(count, WINDOW_RING - at)
        return (
            self.memory[base + at : base + at + first] + self.memory[base : base + count - first]
        )  # fmt: skip

    def put(self, ring: int, head: int, data: bytes) -> None:
        """Bytes into a ring from a count on; the caller knows that there is room."""
        at, base = head % WINDOW_RING, ring * WINDOW_RING
        first = min(len(data), WINDOW_RING - at)
        self.memory[base + at : base + at + first] = data[:first]
        self.memory[base : base + len(data) - first] = data[first:]


@dataclass(slots=True)
class Indices:
    """Bytes put in and taken out so far, modulo 2^32."""

    tx_head: int = 0
    tx_tail: int = 0
    rx_head: int = 0
    rx_tail: int = 0


class Mailbox:
    """One, with one session at most."""

    def __init__(self, desk: Desk, window: Window) -> None:
        self._desk = desk
        self._window = window
        self._lock = Lock()
        self.indices = Indices()
        self.status = MailboxStatus.READY
        self.sessions = 0
        self._link: Link | None = None
        self._fresh: bool = False
        self._ended: list[Link] = []
        self._pending = b""

    # -- the host's side; never slow --------------------------------------------------------

    def open(self) -> None:
        """A session of before ends; the next begins with empty rings."""
        with self._lock:
            self._drop()
            self._fresh = True
            self.sessions = (self.sessions + 1) % _MODULO

    def close(self) -> None:
        """No session; safe to repeat."""
        with self._lock:
            self._drop()

    def host_put(self, head: int) -> None:
        """So many bytes are in the ring to the card."""
        with self._lock:
            if self._check(head, self.indices.tx_tail):
                self.indices.tx_head = head

    def host_took(self, tail: int) -> None:
        """So many bytes are out of the ring from the card."""
        with self._lock:
            if self._check(self.indices.rx_head, tail):
                self.indices.rx_tail = tail

    # -- the firmware's side ----------------------------------------------------------------

    def pump(self) -> bool:
        """Move what can be moved; True if there may be more at once."""
        self._settle()
        link, data = self._take()
        if link is None:
            return False
        if data and not link.ended_by:
            self._desk.receive(link, data)
        # the link's own limit ends a host that does not read; so nothing is taken out of it early
        if not self._pending:
            self._pending = link.outgoing()
        moved = self._give(link)
        return bool(data) or bool(moved and self._pending)

    def _settle(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
            fresh, self._fresh = self._fresh, False
        for link in ended:
            link.receive_end()
        if not fresh:
            return
        link = self._desk.open()
        with self._lock:
            if self._fresh:  # and the host has begun yet another one
                self._ended.append(link)
                return
            self._link, self._pending = link, b""
            self.status = MailboxStatus.READY | MailboxStatus.OPEN

    def _take(self) -> tuple[Link | None, bytes]:
        with self._lock:
            if self._link is None:
                return None, b""
            at = self.indices
            count = min((at.tx_head - at.tx_tail) % _MODULO, _PASS)
            data = self._window.take(0, at.tx_tail, count)
            at.tx_tail = (at.tx_tail + count) % _MODULO
            return self._link, data

    def _give(self, link: Link) -> int:
        with self._lock:
            if self._link is not link:
                return 0
            at = self.indices
            room = WINDOW_RING - (at.rx_head - at.rx_tail) % _MODULO
            data, self._pending = self._pending[:room], self._pending[room:]
            self._window.put(1, at.rx_head, data)
            at.rx_head = (at.rx_head + len(data)) % _MODULO
            if link.ended_by and not self._pending:
                self.status = MailboxStatus.READY | MailboxStatus.ENDED
                self._link = None
            return len(data)

    def _check(self, head: int, tail: int) -> bool:
        """Whether indices can be; if not, there is nothing to be understood here any more."""
        if (head - tail) % _MODULO <= WINDOW_RING:
            return True
        self._drop()
        self.status |= MailboxStatus.BROKEN
        return False

    def _drop(self) -> None:
        if self._link is not None:
            self._ended.append(self._link)
        self._link, self._fresh = None, False
        self.indices, self.status = Indices(), MailboxStatus.READY
        self._window.clear()
