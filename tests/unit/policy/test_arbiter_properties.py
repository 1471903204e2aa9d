"""The arbiter's invariants, on crowds of every kind of guest, judged by `arbiter_reference`."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from arbiter_reference import (
    CROWDS,
    KEYS,
    bounds_of,
    can_pay,
    commit,
    decided,
    expected,
    held_by,
    left_over,
    reclaimable,
    wanted,
)
from arbiter_strategies import (
    any_case,
    hopeful_cases,
)  # fmt: skip
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.decision import Decision, Verdict
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, SchedulerState
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation

if TYPE_CHECKING:
    from random import Random

    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request


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


@settings(CROWDS, max_examples=examples(15))
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
