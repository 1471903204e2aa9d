"""An ivshmem server: hands out memory and bells, and hears who comes, rings and goes.

Each client sees the card, which has id 0, and itself. It gets shared memory and eventfds of its
own: hosts of one card neither read nor interrupt each other. A client that breaks harms nobody but
itself.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.shim.ivshmem import wire
from virtfabric.shim.vfiouser.interrupts import Vectors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CARD: Final = 0
MAX_CLIENTS: Final = 16
"""More are turned away."""
_EVENTFD: Final = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Resident(Protocol):
    """What the card keeps for one client. Called on the server's thread: it answers at once."""

    @property
    def memory(self) -> int:
        """File of the memory that is shared with the client."""

    def rung(self) -> None:
        """The client rang."""

    def gone(self) -> None:
        """The client went; it is not rung any more."""


@dataclass(slots=True, eq=False)
class _Client:
    """One that is there; `bell` is what it rings, `vectors` by what it is rung."""

    id: int
    sock: socket.socket
    bell: int
    vectors: Vectors
    resident: Resident


class IvshmemServer:
    """Serves one card, from its start until `close`."""

    def __init__(
        self, path: Path, admit: Callable[[Callable[[], None]], Resident], *,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Listen.

        Args:
            path: of the socket, for this user only; one that is there is replaced.
            admit: takes a client in; gets what rings it, from any thread, also when it went. On
                the server's thread; may raise OSError.
            report: hears of clients that broke off or were turned away.

        Raises:
            OSError: it cannot listen there.
        """
        self.path = path
        self._admit = admit
        self._report = report
        self._closed = False
        self._clients: dict[int, _Client] = {}
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)  # nobody connects before listen
        self._listener.listen(4)
        self._listener.settimeout(0)
        self._epoll = select.epoll()
        self._actions: dict[int, Callable[[], None]] = {}
        self._watch(self._listener.fileno(), self._accept)
        self._thread = Thread(target=self._run, name=f"serve {path.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell all clients that the card goes, end them, and stop; safe to repeat."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for client in list(self._clients.values()):
            with suppress(OSError):
                wire.send_gone(client.sock, CARD)
            self._end(client)
        self._epoll.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._closed:
            for fd, _ in self._epoll.poll():
                action = self._actions.get(fd)
                if action is not None:
                    action()

    def _watch(self, fd: int, action: Callable[[], None]) -> None:
        # Edges only. A bell is never read, which could block: its client has the same file and may
        # read it first. Each write is an edge. And a listener that lacks descriptors does not spin.
        self._actions[fd] = action
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._closed:
                    self._report(f"{self.path.name}: {error}")
                return
            try:
                self._take_in(sock)
            except OSError as error:
                self._report(f"{self.path.name}: a client was not taken in: {error}")

    def _take_in(self, sock: socket.socket) -> None:
        with ExitStack() as undo:
            undo.callback(sock.close)
            if len(self._clients) == MAX_CLIENTS:
                raise wire.BrokenClientError(f"there are {MAX_CLIENTS}")
            sock.settimeout(0)
            bell = os.eventfd(0, _EVENTFD)
            undo.callback(os.close, bell)
            vectors, by = Vectors(1), os.eventfd(0, _EVENTFD)
            vectors.attach(0, [by])
            undo.callback(vectors.detach, 0, vectors.count)

            def ring() -> None:
                vectors.trigger(0)

            resident = self._admit(ring)
            own = next(n for n in range(CARD + 1, MAX_CLIENTS + 1) if n not in self._clients)
            client = self._clients[own] = _Client(own, sock, bell, vectors, resident)
            undo.pop_all()
        self._watch(bell, resident.rung)
        self._watch(sock.fileno(), partial(self._hear, client))
        try:
            wire.send_welcome(
                sock, own=own, memory=resident.memory, peers={CARD: [bell]}, bells=[by]
            )
        except OSError:
            self._end(client)
            raise

    def _hear(self, client: _Client) -> None:
        """It went, or speaks, which no client of this protocol does."""
        try:
            said = client.sock.recv(1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said:
            self._report(f"{self.path.name}: client {client.id} speaks")
        self._end(client)

    def _end(self, client: _Client) -> None:
        # closing them is not enough: the client has the same eventfd
        for fd in (client.sock.fileno(), client.bell):
            self._epoll.unregister(fd)
            del self._actions[fd]
        client.vectors.detach(0, client.vectors.count)
        client.sock.close()
        os.close(client.bell)
        del self._clients[client.id]
        client.resident.gone()
