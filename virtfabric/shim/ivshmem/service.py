"""A card for all hosts that reach it by ivshmem: a mailbox for each, on the firmware's thread."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from virtfabric.shim.cardpci.errand import Errand
from virtfabric.shim.ivshmem.server import IvshmemServer
from virtfabric.shim.ivshmem.sharedmailbox import SharedMailbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.shim.firmware.desk import Desk

    Post = Callable[[Callable[[], None]], None]


class _Host:
    """Implements `server.Resident`: has on the firmware's thread done what there is to do."""

    def __init__(self, mailbox: SharedMailbox, post: Post, leave: Callable[[_Host], None]) -> None:
        self._mailbox = mailbox
        self._post = post
        self._leave = leave
        self._rung = Errand(post, self._take)
        self._more = Errand(post, self.pump)

    @property
    def memory(self) -> int:
        """Implements `Resident`."""
        return self._mailbox.memory

    def rung(self) -> None:
        """Implements `Resident`."""
        self._rung.ask()

    def gone(self) -> None:
        """Implements `Resident`."""
        self._post(lambda: self._leave(self))

    def pump(self) -> None:
        """Move bytes; the firmware does others' work between two goes."""
        if self._mailbox.pump():
            self._more.ask()

    def close(self) -> None:
        """Its session ends; safe to repeat."""
        self._mailbox.close()

    def _take(self) -> None:
        self._mailbox.rung()
        self.pump()


class IvshmemService:
    """The card's mailboxes, from its start until `close`."""

    def __init__(
        self, desk: Desk, path: Path, *, serial: str, boot: int, post: Post,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Listen.

        Args:
            desk: of the firmware.
            path: of the socket, for QEMU's `-chardev socket`.
            serial: of the card.
            boot: see the register.
            post: runs a job on the firmware's thread, soon; from any thread.
            report: hears of clients that broke off.

        Raises:
            OSError: it cannot listen there.
        """
        self._desk = desk
        self._serial = serial
        self._boot = boot
        self._post = post
        self._lock = Lock()
        self._hosts: set[_Host] = set()
        self._closed = False
        self._server = IvshmemServer(path, self._admit, report=report)

    @property
    def path(self) -> Path:
        """Of its socket."""
        return self._server.path

    def pump(self) -> None:
        """Give hosts what the firmware has for them; on its thread."""
        with self._lock:
            hosts = list(self._hosts)
        for host in hosts:
            host.pump()

    def close(self) -> None:
        """End all sessions and stop, when the firmware's thread is over; safe to repeat."""
        with self._lock:
            self._closed = True
            hosts = list(self._hosts)
        for host in hosts:  # they hear of it before the server has gone
            self._leave(host)
        self._server.close()

    def _admit(self, ring: Callable[[], None]) -> _Host:
        with self._lock:
            if self._closed:
                raise ConnectionRefusedError("the card goes")
            mailbox = SharedMailbox(self._desk, serial=self._serial, boot=self._boot, ring=ring)
            host = _Host(mailbox, self._post, self._leave)
            self._hosts.add(host)
        return host

    def _leave(self, host: _Host) -> None:
        with self._lock:
            self._hosts.discard(host)
        host.close()
