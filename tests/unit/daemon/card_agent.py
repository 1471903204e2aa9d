"""An agent with offload cards: firmwares behind simulated wires, whose links can be lost or lie."""

from __future__ import annotations

import sys
from pathlib import Path

import agent_world as aw

sys.path.insert(0, str(Path(__file__).parents[1] / "card"))
from card_wires import Brain, card_adapter

from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.adapters.cardlink.link import WitnessedCard
from virtfabric.adapters.simulated.cardbus import PluggedCard
from virtfabric.adapters.simulated.cardwire import SimulatedWire
from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.policy.slicecheck import find_faults

FILE = """version = 1
[[slice]]
name = "{name}"
cores = {cores}
memory = "{memory}"
capability = "{capability}"
units = {units}
[slice.qos]
priority = {priority}
"""
HOST = "host-a"


def slice_file(name="one", cores=1, memory="0", units=0, priority=50):
    capability = "crypto.aes" if units else ""
    return FILE.format(
        name=name, cores=cores, memory=memory, units=units, priority=priority,
        capability=capability,
    )  # fmt: skip


class Sliced:
    """Implements `cardbus.SlicedCard`."""

    def __init__(self, firmware, seat):
        self.firmware, self.badge = firmware, firmware.badge
        self.handle, self.tick = seat.handle, seat.tick

    @property
    def books(self):
        return self.firmware.books


class CardWorld:
    """Some cards, and an agent on a simulated host; `agent` is an `AgentWorld`."""

    def __init__(self, place, cards=None, *, functions=False, **agent):
        """With `functions`, slices of cards are functions of the simulated host."""
        self.place = place
        self.functions, self.plugged = functions, {}
        self.time = SimulatedClock()
        self.amounts = cards or {"C-1": {}, "C-2": {"site": "node:1"}}
        self.brains = {serial: self._brain(serial) for serial in self.amounts}
        self.wires = {}
        self.agent = aw.AgentWorld(make_cards=self._fleet, **agent).start()
        self.settle()

    def _brain(self, serial):
        return Brain(self.place, card_adapter(serial, **self.amounts[serial]), self.time)

    def _fleet(self, host):
        for wire in self.wires.values():
            wire.close()  # of an agent that is dead
        self.wires = {
            serial: SimulatedWire(serial, self._seat(serial, host))
            for serial in self.brains
        }  # fmt: skip
        fleet = CardFleet(HOST, [WitnessedCard(s, wire) for s, wire in self.wires.items()])
        fleet.start()
        return fleet

    def _seat(self, serial, host):
        """What answers on the card's wire; its functions appear on the host there is by then."""
        seat = self.brains[serial].join(object())
        if not self.functions:
            return seat
        card = Sliced(self.brains[serial].firmware, seat)
        plugged = self.plugged.get(serial)
        if plugged is not None and plugged.card.firmware is card.firmware:
            plugged.card = card  # only the agent is another one
        else:
            domain = 1 + sorted(self.amounts).index(serial)
            self.plugged[serial] = PluggedCard(card, host, domain)
        return self.plugged[serial]

    # -- what people do -----------------------------------------------------------------------

    def create(self, *files, **options):
        text = "version = 1\n" + "".join(f.removeprefix("version = 1\n") for f in files)
        job = self.agent.agent.slices_create(aw.ROOT, text, options)["job"]
        return self.agent.finish(job)

    def destroy(self, name):
        return self.agent.finish(self.agent.agent.slice_destroy(aw.ROOT, name)["job"])

    # -- what happens to cards ----------------------------------------------------------------

    def cut_power(self, serial):
        """The card ends; `power_on` starts it anew with what it kept."""
        self.brains[serial].close()
        if serial in self.plugged:
            self.plugged[serial].unplug_all()
        self.wires[serial].lose("the card is gone")

    def power_on(self, serial):
        self.brains[serial] = self._brain(serial)
        self.wires[serial].return_(self._seat(serial, self.agent.host))

    def pass_time(self, seconds):
        self.time.advance(seconds)
        for wire in self.wires.values():
            wire.tick()

    def settle(self):
        """Until the agent has worked off all that it heard of cards."""
        assert self.agent.agent._cards.watch.drain(aw.DEADLINE_S)

    def restart_agent(self):
        self.agent.kill_agent()
        self.agent.restart_agent()
        self.settle()

    # -- what there is ------------------------------------------------------------------------

    @property
    def books(self):
        return self.agent.agent._ledger.view().books

    def on_cards(self):
        """By card, the request keys of its slices."""
        return {
            serial: sorted(one.request for one in brain.firmware.books.slices.values())
            for serial, brain in self.brains.items()
        }

    def promises(self):
        return sum(len(b.firmware.books.reservations) for b in self.brains.values())

    def check(self):
        """Cards and books agree, and no card has what cannot be."""
        ours = {
            (serial, key) for serial, keys in self.on_cards().items() for key in keys
            if key.startswith(HOST)
        }  # fmt: skip
        held = {(one.card, key) for key, one in self.books.slices.items()}
        assert ours == held
        for brain in self.brains.values():
            assert find_faults(brain.firmware.books) == ()
        for one in self.books.slices.values():
            found = self.brains[one.card].firmware.books.slices[one.slice]
            assert (found.request, found.holder, found.spec) == (one.key, one.holder, one.part)

    def audited(self, kind):
        return [record for record in self.agent.audit.read() if record.kind == kind]

    def alerts(self):
        return self.agent.agent.health(aw.ROOT)["alerts"]

    def close(self):
        self.agent.close()
        for brain in self.brains.values():
            brain.close()
