"""Slices over many changes on a small pool, against the reference that tries everything.

`VIRTFABRIC_SLICE_LIVES=2000 VIRTFABRIC_SLICE_STEPS=40` searches for minutes.
"""

import os
from collections import Counter
from dataclasses import replace
from random import Random

import slice_reference as reference
from examples import WHOLE, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from slice_world import SEEDS, SITES, adapter, draw_adapter, draw_spec

from virtfabric.model.adapter import AdapterBooks
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy import slicing
from virtfabric.policy.slicecheck import find_faults
from virtfabric.policy.slicepool import SlicePool

LIVES = int(os.environ.get("VIRTFABRIC_SLICE_LIVES", str(examples(120))))
STEPS = int(os.environ.get("VIRTFABRIC_SLICE_STEPS", "25"))


SEEN: Counter[str] = Counter()
LEAST = {
    "refused": 50, "whole": 100, "in parts": 8, "reclaimed": 10, "reclaimed several": 2,
    "reclaimed in parts": 1, "changed in use": 15, "changed unused": 5, "change refused": 12,
}  # fmt: skip
"""How often in 120 lives at least: what never happens proves nothing.

A fifth of what is usual or so: hypothesis draws other lives, derandomized or not, whenever a
constant changes in any module that is imported.
"""


class Slices(RuleBasedStateMachine):
    """Books of each card beside an index of them, which is only ever told of changes."""

    @initialize(seed=SEEDS)
    def begin(self, seed):
        self.draw = Random(seed)  # one for the whole life: equal seeds of steps would repeat
        made = [draw_adapter(self.draw, f"card-{n}") for n in range(self.draw.choice([1, 2, 3]))]
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

    @rule(goes=st.sampled_from([True, True, True, False]))
    def make(self, goes):
        spec, near = draw_spec(self.draw), self.draw.sample(SITES, 2)
        reclaim, holder = self.draw.random() < 0.8, self.draw.choice(["", "guest-1", "guest-2"])
        before, all_books = self.seats(), list(self.books.values())
        choice = self.pool.choose(spec, near=near, reclaim=reclaim)
        free = reference.fewest_cards(all_books, spec, reclaim=False)
        fewest = free
        if free is None and reclaim:
            fewest = reference.fewest_cards(all_books, spec, reclaim=True)
        if isinstance(choice, Refusal):
            assert fewest is None, choice
            SEEN["refused"] += 1
            return
        assert len(choice.parts) == fewest
        victims = {(p.adapter, v) for p in choice.parts for v in p.choice.victims}
        SEEN["whole" if fewest == 1 else "in parts"] += 1
        SEEN["reclaimed"] += bool(victims)
        SEEN["reclaimed several"] += len(victims) > 1
        SEEN["reclaimed in parts"] += bool(victims) and fewest > 1
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

    @rule()
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def change(self):
        serial, name = self.draw.choice(sorted(self.seats()))
        spec = self.other_amounts(self.books[serial].slices[name].spec)
        books, before = self.books[serial], self.seats()
        one = books.slices[name]
        able = reference.could_change(books, name, spec)
        promise = slicing.reserve_change(books, name, spec)
        assert isinstance(promise, slicing.Promise) == able, promise
        SEEN["changed in use" if one.holder else "changed unused"] += able
        SEEN["change refused"] += not able
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

    def other_amounts(self, spec):
        """Mostly a little more or less of something; now and then all anew."""
        other = draw_spec(self.draw)
        names = self.draw.sample(["cores", "memory", "keys", "bandwidth", "priority"], 2)
        if self.draw.random() < 0.15:
            return other
        changed = replace(spec, **{name: getattr(other, name) for name in names})
        empty = not (changed.cores or changed.memory or changed.lanes or changed.units)
        return other if empty else changed

    @rule()
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def release(self):
        serial, name = self.draw.choice(sorted(self.seats()))
        before = self.seats()
        self.put(slicing.release(self.books[serial], name))
        del before[serial, name]
        assert self.seats() == before

    @rule(holder=st.sampled_from(["", "guest-3"]))
    @precondition(lambda self: any(b.slices for b in self.books.values()))
    def assign(self, holder):
        serial, name = self.draw.choice(sorted(self.seats()))
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


def test_slices_over_many_lives():
    """And in them all that can happen happened.

    One test: xdist may give two to different workers, and the second would have seen nothing.
    """
    SEEN.clear()
    run_state_machine_as_test(
        Slices,
        settings=settings(
            max_examples=LIVES, stateful_step_count=STEPS, deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize="VIRTFABRIC_SLICE_LIVES" not in os.environ,
        ),
    )  # fmt: skip
    rare = {what: SEEN[what] for what, least in LEAST.items() if SEEN[what] * 120 < least * LIVES}
    assert not rare or STEPS < 25 or not WHOLE, f"in {LIVES} lives: {dict(SEEN)}"


@given(SEEDS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_promises_side_by_side_never_overlap(seed):
    """Any mix of open promises on one card, ended in any order."""
    draw = Random(seed)
    books = AdapterBooks(draw_adapter(draw))
    for _ in range(9):
        promise = slicing.reserve(books, draw_spec(draw), reclaim=draw.random() < 0.7)
        books = promise.books if isinstance(promise, slicing.Promise) else books
        assert find_faults(books) == ()
        while books.reservations and draw.random() < 0.5:
            name = draw.choice(sorted(books.reservations))
            books = draw.choice([slicing.commit, slicing.commit, slicing.abort])(books, name)
            assert reference.judge(books) == []
    for name in sorted(books.reservations):
        books = slicing.commit(books, name)
        assert reference.judge(books) == []
