"""A card that runs in this process: bench, desk, functions on their sockets."""

import queue
import threading

from card_bed import BITS, Bench, signed
from slice_world import AES, spec
from trust_data import CARD, context_of, credentials
from vfio_client import Client

from virtfabric.model.errors import VirtfabricError
from virtfabric.protocol import messages as m
from virtfabric.shim.cardpci.runner import CardRunner
from virtfabric.shim.firmware.desk import Desk


class RecordingSlots:
    """Keeps what it is told, in order."""

    def __init__(self):
        self.calls = queue.Queue()
        self.fails = False
        self.free = threading.Event()
        self.free.set()

    def plug(self, name, socket):
        self.calls.put(("plug", name, socket))
        if self.fails:
            raise VirtfabricError("no free port")

    def unplug(self, name):
        self.calls.put(("unplug", name))
        assert self.free.wait(20)

    def next(self):
        return self.calls.get(timeout=10)


class Rig:
    def __init__(self, path, **amounts):
        amounts = {"serial": "C-1", "cores": 8, "memory": 16, "lanes": 16, "keys": 8} | amounts
        self.bench = Bench(path, **amounts)
        self.path = path / "sockets"
        self.path.mkdir()
        self.slots, self.told = RecordingSlots(), []
        self.clients = []
        self.run()

    def run(self, boot="boot-1"):
        self.events = []
        card = self.bench.card

        def tick_and_note():
            told = type(card).tick(card)
            self.events += [t for t in told if isinstance(t, m.Event)]
            return told

        card.tick = tick_and_note
        self.desk = Desk(self.bench.card, context_of(credentials(CARD), True), boot=boot)
        self.runner = CardRunner(
            self.bench.card, self.desk, self.path, boot=boot, slots=self.slots,
            report=self.told.append,
        )  # fmt: skip

    def close(self):
        for client in self.clients:
            client.close()
        self.runner.close()
        self.bench.log.close()

    def make(self, request, wanted, **more):
        """A slice that is granted; its id."""
        return self.runner.ask(lambda: self.bench.make(request, wanted, **more)).id

    def aes(self, request="r-aes", **more):
        """One that is programmed, too."""
        amounts = {"cores": 1, "memory": 1, "lanes": 4, "capability": AES, "units": 1} | more
        name = self.make(request, spec(**amounts), holder="guest")
        self.program(name)
        return name

    def program(self, name, capability=AES):
        image = signed(f"{capability}-1", capability)
        self.runner.ask(lambda: self.bench.program(name, image, BITS))

    def ask(self, message):
        return self.runner.ask(lambda: self.bench.ask(message))

    def release(self, name):
        assert isinstance(self.ask(m.Release(name)), m.Done)

    def connect(self, name):
        client = Client(self.runner.device.sockets[name])
        self.clients.append(client)
        return client
