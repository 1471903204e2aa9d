"""Slices over many changes on a small pool, against the reference that tries everything.

`VIRTFABRIC_SLICE_LIVES=2000 VIRTFABRIC_SLICE_STEPS=40` searches for minutes.
"""

import os

import slice_reference as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from slice_world import SITES, adapter, adapters, specs

from virtfabric.model.adapter import AdapterBooks
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy import slicing
from virtfabric.policy.slicepool import SlicePool

LIVES = int(os.environ.get("VIRTFABRIC_SLICE_LIVES", "30"))
STEPS = int(os.environ.get("VIRTFABRIC_SLICE_STEPS", "14"))


class Slices(RuleBasedStateMachine):
    """Books of each card beside an index of them, which is only ever told of changes."""

    @initialize(count=st.integers(1, 3), data=st.data())
    def begin(self, count, data):
        made = [data.draw(adapters(f"card-{n}")) for n in range(count)]
        self.books = {a.serial: AdapterBooks(a) for a in made}
        self.pool = SlicePool(self.books.values())

    def put(self, books):
        self.books[books.adapter.serial] = books
        self.pool.put(books)

    def seats(self):
        return {
            (serial, name): (one.seat, one.holder)
            for serial, books in self.books.items()
            for name, one in books.slices.items()
        }

    @rule(spec=specs(), near=st.permutations(SITES), reclaim=st.booleans(), goes=st.booleans(),
          holder=st.sampled_from(["", "guest-1", "guest-2"]))  # fmt: skip
    def make(self, spec, near, reclaim, goes, holder):
        before, all_books = self.seats(), list(self.books.values())
        choice = self.pool.choose(spec, near=near, reclaim=reclaim)
        free = reference.fewest_cards(all_books, spec, reclaim=False)
        fewest = free
        if free is None and reclaim:
            fewest = reference.fewest_cards(all_books, spec, reclaim=True)
        if isinstance(choice, Refusal):
            assert fewest is None, choice
            return
        assert len(choice.parts) == fewest
        victims = {(p.adapter, v) for p in choice.parts for v in p.choice.victims}
        if free is not None:
            assert not victims, "somebody would leave for what was free"
        for part in choice.parts:
            self.check_victims(part)
        promises = []
        for part in choice.parts:
            promise = slicing.reserve(self.books[part.adapter], part.spec, holder=holder)
            assert isinstance(promise, slicing.Promise)
            assert promise.reservation.victims == part.choice.victims
            self.put(promise.books)
            promises.append((part.adapter, promise.reservation.id))
        assert self.seats() == before, "a promise changed what is there"
        for serial, name in promises:
            end = slicing.commit if goes else slicing.abort
            self.put(end(self.books[serial], name))
        stayed = {key: seat for key, seat in before.items() if not goes or key not in victims}
        assert stayed.items() <= self.seats().items(), "a slice was moved or ended for another"
        assert len(self.seats()) == len(stayed) + (len(promises) if goes else 0)

    def check_victims(self, part):
        books = self.books[part.adapter]
        doing = list(reference.victims_that_do(books, part.spec))
        chosen = set(part.choice.victims)
        assert chosen in doing
        assert not any(other < chosen for other in doing), "one of them need not leave"

    @rule(spec=specs(), data=st.data())
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def change(self, spec, data):
        serial, name = data.draw(st.sampled_from(sorted(self.seats())))
        books, before = self.books[serial], self.seats()
        one = books.slices[name]
        able = reference.could_change(books, name, spec)
        promise = slicing.reserve_change(books, name, spec)
        assert isinstance(promise, slicing.Promise) == able, promise
        if not able:
            return
        assert slicing.reserve_change(promise.books, name, spec).reason == Reason.BUSY
        self.put(slicing.commit(promise.books, promise.reservation.id))
        after = self.books[serial].slices[name]
        assert after.holder == one.holder
        if one.holder:
            kept_cores = set(one.seat.cores[: spec.cores])
            assert kept_cores <= set(after.seat.cores), "it was moved under its holder"
            assert after.seat.lanes == one.seat.lanes
            had, has = (reference.pieces_mask(s.seat.memory) for s in (one, after))
            assert had & has in (had, has), "its memory was moved under its holder"
        del before[serial, name]
        assert before.items() <= self.seats().items()

    @rule(data=st.data())
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def release(self, data):
        serial, name = data.draw(st.sampled_from(sorted(self.seats())))
        before = self.seats()
        self.put(slicing.release(self.books[serial], name))
        del before[serial, name]
        assert self.seats() == before

    @rule(data=st.data(), holder=st.sampled_from(["", "guest-3"]))
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def assign(self, data, holder):
        serial, name = data.draw(st.sampled_from(sorted(self.seats())))
        had = self.books[serial].slices[name].holder
        books = slicing.assign(self.books[serial], name, holder)
        if holder and had not in ("", holder):
            assert books.reason == Reason.DEVICE_IN_USE
            return
        self.put(books)
        assert self.books[serial].slices[name].holder == holder

    @rule()
    def card_leaves_and_another_comes(self):
        empty = [s for s, b in self.books.items() if not b.slices]
        if empty and len(self.books) > 1:
            del self.books[empty[0]]
            self.pool.remove(empty[0])
        elif "card-9" not in self.books and len(self.books) < 3:
            self.put(AdapterBooks(adapter("card-9", cores=3, memory=4)))

    @invariant()
    def books_are_right(self):
        for books in getattr(self, "books", {}).values():
            assert reference.judge(books) == []
            assert not books.reservations


Slices.TestCase.settings = settings(
    max_examples=LIVES, stateful_step_count=STEPS, deadline=None,
    suppress_health_check=list(HealthCheck), derandomize="VIRTFABRIC_SLICE_LIVES" not in os.environ,
)  # fmt: skip
TestSlices = Slices.TestCase


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_promises_side_by_side_never_overlap(sizes, data):
    """Any mix of open promises on one card, ended in any order."""
    books = AdapterBooks(data.draw(adapters()))
    for _ in sizes:
        promise = slicing.reserve(books, data.draw(specs()), reclaim=data.draw(st.booleans()))
        books = promise.books if isinstance(promise, slicing.Promise) else books
        while books.reservations and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(books.reservations)))
            books = data.draw(st.sampled_from([slicing.commit, slicing.abort]))(books, name)
            assert reference.judge(books) == []
    for name in sorted(books.reservations):
        books = slicing.commit(books, name)
        assert reference.judge(books) == []
