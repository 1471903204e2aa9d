"""Ways to a card: each opens a stream of bytes. What is said over it is none of their business.

A socket where the card serves one, else the mailbox of its management function. The latter is
served by a process of its own (`mailboxbridge`): a function that is pulled out while its registers
are mapped kills who touches them (SIGBUS), and one that hangs holds up who reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.adapters.cardlink import mailboxbridge

if TYPE_CHECKING:
    from virtfabric.model.device import PciAddress

PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
_END_S: Final = 2.0
"""In which the process that serves a mailbox ends by itself, when its stream is closed."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Door(Protocol):
    """One way to one card. Opened again after each `close`, never twice at once."""

    async def open(self) -> Stream:
        """A stream to the card.

        Raises:
            OSError: there is none; `strerror` says why, for people.
        """

    def close(self) -> str:
        """What the stream needed is gone when this returns; safe to repeat.

        Returns:
            Why it ended, if that is known here; else empty.
        """

    def __str__(self) -> str:
        """For people."""


class SocketDoor:
    """Implements `Door`: a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def open(self) -> Stream:
        """Connect."""
        return await asyncio.open_unix_connection(self._path)

    def close(self) -> str:
        """Nothing stays."""
        return ""

    def __str__(self) -> str:
        return f"socket {self._path}"


class MailboxDoor:
    """Implements `Door`: the mailbox of a PCI function."""

    def __init__(self, address: PciAddress, serial: str, devices: Path = PCI_DEVICES) -> None:
        """Nothing is touched before `open`.

        Args:
            address: of the card's management function.
            serial: that it has to show.
            devices: sysfs's directory of PCI functions.
        """
        self._address = address
        self._serial = serial
        self._directory = devices / str(address)
        self._process: subprocess.Popen[bytes] | None = None

    async def open(self) -> Stream:
        """Begin to serve the mailbox."""
        self.close()
        if not (self._directory / "resource0").exists():
            raise OSError(None, "no such function")
        return await asyncio.open_connection(sock=self._serve())

    def _serve(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-I", "-S", mailboxbridge.__file__]
            self._process = subprocess.Popen(
                [*argv, str(self._directory), self._serial],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        ours.settimeout(0)
        return ours

    def close(self) -> str:
        """End the process; why it did, if it did so by itself."""
        process, self._process = self._process, None
        if process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        process.kill()
        _, words = process.communicate()
        if process.returncode == -mailboxbridge.PULLED_OUT:
            return "its function was pulled out"
        return words.decode(errors="replace").strip().splitlines()[-1] if words else ""

    def __str__(self) -> str:
        return f"mailbox {self._address}"
