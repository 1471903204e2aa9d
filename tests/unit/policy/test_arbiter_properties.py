"""The arbiter's invariants, on crowds of every kind of guest, judged by code of its own.

The reference below shares nothing with `virtfabric.policy`: it reads architecture.md anew.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from arbiter_strategies import (
    Bounds,
    any_case,
    cpu_bounds,
    guests,
    hopeful_cases,
    memory_bounds,
    snapshots,
    used,
)  # fmt: skip
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.decision import Decision, Verdict
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, SchedulerState
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot, Residue
from virtfabric.model.policy import Placement
from virtfabric.model.request import Mode, Request, Want
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.policy.arbiter import choose_admission, choose_allocation, choose_release
from virtfabric.policy.loans import settle
from virtfabric.policy.standing import ceiling_of, floor_of, free

if TYPE_CHECKING:
    from random import Random

KEYS = (Key(CPU), Key(MEMORY))
CROWDS = settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.filter_too_much],
)  # fmt: skip


# -- the reference ----------------------------------------------------------------------------


def bounds_of(snapshot: HostSnapshot, guest: GuestState, key: Key) -> Bounds:
    if key.resource == CPU:
        return cpu_bounds(guest)
    return memory_bounds(guest, lend=snapshot.lend_ballooned)


def held_by(snapshot: HostSnapshot, guest: GuestId) -> Amounts:
    holding = snapshot.books.holdings.get(guest)
    return holding.amounts if holding else Amounts()


def left_over(snapshot: HostSnapshot) -> dict[Key, int]:
    cpu, memory = used(snapshot)
    capacity = snapshot.capacity
    total = max(0, sum(capacity.memory.values()) - capacity.reserve)
    return {Key(CPU): len(capacity.cpus) * 1000 - cpu, Key(MEMORY): total - memory}


def can_pay(snapshot: HostSnapshot, guest: GuestState, priority: int, key: Key) -> int:
    if guest.policy is None or guest.policy.priority >= priority:
        return 0
    if guest.uuid not in snapshot.books.holdings or guest.state is RunState.SHUTOFF:
        return 0
    if guest.job or guest.uuid in snapshot.busy:
        return 0
    if key.resource == MEMORY:
        ballooned = guest.mechanism is MemoryMechanism.BALLOON and snapshot.lend_ballooned
        if guest.mechanism is not MemoryMechanism.VIRTIO_MEM and not ballooned:
            return 0
        if guest.state is RunState.PAUSED:
            return 0
    bounds = bounds_of(snapshot, guest, key)
    above = held_by(snapshot, guest.uuid)[key] - bounds.floor
    return max(0, above - above % bounds.step)


def reclaimable(snapshot: HostSnapshot, guest: GuestState, key: Key) -> int:
    assert guest.policy is not None
    priority = guest.policy.priority
    others = (g for g in snapshot.guests.values() if g.uuid != guest.uuid)
    return sum(can_pay(snapshot, g, priority, key) for g in others)


def wanted(snapshot: HostSnapshot, request: Request) -> dict[Key, tuple[int, int]]:
    """By resource: amount asked for, and amount that it comes to."""
    guest = snapshot.guests[request.guest]
    found = {}
    for key, want in zip(KEYS, (request.cpu, request.memory), strict=True):
        if want is None:
            continue
        held = held_by(snapshot, guest.uuid)[key]
        asked = want.value + (held if want.mode is Mode.BY else 0)
        if asked == held:
            continue
        bounds = bounds_of(snapshot, guest, key)
        virtio = key.resource == MEMORY and guest.mechanism is MemoryMechanism.VIRTIO_MEM
        grid = guest.boot_memory if virtio else held if key.resource == MEMORY else 0
        target = asked + (grid - asked) % bounds.step
        if asked < held:
            target = min(target, held)
        elif asked <= bounds.ceiling < target:
            target = max(held, target - bounds.step)
        found[key] = (asked, target)
    return found


def expected(snapshot: HostSnapshot, request: Request) -> Reason | None:
    """The reason for which a request must be refused; None when it must be granted in full."""
    guest = snapshot.guests.get(request.guest)
    if guest is None:
        return Reason.UNKNOWN_GUEST
    if guest.policy is None:
        return Reason.UNMANAGED_GUEST
    if guest.state is RunState.SHUTOFF:
        return Reason.NOT_RUNNING
    if guest.job or guest.uuid in snapshot.busy or guest.uuid not in snapshot.books.holdings:
        return Reason.BUSY
    plan = wanted(snapshot, request)
    for key, (asked, _) in plan.items():
        bounds, held = bounds_of(snapshot, guest, key), held_by(snapshot, guest.uuid)[key]
        if key.resource == MEMORY and guest.mechanism is MemoryMechanism.FIXED:
            return Reason.NO_MECHANISM
        if asked < held and asked < bounds.floor:
            return Reason.BELOW_FLOOR
    for key, (asked, _) in plan.items():
        if (
            asked > held_by(snapshot, guest.uuid)[key]
            and asked > bounds_of(snapshot, guest, key).ceiling
        ):
            return Reason.ABOVE_LIMIT
    for key, (_, target) in plan.items():
        gain = target - held_by(snapshot, guest.uuid)[key]
        if key.resource == MEMORY and guest.mechanism is MemoryMechanism.BALLOON:
            gain = gain if snapshot.lend_ballooned else 0
        if gain > max(0, left_over(snapshot)[key]) + reclaimable(snapshot, guest, key):
            return Reason.NO_CAPACITY
    return None


# -- how a decision changes the host ----------------------------------------------------------


def commit(
    snapshot: HostSnapshot, decision: Decision, *, ends: Grant | None = None, at: float = 1.0
) -> tuple[HostSnapshot, Grant | None]:
    gain = decision.delta.positive()
    name = GrantId(f"grant-{at:g}")
    grant = Grant(name, decision.guest, gain, decision.request, at) if gain else None
    ids = [LoanId(f"loan-{at:g}-{n}") for n in range(len(decision.takes))]
    books = settle(
        snapshot.books, decision, grant=ends, new_grant=grant, loan_ids=ids, at=at, orders={}
    )
    return replace(snapshot, books=books, generation=snapshot.generation + 1), grant


def decided(snapshot: HostSnapshot, request: Request) -> Decision:
    answer = choose_allocation(snapshot, request)
    assume(isinstance(answer, Decision))
    assert isinstance(answer, Decision)
    return answer


# -- properties -------------------------------------------------------------------------------


@CROWDS
@given(any_case())
def test_request_is_granted_exactly_when_the_reference_says_so(
    case: tuple[HostSnapshot, Request],
) -> None:
    snapshot, request = case
    answer = choose_allocation(snapshot, replace(request, partial=False))
    reason = expected(snapshot, request)
    if reason is None:
        assert isinstance(answer, Decision), answer
        assert answer.delta == Amounts(
            {k: t - held_by(snapshot, request.guest)[k] for k, (_, t) in
             wanted(snapshot, request).items()}
        )  # fmt: skip
    else:
        assert isinstance(answer, Refusal)
        assert answer.reason is reason, answer


@CROWDS
@given(hopeful_cases())
def test_nobody_leaves_floor_or_ceiling_and_capacity_holds(
    case: tuple[HostSnapshot, Request],
) -> None:
    snapshot, request = case
    after, _ = commit(snapshot, decided(snapshot, request))
    for uuid, guest in snapshot.guests.items():
        if guest.policy is None:
            continue
        for key in KEYS:
            bounds = bounds_of(snapshot, guest, key)
            before, now = held_by(snapshot, uuid)[key], held_by(after, uuid)[key]
            assert now >= min(before, bounds.floor)
            assert now <= max(before, bounds.ceiling)
    room = left_over(snapshot)
    assert all(left >= min(0, room[key]) for key, left in left_over(after).items())


@CROWDS
@given(hopeful_cases())
def test_victims_are_eligible_and_drained_in_order(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    decision = decided(snapshot, request)
    policy = snapshot.guests[request.guest].policy
    assert policy is not None
    for key in KEYS:
        givers = [(t.victim, t.amounts[key]) for t in decision.takes if t.amounts[key]]
        for victim, amount in givers:
            most = can_pay(snapshot, snapshot.guests[victim], policy.priority, key)
            assert 0 < amount <= most
        order = sorted(
            (g for g in snapshot.guests.values() if g.uuid != request.guest
             and can_pay(snapshot, g, policy.priority, key)),
            key=lambda g: turn(snapshot, g, key),
        )  # fmt: skip
        paid = dict(givers)
        amounts = [(paid.get(g.uuid, 0), can_pay(snapshot, g, policy.priority, key)) for g in order]
        for (first, most), (second, _) in pairwise(amounts):
            assert not second or first == most


def turn(snapshot: HostSnapshot, guest: GuestState, key: Key) -> tuple[int, Fraction, str]:
    assert guest.policy is not None
    above = held_by(snapshot, guest.uuid)[key] - bounds_of(snapshot, guest, key).floor
    shares = (guest.policy.cpu if key.resource == CPU else guest.policy.memory).shares
    return guest.policy.priority, -Fraction(above, shares), guest.uuid


@CROWDS
@given(hopeful_cases())
def test_amounts_are_conserved(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    decision = decided(snapshot, request)
    guest = snapshot.guests[request.guest]
    for key in KEYS:
        gain = max(0, decision.delta[key])
        paid = [(t.victim, t.amounts[key]) for t in decision.takes if t.amounts[key]]
        balloon = key.resource == MEMORY and guest.mechanism is MemoryMechanism.BALLOON
        if balloon and not snapshot.lend_ballooned:
            assert not paid
            continue
        over = decision.from_free[key] + sum(amount for _, amount in paid) - gain
        last = bounds_of(snapshot, snapshot.guests[paid[-1][0]], key).step if paid else 1
        assert 0 <= over < last
        assert decision.from_free[key] <= max(0, left_over(snapshot)[key])
        if paid:
            assert decision.from_free[key] == max(0, left_over(snapshot)[key])


@CROWDS
@given(any_case())
def test_partial_takes_what_fits_and_no_more(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    answer = choose_allocation(snapshot, replace(request, partial=True))
    reason = expected(snapshot, request)
    if reason not in (None, Reason.NO_CAPACITY):
        assert isinstance(answer, Refusal)
        assert answer.reason is reason
        return
    full = {k: t - held_by(snapshot, request.guest)[k] for k, (_, t) in
            wanted(snapshot, request).items()}  # fmt: skip
    if isinstance(answer, Refusal):
        assert answer.reason is Reason.NO_CAPACITY
        assert not any(answer.would_fit[str(key)] for key, gain in full.items() if gain > 0)
        return
    guest = snapshot.guests[request.guest]
    for key, gain in full.items():
        if gain <= 0:
            assert answer.delta[key] == gain
            continue
        can = max(0, left_over(snapshot)[key]) + reclaimable(snapshot, guest, key)
        balloon = key.resource == MEMORY and guest.mechanism is MemoryMechanism.BALLOON
        if gain <= can or (balloon and not snapshot.lend_ballooned):
            assert answer.delta[key] == gain
        else:
            step = bounds_of(snapshot, guest, key).step
            assert can - step < answer.delta[key] <= can


@CROWDS
@given(any_case())
def test_would_fit_fits_and_more_does_not(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    answer = choose_allocation(snapshot, request)
    assume(isinstance(answer, Refusal) and answer.would_fit)
    assert isinstance(answer, Refusal)
    guest = snapshot.guests[request.guest]
    for name, most in answer.would_fit.items():
        assert most >= 0
        step = bounds_of(snapshot, guest, Key.parse(name)).step
        empty = replace(request, cpu=None, memory=None, partial=False)
        fits = choose_allocation(snapshot, replace(empty, **{name: Want(Mode.BY, most)}))
        assert isinstance(fits, Decision)
        assert fits.delta[Key.parse(name)] == most
        more = choose_allocation(snapshot, replace(empty, **{name: Want(Mode.BY, most + step)}))
        assert isinstance(more, Refusal) or more.delta[Key.parse(name)] <= most


@CROWDS
@given(any_case(), st.randoms())
def test_neither_order_nor_telemetry_matters(
    case: tuple[HostSnapshot, Request], chance: Random
) -> None:
    snapshot, request = case
    names = list(snapshot.guests)
    chance.shuffle(names)

    def disturb(guest: GuestState) -> GuestState:
        if guest.policy is None:
            return guest
        moving = guest.mechanism is not MemoryMechanism.FIXED
        return replace(
            guest,
            pid=chance.randrange(1 << 20),
            vcpu_threads={0: chance.randrange(1 << 20)},
            emulator_affinity=CpuSet({chance.randrange(8)}),
            scheduler=SchedulerState(7, 100_000, chance.randrange(1 << 20)),
            memory_current=Bytes(guest.memory_max // 2) if moving else guest.memory_current,
        )

    other = replace(snapshot, guests={n: disturb(snapshot.guests[n]) for n in names})
    if any(snapshot.books.holdings.get(n) is None for n in names):
        other = replace(snapshot, guests={n: snapshot.guests[n] for n in names})
    assert choose_allocation(other, request) == choose_allocation(snapshot, request)


@CROWDS
@given(any_case())
def test_every_guest_is_told_why(case: tuple[HostSnapshot, Request]) -> None:
    snapshot, request = case
    answer = choose_allocation(snapshot, replace(request, partial=False))
    counted = {
        g.uuid for g in snapshot.guests.values()
        if g.uuid != request.guest
        and (g.state is not RunState.SHUTOFF or g.uuid in snapshot.books.holdings)
    }  # fmt: skip
    if isinstance(answer, Refusal):
        lines = answer.considered
        assert answer.reason is not Reason.NO_CAPACITY or len(lines) % max(1, len(counted)) == 0
        return
    for key in KEYS:
        entries = [c for c in answer.considered if c.key == key]
        paid = {t.victim: t.amounts[key] for t in answer.takes if t.amounts[key]}
        assert {c.guest for c in entries} == (counted if paid else set())
        assert {c.guest: c.pays for c in entries if c.verdict is Verdict.PAYS} == paid
        assert all(c.pays == 0 for c in entries if c.verdict is not Verdict.PAYS)


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


@settings(CROWDS, max_examples=15)
@given(hopeful_cases(), st.integers(0, 300))
def test_caps_bound_what_a_victim_gives(case: tuple[HostSnapshot, Request], cap: int) -> None:
    snapshot, request = case
    first = decided(snapshot, request)
    assume(first.takes)
    victim = first.takes[0].victim
    caps = {victim: Amounts.of(cpu=cap, memory=cap * MIB)}
    again = choose_allocation(snapshot, request, caps=caps)
    if isinstance(again, Refusal):
        assert again.reason is Reason.NO_CAPACITY
    else:
        took = sum((t.amounts for t in again.takes if t.victim == victim), Amounts())
        assert took.fits_in(caps[victim])


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


def test_settle_wants_an_id_for_each_take() -> None:
    from virtfabric.model.decision import Take

    take = Take(GuestId("v"), Amounts.of(cpu=1))
    decision = Decision(RequestId("r"), GuestId("b"), 1, Amounts.of(cpu=1), takes=(take,))
    with pytest.raises(ValueError, match="loan ids"):
        settle(Books(), decision, grant=None, new_grant=None, loan_ids=[], at=0.0, orders={})
