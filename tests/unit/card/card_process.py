"""A card that serves, in a thread of this process, and hosts that talk to it over its socket."""

import asyncio
import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

from card_bed import PUBLIC

from virtfabric.adapters.clock import SystemClock
from virtfabric.protocol.messages import Hello, Role
from virtfabric.shim.card.description import read_description
from virtfabric.shim.card.server import Card, CardServer
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session
from virtfabric.trust.store import write_credentials

sys.path.insert(0, str(Path(__file__).parents[1] / "trust"))
from trust_data import credentials

WAIT_S = 10
TEXT = """version = 1

[adapter]
serial = "{serial}"
cores = {cores}
memory = "{memory}"
lanes = 16
keys = 16
bandwidth = 100000
site = "{site}"

[adapter.accelerators]
"crypto.aes" = {units}

[card]
socket = "{serial}.sock"
state = "{serial}.flash"
credentials = "{serial}"
signers = ["signer.pub"]
"""


def write_card(place, serial="C-1", cores=8, memory="4GiB", units=4, site="node:0", text=TEXT):
    """Description, certificate and signer of a card; the description's path."""
    if not (place / serial).exists():
        write_credentials(place / serial, credentials(Identity.of(Role.CARD, serial)))
    (place / "signer.pub").write_bytes(PUBLIC)
    path = place / f"{serial}.toml"
    path.write_text(text.format(serial=serial, cores=cores, memory=memory, units=units, site=site))
    return path


class Served:
    """A card; `stop` as SIGTERM does."""

    def __init__(self, path, port=None):
        self.description = read_description(path)
        self.card = Card(self.description, SystemClock(), port=port)
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(WAIT_S)

    def _run(self, started):
        async def serve():
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready = asyncio.Event()
            task = asyncio.create_task(CardServer(self.card.desk, self.socket).run(
                self._stop, ready))  # fmt: skip
            await ready.wait()
            started.set()
            await task

        asyncio.run(serve())

    @property
    def socket(self):
        return self.description.socket

    def stop(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()
            self.card.close()


class SocketHost:
    """A host on a blocking socket."""

    def __init__(self, path, name="host-a", mine=None, serial="C-1", software="test 1"):
        identity = Identity.of(Role.HOST, name)
        context = make_context(mine or credentials(identity), server=False)
        session = Session(context, server=False, peer_role=Role.CARD, serial=serial)
        self.link = Link(session, Hello(Role.HOST, name, software, "boot", ()))
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(path))
        self.got = []

    def greet(self):
        self.until(lambda: self.link.is_open)
        return self

    def until(self, condition):
        until = time.monotonic() + WAIT_S
        self.flush()
        while not condition():
            assert time.monotonic() < until
            data = self.socket.recv(1 << 16)
            if not data:
                self.link.receive_end()
                return
            self.got += self.link.receive(data)
            self.flush()

    def flush(self):
        with contextlib.suppress(OSError):
            self.socket.sendall(self.link.outgoing())

    def ask(self, message):
        number = self.link.send(message)
        answers = lambda: [r.message for r in self.got if r.about == number]  # noqa: E731
        self.until(answers)
        (answer,) = answers()
        return answer

    def hear(self, kind):
        found = lambda: [r.message for r in self.got if isinstance(r.message, kind)]  # noqa: E731
        self.until(found)
        return found()

    def close(self):
        self.socket.close()
