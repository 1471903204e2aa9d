"""Starts, releases and standing on crowds of every kind of guest, judged by `arbiter_reference`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from arbiter_reference import (
    CROWDS,
    KEYS,
    bounds_of,
    commit,
    decided,
    left_over,
    reclaimable,
)
from arbiter_strategies import (
    cpu_bounds,
    guests,
    hopeful_cases,
    memory_bounds,
    snapshots,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot, Residue
from virtfabric.model.policy import Placement
from virtfabric.policy.arbiter import choose_admission, choose_release
from virtfabric.policy.loans import settle
from virtfabric.policy.standing import ceiling_of, floor_of, free

if TYPE_CHECKING:
    from virtfabric.model.request import Request


@CROWDS
@given(st.data())
def test_admission(data: st.DataObject) -> None:
    snapshot = data.draw(snapshots())
    guest = replace(data.draw(guests(77)), state=RunState.SHUTOFF)
    answer = choose_admission(snapshot, guest, RequestId("start"))
    if guest.policy is None:
        assert isinstance(answer, Refusal)
        return
    cpu, memory = cpu_bounds(guest), memory_bounds(guest, lend=snapshot.lend_ballooned)
    least = memory.floor if guest.mechanism is MemoryMechanism.VIRTIO_MEM else guest.memory_max
    needs = {Key(CPU): cpu.floor, Key(MEMORY): least + snapshot.capacity.overhead}
    room = left_over(snapshot)
    fits = all(
        need <= max(0, room[key]) + reclaimable(snapshot, guest, key) for key, need in needs.items()
    )
    assert isinstance(answer, Decision) == fits, answer
    if isinstance(answer, Refusal):
        assert answer.reason is Reason.NO_CAPACITY
        return
    assert answer.delta.memory == least
    assert cpu.floor <= answer.delta.cpu <= max(cpu.floor, cpu.ceiling)
    assert answer.delta.cpu % cpu.step == 0
    assert not any(t.amounts.cpu for t in answer.takes) or answer.delta.cpu == cpu.floor
    with_guest = replace(snapshot, guests={**snapshot.guests, guest.uuid: guest})
    after, _ = commit(with_guest, answer)
    assert after.books.holdings[guest.uuid] == Holding(guest.uuid, answer.delta)
    assert all(left >= min(0, room[key]) for key, left in left_over(after).items())


@CROWDS
@given(snapshots(), st.integers(0, 64), st.integers(0, 64))
def test_free_is_capacity_less_all_that_is_used(
    snapshot: HostSnapshot, pending: int, residue: int
) -> None:
    room = left_over(snapshot)
    assert free(snapshot) == Amounts(room)
    loaded = replace(
        snapshot,
        pending=Amounts.of(cpu=pending, memory=pending),
        books=replace(
            snapshot.books,
            residues=(
                Residue(GuestId("g"), "memory", residue, 0.0),
                Residue(GuestId("g"), "vcpu", 1000, 0.0),
            ),
        ),
    )
    less = Amounts.of(cpu=pending, memory=pending + residue)
    assert free(loaded) == Amounts(room) - less


@CROWDS
@given(snapshots())
def test_bounds_agree_with_the_reference(snapshot: HostSnapshot) -> None:
    for guest in snapshot.guests.values():
        if guest.policy is None:
            continue
        found = {key: bounds_of(snapshot, guest, key) for key in KEYS}
        assert floor_of(guest, snapshot) == Amounts({k: b.floor for k, b in found.items()})
        assert ceiling_of(guest, snapshot) == Amounts({k: b.ceiling for k, b in found.items()})
        if guest.policy.cpu.placement is Placement.DEDICATED:
            assert floor_of(guest, snapshot).cpu % 1000 == 0


@CROWDS
@given(hopeful_cases())
def test_release_after_allocate_restores_everything(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    decision = decided(snapshot, request)
    borrower = snapshot.guests[request.guest]
    # on an overcommitted host the surplus of a victim of whole CPUs fills the hole instead
    assume(min(left_over(snapshot).values()) >= 0)
    assume(decision.delta and decision.delta.positive() == decision.delta)
    assume(borrower.mechanism is not MemoryMechanism.BALLOON or snapshot.lend_ballooned)
    after, grant = commit(snapshot, decision)
    assert grant is not None
    assert {g: h.amounts for g, h in after.books.holdings.items()} == {
        g: h.amounts for g, h in snapshot.books.holdings.items()
    } | dict(decision.holdings or {})
    released = choose_release(after, RequestId("end"), grant)
    final, _ = commit(after, released, ends=grant, at=2.0)
    assert final.books.holdings == snapshot.books.holdings
    assert not final.books.grants
    assert not final.books.loans
    assert final.books.generation == snapshot.books.generation + 2


def test_settle_wants_an_id_for_each_take() -> None:
    from virtfabric.model.decision import Take

    take = Take(GuestId("v"), Amounts.of(cpu=1))
    decision = Decision(RequestId("r"), GuestId("b"), 1, Amounts.of(cpu=1), takes=(take,))
    with pytest.raises(ValueError, match="loan ids"):
        settle(Books(), decision, grant=None, new_grant=None, loan_ids=[], at=0.0, orders={})
