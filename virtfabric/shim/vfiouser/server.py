"""The socket of a function. One client at a time; a client that breaks harms nobody but itself."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Final

from virtfabric.shim.vfiouser.session import Session
from virtfabric.shim.vfiouser.wire import BrokenWireError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.shim.vfiouser.function import PciFunction

_AGAIN_S: Final = 1.0
_ENDING_S: Final = 2.0
"""How long a client's going may take before the next is turned away."""


class FunctionServer:
    """Serves one function, from its start until `close`."""

    def __init__(
        self, path: Path, function: PciFunction, *, report: Callable[[str], None] = lambda _: None
    ) -> None:
        """Listen.

        Args:
            path: of the socket, for this user only; one that is there is replaced.
            function: answers, in this server's threads.
            report: hears of clients that broke off.

        Raises:
            OSError: it cannot listen there.
        """
        self.path = path
        self._function = function
        self._report = report
        self._lock = Lock()
        self._client: socket.socket | None = None
        self._serving: Thread | None = None
        self._closed = Event()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)  # nobody connects before listen
        self._listener.listen(4)
        self._accepting = Thread(target=self._accept, name=f"accept {path.name}", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """End the client's connection, wait until it is over, stop; safe to repeat."""
        with self._lock:
            self._closed.set()
            for sock in (self._listener, self._client):
                if sock is not None:
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        if self._serving is not None:
            self._serving.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError as error:  # of a process without descriptors left, for one
                if self._closed.is_set():
                    return
                self._report(f"{self.path.name}: {error}")
                self._closed.wait(_AGAIN_S)
                continue
            if self._serving is not None:
                self._serving.join(_ENDING_S)
            with self._lock:
                if self._closed.is_set() or self._client is not None:
                    client.close()  # else it would wait for its answer as long as the other stays
                    continue
                self._client = client
            self._serving = Thread(
                target=self._serve, args=(client,), name=f"serve {self.path.name}", daemon=True
            )
            self._serving.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            Session(client, self._function).serve()
        except (BrokenWireError, OSError) as error:
            if not self._closed.is_set():
                self._report(f"{self.path.name}: {error}")
        finally:
            with self._lock:
                self._client = None
            client.close()
