"""Cards as an agent has them: over a simulated wire with a firmware behind it, or over a socket."""

import secrets
import sys
from pathlib import Path

from card_bed import PUBLIC

from virtfabric.adapters.cardlink.doors import SocketDoor
from virtfabric.adapters.cardlink.link import WitnessedCard
from virtfabric.adapters.cardlink.streamwire import StreamWire, Timing
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.cardwire import SimulatedWire
from virtfabric.model.adapter import Adapter, AdapterId
from virtfabric.model.units import GIB, Bytes
from virtfabric.protocol.messages import Hello, Role
from virtfabric.shim.firmware.firmware import Firmware
from virtfabric.shim.firmware.programming import EmulatedPort
from virtfabric.shim.firmware.statelog import StateLog
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity

sys.path.insert(0, str(Path(__file__).parents[1] / "trust"))
from trust_data import credentials

QUICK = Timing(heartbeat_s=0.05, greeting_s=5.0, answer_s=1.0, backoff_s=(0.02, 0.1))


class Brain:
    """A firmware with its flash; what it tells by itself reaches every wire."""

    def __init__(self, place, adapter, clock):
        self._log = StateLog(place / f"{adapter.serial}.flash")
        self.firmware = Firmware(
            adapter,
            self._log,
            clock=clock,
            port=EmulatedPort(),
            signers=[PUBLIC],
            secret=secrets.token_bytes(32),
        )
        self._told = {}

    def join(self, wire):
        self._told[wire] = []
        return _Seat(self, wire)

    def take(self, wire):
        news = self.firmware.tick()
        for told in self._told.values():
            told += news
        found, self._told[wire] = self._told[wire], []
        return found

    def close(self):
        self._log.close()


class _Seat:
    """Implements `cardwire.Brain` for one wire."""

    def __init__(self, brain, wire):
        self._brain, self._wire = brain, wire

    def handle(self, message):
        return self._brain.firmware.handle(message)

    def tick(self):
        return self._brain.take(self._wire)


def card_adapter(serial="C-1", **amounts):
    values = {
        "cores": 8, "memory": Bytes(4 * GIB), "lanes": 16, "keys": 16, "bandwidth": 100_000,
        "accelerators": {"crypto.aes": 4}, "site": "node:0",
    }  # fmt: skip
    return Adapter(AdapterId(serial), **{**values, **amounts})


def start_brain(place, serial="C-1", clock=None, **amounts):
    return Brain(place, card_adapter(serial, **amounts), clock or SystemClock())


def simulated_card(brain):
    serial = brain.firmware.books.adapter.serial
    name = object()
    wire = SimulatedWire(serial, brain.join(name))
    return WitnessedCard(serial, wire), wire


def power_on(wire, brain):
    wire.return_(brain.join(object()))


def link_to(path, host, serial="C-1", timing=QUICK, mine=None):
    identity = Identity.of(Role.HOST, host)
    context = make_context(mine or credentials(identity), server=False)
    hello = Hello(Role.HOST, host, "test 1", "boot", ())
    return WitnessedCard(
        AdapterId(serial), StreamWire(SocketDoor(path), serial, context, hello, timing)
    )
