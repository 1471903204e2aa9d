"""The handler contract for steps that change slices of cards, over both wires."""

import sys
from pathlib import Path

import pytest

from tests.contract.card_contract import made, spec
from tests.contract.handler_contract import HandlerContract
from tests.contract.test_cards import _SimulatedBed, _SocketBed
from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.adapters.cardlink.handlers import card_handlers, presence_of, slice_of
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "card"))


class _Fleet(CardFleet):
    """The bed watches its card already."""

    def __init__(self, card):
        super().__init__("host-a", [card])
        self._met.add(card.serial)


class CardStepWorld:
    def __init__(self, bed):
        self.bed = bed
        self.handlers = HandlerRegistry(card_handlers(_Fleet(bed.card)))
        self.one = made(bed.card, "host-a/r-0/0", spec(cores=2), holder="g")

    def steps(self):
        absent, promised = SlicePresence.ABSENT, SlicePresence.PROMISED
        ends = made(self.bed.card, "host-a/r-2/0", spec(cores=1))
        self.bed.card.reserve(spec(cores=1), request="host-a/r-3/0")
        common = {"card": "C-1", "spec": spec(cores=1)}
        return [
            AssignSlice(key=self.one.request, card="C-1", before="g", after="h"),
            BringSlice(key="host-a/r-1/0", before=absent, after=promised, **common),
            BringSlice(
                key="host-a/r-3/0", before=promised, after=SlicePresence.GRANTED, **common
            ),
            BringSlice(key=ends.request, before=SlicePresence.GRANTED, after=absent, **common),
        ]  # fmt: skip

    def observe(self, step):
        books = self.bed.card.refresh().books
        one = slice_of(books, step.key)
        return presence_of(books, step.key), one and (one.holder, one.spec)

    def vanish(self, step):
        """No guest is in it."""


@pytest.fixture(params=[_SimulatedBed, _SocketBed], ids=["simulated", "socket"])
def world(request, tmp_path):
    bed = request.param(tmp_path)
    yield CardStepWorld(bed)
    bed.close()


class TestCardSteps(HandlerContract):
    def test_every_step_type_of_cards_is_in_the_contract(self, world):
        assert {step.kind for step in world.steps()} == world.handlers.kinds
