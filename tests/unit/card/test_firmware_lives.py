"""Lives of a card: hosts that ask for anything, and power that goes at any time.

`VIRTFABRIC_SLICE_LIVES=2000 VIRTFABRIC_SLICE_STEPS=40` searches for minutes.
"""

import os
import tempfile
from pathlib import Path

import slice_reference as reference
from card_bed import BITS, Bench, signed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from slice_world import specs

from virtfabric.model.errors import Reason
from virtfabric.policy.slicecheck import find_faults
from virtfabric.protocol import messages as m

LIVES = int(os.environ.get("VIRTFABRIC_SLICE_LIVES", "15"))
STEPS = int(os.environ.get("VIRTFABRIC_SLICE_STEPS", "15"))
NAMES = [f"slice-{n}" for n in range(1, 9)]


class Card(RuleBasedStateMachine):
    """A card, and what its flash must hold."""

    def __init__(self):
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.bench = Bench(Path(self.place.name), rotate=20_000)
        self.requests = 0

    def teardown(self):
        self.bench.log.close()
        self.place.cleanup()

    def inventory(self):
        return self.bench.ask(m.InventoryRequest())

    @rule(spec=specs(), holder=st.sampled_from(["", "guest"]), name=st.sampled_from(["", *NAMES]),
          repeat=st.booleans())  # fmt: skip
    def wish(self, spec, holder, name, repeat):
        self.requests += 1
        request = f"r-{self.requests}"
        answer = self.bench.wish(request, spec, holder=holder, slice=name)
        if isinstance(answer, m.Error):
            assert answer.reason in set(Reason)
        elif repeat:
            before = self.inventory()
            again = self.bench.wish(request, spec, holder=holder, slice=name)
            assert again.reservation == answer.reservation
            assert self.inventory() == before

    @rule(data=st.data(), end=st.sampled_from([m.Commit, m.Commit, m.Abort]))
    def end_promise(self, data, end):
        names = [*self.bench.card.books.reservations, "reservation-99"]
        answer = self.bench.ask(end(data.draw(st.sampled_from(names))))
        assert isinstance(answer, m.Grant | m.Done | m.Error)

    @rule(name=st.sampled_from(NAMES), holder=st.sampled_from(["", "guest"]))
    def assign(self, name, holder):
        self.bench.ask(m.Assign(name, holder))

    @rule(name=st.sampled_from(NAMES))
    def release(self, name):
        known = name in self.bench.card.books.slices
        assert isinstance(self.bench.ask(m.Release(name)), m.Done) == known

    @rule(name=st.sampled_from(NAMES), wrong=st.booleans(), at=st.sampled_from([None, 500_000]))
    def program(self, name, wrong, at):
        self.bench.port.fails_at = at
        data = BITS[:-1] + b"?" if wrong else BITS
        self.bench.load(name, signed(), data)

    @rule(seconds=st.sampled_from([0.001, 1, 31]))
    def pass_time(self, seconds):
        self.bench.pass_time(seconds)

    @rule()
    def cut_power(self):
        settled = self.settled()
        self.bench.cut_power()
        assert self.settled() == settled

    def settled(self):
        """Inventory, with images that are on their way as if they had not begun."""
        inventory = self.inventory()
        return inventory.reservations, inventory.generation, [
            (r.slice, r.image, self.bench.card._settled(r.slice.id)) for r in inventory.slices
        ]  # fmt: skip

    @invariant()
    def books_are_right(self):
        assert reference.judge(self.bench.card.books) == []
        assert find_faults(self.bench.card.books) == ()


Card.TestCase.settings = settings(
    max_examples=LIVES, stateful_step_count=STEPS, deadline=None,
    suppress_health_check=list(HealthCheck), derandomize="VIRTFABRIC_SLICE_LIVES" not in os.environ,
)  # fmt: skip
TestCard = Card.TestCase
