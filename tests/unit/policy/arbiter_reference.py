"""A second reading of architecture.md, to judge the arbiter by: who must be granted, who can pay.

It shares nothing with `virtfabric.policy` but, to carry a decision out, `settle`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from arbiter_strategies import (
    Bounds,
    cpu_bounds,
    memory_bounds,
    used,
)  # fmt: skip
from examples import examples
from hypothesis import HealthCheck, assume, settings

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState
from virtfabric.model.ids import GrantId, GuestId, LoanId
from virtfabric.model.ledger import Grant, HostSnapshot
from virtfabric.model.want import Mode
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.loans import settle

if TYPE_CHECKING:
    from virtfabric.model.request import Request

KEYS = (Key(CPU), Key(MEMORY))
CROWDS = settings(
    max_examples=examples(40), deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.filter_too_much],
)  # fmt: skip


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
