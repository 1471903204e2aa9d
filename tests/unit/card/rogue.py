"""A card on a socket that does what a test wants: TLS and frames, and any answer at all."""

import contextlib
import socket
import sys
import threading
from pathlib import Path

from virtfabric.protocol.messages import Hello, Role
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "trust"))
from trust_data import credentials


class RogueCard:
    """`answer(link, received)` decides; every host has a thread."""

    def __init__(self, path, answer, serial="C-1", mine=None, greeting=b"", silent=False):
        self.answer, self.serial, self.silent = answer, serial, silent
        self.mine = mine or credentials(Identity.of(Role.CARD, serial))
        self.greeting = greeting
        self.met = 0
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.met += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        if self.silent:
            return
        session = Session(make_context(self.mine, server=True), server=True, peer_role=Role.HOST)
        if self.greeting:
            self._greet(connection, session)
            return
        link = Link(session, Hello(Role.CARD, self.serial, "rogue 1", f"boot-{self.met}", ()))
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                for received in link.receive(data):
                    self.answer(link, received)
                connection.sendall(link.outgoing())
                if link.ended_by:
                    return

    def _greet(self, connection, session):
        """Nothing but a greeting, whatever it says."""
        said = False
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                session.receive(data)
                if session.is_open and not said:
                    said = True
                    session.send(self.greeting)
                connection.sendall(session.outgoing())

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            connection.close()


def smuggle(link, *frames):
    """Bytes that the conversation would not have said; it counts them as its own."""
    for frame in frames:
        link._talk._sent += 1
        link._session.send(frame)
