"""Several adapters: the fewest, then the least fragmentation, then the nearest; and the index."""

from itertools import combinations
from random import Random

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from slice_world import AES, ZSTD, adapter, books, spec

from virtfabric.model.adapter import AdapterBooks
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import MIB
from virtfabric.policy import slicing
from virtfabric.policy.combining import Lot, choose_lots, divide
from virtfabric.policy.seating import Vector
from virtfabric.policy.shelf import Entry, Shelf
from virtfabric.policy.slicepool import SlicePool


def used(one, **amounts):
    """The card with a slice on it."""
    promise = slicing.reserve(one, spec(**amounts))
    return slicing.commit(promise.books, promise.reservation.id)


def chosen(pool, wanted, **more):
    return [part.adapter for part in pool.choose(wanted, **more).parts]


def test_the_fullest_card_that_fits_is_taken():
    full, half = used(books("full"), cores=3), used(books("half"), cores=2)
    pool = SlicePool([books("empty"), full, half])
    assert chosen(pool, spec(cores=1)) == ["full"]
    assert chosen(pool, spec(cores=2)) == ["half"]
    assert chosen(pool, spec(cores=3)) == ["empty"]


def test_of_cards_as_full_the_nearest_is_taken():
    pool = SlicePool([books(f"c-{n}", site=f"node:{n}") for n in range(4)])
    assert chosen(pool, spec(cores=1), near=["node:2", "node:1"]) == ["c-2"]
    assert chosen(pool, spec(cores=1), near=["node:9", "node:1"]) == ["c-1"]
    assert chosen(pool, spec(cores=6), near=["node:3", "node:1"]) in (
        ["c-3", "c-1"],
        ["c-1", "c-3"],
    )


def test_fragmentation_comes_before_locality():
    pool = SlicePool([books("near", site="node:0"), used(books("far", site="node:1"), cores=1)])
    assert chosen(pool, spec(cores=1), near=["node:0"]) == ["far"]


def test_nobody_makes_way_while_two_cards_together_do():
    busy = used(books("busy"), cores=4, priority=10)
    rest = [used(books(f"rest-{n}"), cores=2, priority=90) for n in range(2)]
    pool = SlicePool([busy, *rest])
    assert sorted(chosen(pool, spec(cores=4, priority=50))) == ["rest-0", "rest-1"]
    choice = pool.choose(spec(cores=4, contiguous=True, memory=1, priority=50))
    assert [part.adapter for part in choice.parts] == ["busy"]
    assert len(choice.parts[0].choice.victims) == 1


def test_the_gentlest_reclaim_is_taken():
    cards = [used(books(f"c-{p}"), cores=4, memory=6, priority=p) for p in (40, 10, 30)]
    pool = SlicePool(cards)
    assert chosen(pool, spec(cores=1, priority=50)) == ["c-10"]
    assert pool.choose(spec(cores=1, priority=10)).reason == Reason.NO_CAPACITY
    assert pool.choose(spec(cores=1, priority=50), reclaim=False).reason == Reason.NO_CAPACITY


def test_each_part_is_a_function_with_its_own_lanes_keys_and_limit():
    pool = SlicePool([books(f"c-{n}") for n in range(3)])
    wanted = spec(cores=7, memory=8, lanes=2, keys=2, capability=AES, units=3, bandwidth=60)
    parts = pool.choose(wanted).parts
    assert len(parts) == 2
    for part in parts:
        assert (part.spec.lanes, part.spec.keys, part.spec.bandwidth) == (2, 2, 60)
    assert sum(part.spec.cores for part in parts) == 7
    assert sum(part.spec.memory for part in parts) == 8 * MIB
    assert sum(part.spec.units for part in parts) == 3


def test_a_part_without_units_has_no_capability():
    pool = SlicePool([books("a", accelerators={AES: 1}), books("b", accelerators={})])
    by_card = {part.adapter: part.spec for part in pool.choose(
        spec(cores=8, capability=AES, units=1)).parts}  # fmt: skip
    assert (by_card["a"].capability, by_card["b"].capability) == (AES, "")


def test_refusals_say_what_the_pool_has():
    pool = SlicePool([books(f"c-{n}", accelerators={AES: 1}) for n in range(3)])
    refusal = pool.choose(spec(cores=13))
    assert refusal.reason == Reason.NO_CAPACITY
    assert "cores 13 wanted, 12 free" in refusal.detail
    assert refusal.would_fit["cores"] == 12
    assert "6MiB free" in pool.choose(spec(memory=7, contiguous=True)).detail
    assert pool.choose(spec(capability=ZSTD, units=1)).reason == Reason.UNKNOWN_CAPABILITY
    both = [books("x", cores=4, memory=0), books("y", cores=0, memory=6)]
    refusal = SlicePool(both).choose(spec(cores=1, memory=1, contiguous=True))
    assert "not together" in refusal.detail
    pool.remove("c-0")
    pool.remove("c-0")
    assert len(pool) == 2
    assert pool.choose(spec(cores=9)).would_fit["cores"] == 8
    assert SlicePool().choose(spec(cores=1)).reason == Reason.NO_CAPACITY


# -- the fewest -------------------------------------------------------------------------------


LOTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5), st.integers(0, 2)),
    min_size=1, max_size=8,
)  # fmt: skip


@given(LOTS, st.integers(1, 15), st.integers(1, 15))
@settings(max_examples=examples(80), deadline=None)
def test_the_fewest_lots_and_of_those_the_cheapest(found, first, second):
    need = (first, second)
    lots = [
        Lot(f"c-{n}", (min(a, first), min(b, second)), fill, distance)
        for n, (a, b, fill, distance) in enumerate(found)
    ]
    covers = [
        group
        for count in range(1, len(lots) + 1)
        for group in combinations(lots, count)
        if all(sum(lot.give[axis] for lot in group) >= need[axis] for axis in (0, 1))
    ]
    answer = choose_lots(need, lots)
    if not covers:
        assert answer is None
        return
    fewest = min(map(len, covers))
    costs = [
        (sum(lot.fill for lot in group), sum(lot.distance for lot in group))
        for group in covers if len(group) == fewest
    ]  # fmt: skip
    assert len(answer) == fewest
    assert (sum(lot.fill for lot in answer), sum(lot.distance for lot in answer)) == min(costs)


def test_the_most_helpful_is_not_always_among_the_fewest():
    lots = [Lot("both", (4, 4)), Lot("first", (6, 0)), Lot("second", (0, 6))]
    assert {lot.serial for lot in choose_lots((6, 6), lots)} == {"first", "second"}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_shares_add_up_and_exceed_no_room(rooms, data):
    need = tuple(data.draw(st.integers(0, sum(room[axis] for room in rooms))) for axis in (0, 1))
    shares = divide(need, rooms)
    assert tuple(map(sum, zip(*shares, strict=True))) == need
    assert all(s <= r for share, room in zip(shares, rooms, strict=True)
               for s, r in zip(share, room, strict=True))  # fmt: skip


def test_a_large_pool_never_takes_more_than_the_greedy_way_and_tightens():
    """120 cards: more than are looked at at first."""
    draw = Random(3)
    cards = []
    for number in range(120):
        one = AdapterBooks(adapter(f"c-{number:03}", cores=8, memory=8, lanes=4))
        cores = draw.randint(0, 7)
        cards.append(used(one, cores=cores, memory=draw.randint(0, 7)) if cores else one)
    pool = SlicePool(cards)
    free = sorted(
        (8 - sum(len(s.seat.cores) for s in c.slices.values()) for c in cards), reverse=True
    )
    for cores in (9, 16, 20, 33, 50, 70):
        parts = pool.choose(spec(cores=cores), reclaim=False).parts
        fewest = next(n for n in range(1, 120) if sum(free[:n]) >= cores)
        assert len(parts) == fewest
    parts = pool.choose(spec(cores=9), reclaim=False).parts
    fills = [8 - sum(len(s.seat.cores) for s in pool._members[p.adapter].books.slices.values())
             for p in parts]  # fmt: skip
    assert sum(fills) < 16, "two empty cards were broken up where fuller ones would do"


# -- the index --------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=examples(20), deadline=None)
def test_a_shelf_is_a_sorted_list(data):
    draw = Random(data.draw(st.integers(0, 10**6)))
    shelf, plain = Shelf(), []
    for number in range(data.draw(st.integers(0, 400))):
        room = Vector(*(draw.randint(0, 5) for _ in range(7)))
        entry = Entry(draw.randint(0, 9), f"n-{draw.randint(0, 2)}", f"c-{number}", room)
        shelf.put(entry)
        plain.append(entry)
        if draw.random() < 0.3:
            gone = plain.pop(draw.randrange(len(plain)))
            shelf.remove(gone)
    plain.sort()
    assert list(shelf) == plain
    assert len(shelf) == len(plain)
    assert list(shelf.total) == [sum(e.room[axis] for e in plain) for axis in range(7)]
    for _ in range(10):
        need = Vector(*(draw.randint(0, 4) for _ in range(7)))
        least, skip = (draw.randint(0, 9), "n-1"), {f"c-{draw.randint(0, 400)}"}
        able = [e for e in plain if all(a <= b for a, b in zip(need, e.room, strict=True))]
        after = [e for e in able if e[:2] >= least and e.serial not in skip]
        assert shelf.find(need, least=least, skip=skip) == (after[0] if after else None)
        exact = [e for e in able if e[:2] == least]
        assert shelf.find(need, least=least, exactly=True) == (exact[0] if exact else None)
        assert list(shelf.find_all(need)) == able
        most = sorted((e.room.memory for e in able if e.room.memory), reverse=True)[:7]
        assert [e.room.memory for e in shelf.largest(1, 7, need)] == most


def test_an_index_told_of_changes_is_like_a_new_one():
    draw = Random(5)
    current = {f"c-{n}": books(f"c-{n}") for n in range(20)}
    pool = SlicePool(current.values())
    for _ in range(300):
        wanted = spec(cores=draw.randint(1, 6), memory=draw.randint(0, 8),
                      priority=draw.choice([10, 50, 90]))  # fmt: skip
        choice, fresh = pool.choose(wanted), SlicePool(current.values()).choose(wanted)
        assert choice == fresh
        for part in () if isinstance(choice, Refusal) else choice.parts:
            promise = slicing.reserve(current[part.adapter], part.spec)
            current[part.adapter] = slicing.commit(promise.books, promise.reservation.id)
            pool.put(current[part.adapter])
        for serial, one in current.items():
            if one.slices and draw.random() < 0.2:
                current[serial] = slicing.release(one, draw.choice(sorted(one.slices)))
                pool.put(current[serial])


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_links_begin_at_a_multiple_of_their_width(width):
    one = used(books("c", lanes=16), lanes=1)
    seat = used(one, lanes=width).slices["slice-2"].seat
    assert seat.lanes[0] % width == 0
    assert seat.lanes[0] == width, "a wider link was broken up"
