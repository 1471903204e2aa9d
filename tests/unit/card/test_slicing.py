"""One adapter: who makes way, what is kept in place, where things go."""

from random import Random

import pytest
import slice_reference as reference
from hypothesis import given, settings
from slice_world import AES, SEEDS, books, draw_adapter, draw_spec, spec

from virtfabric.model.adapter import AdapterBooks
from virtfabric.model.errors import InvalidValueError, Reason, Refusal
from virtfabric.model.units import MIB
from virtfabric.policy import slicing
from virtfabric.policy.seating import free_of


def put(one, holder="", **amounts):
    promise = slicing.reserve(one, spec(**amounts), holder=holder)
    return slicing.commit(promise.books, promise.reservation.id)


def test_who_does_not_help_stays():
    one = put(books(), cores=3, priority=10)
    one = put(one, memory=5, priority=20)
    choice = slicing.choose_slice(one, spec(memory=4, priority=50))
    assert choice.victims == ("slice-2",)


@pytest.mark.parametrize(("priority", "allowed"), [(49, False), (50, False), (51, True)])
def test_only_a_strictly_lower_priority_pays(priority, allowed):
    one = put(books(), cores=4, priority=50)
    choice = slicing.choose_slice(one, spec(cores=1, priority=priority))
    assert isinstance(choice, slicing.SeatChoice) == allowed
    assert isinstance(slicing.choose_slice(one, spec(cores=1, priority=99), reclaim=False), Refusal)


def test_a_slice_that_is_not_reclaimable_never_pays():
    one = put(books(), cores=4, priority=0, reclaimable=False)
    refusal = slicing.choose_slice(one, spec(cores=1, priority=100))
    assert refusal.reason == Reason.NO_CAPACITY


def test_who_is_not_used_pays_before_who_is():
    one = put(books(), cores=2, holder="guest", priority=10)
    one = put(one, cores=2, priority=10)
    assert slicing.choose_slice(one, spec(cores=1, priority=50)).victims == ("slice-2",)


@given(SEEDS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_one_full_card_against_the_reference(seed):
    """Filled to the brim by anybody, then asked by the highest."""
    draw = Random(seed)
    one = AdapterBooks(draw_adapter(draw))
    for _ in range(8):
        promise = slicing.reserve(one, draw_spec(draw), reclaim=False)
        if isinstance(promise, slicing.Promise):
            one = slicing.commit(promise.books, promise.reservation.id)
    wanted = draw_spec(draw)
    doing = list(reference.victims_that_do(one, wanted))
    choice = slicing.choose_slice(one, wanted)
    if isinstance(choice, Refusal):
        assert not doing
        return
    chosen = set(choice.victims)
    assert chosen in doing
    assert not any(other < chosen for other in doing), "one of them need not leave"
    promise = slicing.reserve(one, wanted)
    after = slicing.commit(promise.books, promise.reservation.id)
    assert reference.judge(after) == []
    assert after.slices.keys() == one.slices.keys() - chosen | {promise.reservation.slice.id}


def test_memory_in_one_piece_grows_where_it_ends_or_not_at_all():
    one = put(books(), memory=2, contiguous=True, holder="guest")
    one = put(one, memory=1)
    refusal = slicing.reserve_change(one, "slice-1", spec(memory=3, contiguous=True))
    assert refusal.reason == Reason.NO_CAPACITY
    assert "not where it is without moving it" in refusal.detail
    one = slicing.release(one, "slice-2")
    promise = slicing.reserve_change(one, "slice-1", spec(memory=6, contiguous=True))
    assert promise.reservation.slice.seat.memory == ((0, 6 * MIB),)


def test_a_slice_that_nobody_uses_may_move_to_change():
    one = put(books(), memory=1, contiguous=True)
    one = put(one, memory=1, holder="guest")
    promise = slicing.reserve_change(one, "slice-1", spec(memory=4, contiguous=True))
    one = slicing.commit(promise.books, promise.reservation.id)
    assert one.slices["slice-1"].seat.memory == ((2 * MIB, 4 * MIB),)
    assert reference.judge(one) == []


def test_a_promise_that_counts_on_a_slice_keeps_it_as_it_is():
    one = put(books(), cores=4, priority=10)
    promise = slicing.reserve(one, spec(cores=1, priority=50))
    change = slicing.reserve_change(promise.books, "slice-1", spec(cores=4, priority=99))
    assert change.reason == Reason.BUSY
    assert slicing.assign(promise.books, "slice-1", "guest").reason == Reason.BUSY
    gone = slicing.release(promise.books, "slice-1")
    assert slicing.commit(gone, promise.reservation.id).slices.keys() == {"slice-2"}


def test_a_change_ends_with_its_slice():
    one = put(books(), cores=3, priority=10)
    change = slicing.reserve_change(one, "slice-1", spec(cores=1, priority=10))
    assert not slicing.release(change.books, "slice-1").reservations
    taken = slicing.reserve(change.books, spec(cores=3, priority=50))
    assert taken.reservation.victims == ("slice-1",)
    after = slicing.commit(taken.books, taken.reservation.id)
    assert not after.reservations
    late = slicing.commit(after, change.reservation.id)
    assert late.reason == Reason.UNKNOWN_ID


def test_ids_are_never_used_twice():
    one = put(books(), cores=1)
    one = slicing.release(one, "slice-1")
    assert list(put(one, cores=1).slices) == ["slice-2"]


def test_the_smallest_room_that_does_is_used_up():
    one = put(books(memory=10), memory=3)
    one = put(one, memory=1)
    one = put(one, memory=2)
    one = slicing.release(slicing.release(one, "slice-1"), "slice-3")
    assert [e.size // MIB for e in free_of(one).memory] == [3, 6]
    fits = put(one, memory=3).slices["slice-4"]
    assert fits.seat.memory == ((0, 3 * MIB),)
    pieces = put(one, memory=8).slices["slice-4"]
    assert [size // MIB for _, size in pieces.seat.memory] == [2, 6]


def test_what_is_not_there():
    one = books()
    assert slicing.release(one, "slice-9").reason == Reason.UNKNOWN_ID
    assert slicing.commit(one, "reservation-9").reason == Reason.UNKNOWN_ID
    assert slicing.abort(one, "reservation-9").reason == Reason.UNKNOWN_ID
    assert slicing.assign(one, "slice-9", "guest").reason == Reason.UNKNOWN_ID
    assert slicing.reserve_change(one, "slice-9", spec(cores=1)).reason == Reason.UNKNOWN_ID
    none = slicing.choose_slice(books(accelerators={}), spec(capability=AES, units=1))
    assert none.reason == Reason.UNKNOWN_CAPABILITY


@pytest.mark.parametrize(
    ("amounts", "field"),
    [
        ({"cores": -1}, "cores"), ({"cores": 1, "priority": 101}, "priority"),
        ({"cores": 1, "lanes": 3}, "lanes"), ({"cores": 1, "bandwidth": 0}, "bandwidth"),
        ({"units": 1}, "capability"), ({"capability": AES}, "units"), ({}, "cores"),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_meant_names_its_field(amounts, field):
    with pytest.raises(InvalidValueError) as caught:
        spec(**amounts).check("slice.")
    assert caught.value.field == f"slice.{field}"
