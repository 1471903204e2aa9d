"""Slices over several cards: whatever fails where, all of a slice is there or nothing of it.

Links that are lost before or after any message, cards that lose power or lie, and an agent that is
killed; afterwards everything heals, and cards and books must say the same.
"""

import tempfile
from pathlib import Path

import agent_world as aw
from card_agent import CardWorld, slice_file
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.adapters.simulated.faults import SimulatedCrash
from virtfabric.model.errors import RefusedError, VirtfabricError
from virtfabric.protocol import messages as m

CARDS = ("C-1", "C-2", "C-3")
FAULTS = ("lose before", "lose after", "crash before", "crash after", "power", "refuse", "lie")
WISHES = st.builds(
    slice_file, st.just("s"), cores=st.integers(1, 22), units=st.integers(0, 6),
    priority=st.sampled_from([10, 50, 90]),
)  # fmt: skip


class Trouble:
    """Strikes one card at its nth message of one kind."""

    def __init__(self, world, what, serial, kind, number):
        self.world, self.what, self.serial = world, what, serial
        self.kind, self.left = kind, number
        self.wire = world.wires[serial]
        setattr(self.wire, "after" if "after" in what else "before", self.strike)
        if what in ("refuse", "lie"):
            self.wire.before = lambda _message: None
            self.wire.mangle = self.mangle

    def is_due(self, message):
        if not isinstance(message, self.kind) or self.left < 0:
            return False
        self.left -= 1
        return self.left < 0

    def strike(self, message):
        if not self.is_due(message):
            return
        if "crash" in self.what:
            raise SimulatedCrash
        if self.what == "power":
            self.world.cut_power(self.serial)
        else:
            self.wire.lose("somebody pulled it")

    def mangle(self, asked, answer):
        if not self.is_due(asked):
            return answer
        if self.what == "refuse":
            return m.Error(m.ErrorCode.INTERNAL, "the flash is full")
        return m.Progress("slice-1", "ready", 0, 0)

    def heal(self):
        wire = self.world.wires[self.serial]
        wire.before = wire.after = lambda _message: None
        wire.mangle = lambda _asked, answer: answer
        if self.world.agent._process._killed:
            if self.what == "power" and self.left < 0:
                self.world.brains[self.serial] = self.world._brain(self.serial)
            self.world.restart_agent()
        elif self.what == "power" and self.left < 0:
            self.world.power_on(self.serial)
        else:
            wire.return_()
            self.world.agent.agent.card_trust(aw.ROOT, self.serial)


@given(
    wishes=st.lists(WISHES, min_size=1, max_size=4),
    what=st.sampled_from(FAULTS),
    serial=st.sampled_from(CARDS),
    kind=st.sampled_from([m.InventoryRequest, m.AllocationRequest, m.Commit, m.Assign, m.Release]),
    number=st.integers(0, 4),
    ending=st.booleans(),
)
@settings(
    max_examples=examples(60), deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_all_or_nothing_whatever_fails_where(wishes, what, serial, kind, number, ending):
    with tempfile.TemporaryDirectory() as place:
        world = CardWorld(Path(place), {s: {"site": f"node:{n}"} for n, s in enumerate(CARDS)})
        try:
            for wish in wishes[:-1]:
                ask(world, wish)
            sizes = parts_of(world)
            trouble = Trouble(world, what, serial, kind, number)
            if ending and world.books.slices:
                name = min(one.wish for one in world.books.slices.values())
                state = ask(world, name, end=True)
            else:
                state = ask(world, wishes[-1])
            trouble.heal()
            world.settle()
            world.pass_time(31)
            world.settle()
            assert world.promises() == 0
            world.check()
            after = parts_of(world)
            for wish, count in after.items():
                halved = count != sizes.get(wish, count)
                assert not halved or lost(world), f"{wish} was cut in half"
            if state in ("refused", "failed", "crashed") and not lost(world):
                assert {w: n for w, n in after.items() if w in sizes} == sizes
        finally:
            world.close()


@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    what=st.sampled_from(FAULTS),
    serial=st.sampled_from(CARDS[:2]),
    kind=st.sampled_from([m.InventoryRequest, m.AllocationRequest, m.Commit, m.Assign, m.Release]),
    number=st.integers(0, 4),
    ending=st.booleans(),
)
@settings(
    max_examples=examples(30), deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_guests_have_functions_of_slices_or_neither(counts, what, serial, kind, number, ending):
    """Whatever fails where while a guest gets or gives back functions that cards make for it."""
    with tempfile.TemporaryDirectory() as place:
        world = CardWorld(
            Path(place), {s: {"site": f"node:{n}"} for n, s in enumerate(CARDS[:2])},
            functions=True,
        )  # fmt: skip
        try:
            grants = [
                world.agent.allocate(guest, **{"device:crypto.aes": str(count)})["result"]["grant"]
                for guest, count in zip(("web", "database"), counts, strict=False)
            ]
            trouble = Trouble(world, what, serial, kind, number)
            agent = world.agent.agent
            conduct(
                world, lambda: agent.release(aw.ROOT, grants[0]) if ending
                else agent.allocate(aw.ROOT, "batch", {"device:crypto.aes": "2"}),
            )  # fmt: skip
            trouble.heal()
            world.settle()
            world.pass_time(31)
            world.agent.settle()
            world.settle()
            world.settle()
            assert world.promises() == 0
            world.check()
            holdings = world.books.holdings.values()
            owners = {f.slice: h.guest for h in holdings for f in h.functions}
            assert owners == {
                key: one.holder for key, one in world.books.slices.items() if one.transient
            }
            for spec in world.agent.specs:
                held = world.books.holdings[spec.uuid].functions
                there = {d.address for d in world.agent.live(spec.name).devices}
                assert there == {f.address for f in held}
        finally:
            world.close()


def conduct(world, start):
    agent = world.agent.agent
    try:
        job = start()["job"]
    except VirtfabricError:
        return
    aw.eventually(
        lambda: agent._jobs.get(job).ended.is_set() or world.agent._process._killed, "never ended"
    )


def ask(world, what, *, end=False):
    """The state of the job; `crashed` where the agent was killed in it."""
    agent = world.agent.agent
    try:
        call = agent.slice_destroy(aw.ROOT, what) if end else agent.slices_create(
            aw.ROOT, what, {}
        )  # fmt: skip
    except (RefusedError, VirtfabricError):
        return "refused"
    job = call["job"]
    aw.eventually(
        lambda: agent._jobs.get(job).ended.is_set() or world.agent._process._killed, "never ended"
    )
    if world.agent._process._killed:
        return "crashed"
    world.settle()
    return agent.job(aw.ROOT, job)["state"]


def parts_of(world):
    """How many parts of each slice there are."""
    counts = {}
    for one in world.books.slices.values():
        counts[one.wish] = counts.get(one.wish, 0) + 1
    return counts


def lost(world):
    """Whether slices were lost for good, and that was told."""
    return bool(world.audited("slice.lost"))
