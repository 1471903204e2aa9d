"""Placement: from amounts to a plan, the exact ordered steps for one snapshot of the host.

Owns the order of steps: what needs a guest first (memory comes in before it goes out, vCPUs are
plugged), then what is certain, leavers before newcomers, and last the vCPUs that may be unplugged
where the guest cooperates. It must not choose amounts (arbiter) or pCPUs (layout).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import Refusal
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.model.plan import (
    PinEmulator,
    PinVcpu,
    Plan,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetQuota,
    SetShares,
    SetVcpuCount,
    Step,
)  # fmt: skip
from virtfabric.model.policy import DEFAULT_SHARES
from virtfabric.model.units import CpuSet
from virtfabric.policy.intent import (
    UNCAPPED,
    intended_pins,
    intended_state,
    memory_differs,
    quota_of,
    shares_of,
)  # fmt: skip
from virtfabric.policy.layout import Layout, choose_layout, present_layout
from virtfabric.policy.standing import MEMORY_KEY, held_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from virtfabric.model.amounts import Amounts
    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.policy.intent import Intended

DEADLINE_S: Final = 30.0


def plan_decision(
    snapshot: HostSnapshot, decision: Decision, *, deadline_s: float = DEADLINE_S
) -> Plan | Refusal:
    """Steps that carry out a decision.

    Guests of the decision are brought to what they hold afterwards. Others get new pins at most:
    what else may be amiss with them must not make this request fail. Memory is touched only where
    the decision changes it, or where it is off by more than the tolerance.

    Args:
        snapshot: what the decision was made from.
        decision: amounts.
        deadline_s: for each step that needs a guest.
    """
    changed = dict(decision.holdings or {})
    amounts = _held(snapshot)
    amounts.update(changed)
    amounts = {g: a for g, a in amounts.items() if a}
    layout = choose_layout(snapshot, amounts)
    if isinstance(layout, Refusal):
        return layout
    draft = _Draft(snapshot, amounts, layout, deadline_s)
    for guest in sorted({*changed, decision.guest}):
        before, after = held_of(snapshot, guest), amounts.get(guest)
        if after is not None:
            draft.bring(guest, memory=before[MEMORY_KEY] != after[MEMORY_KEY])
    draft.disturb({*changed, decision.guest})
    return draft.plan(decision.request)


def plan_convergence(
    snapshot: HostSnapshot,
    guests: Collection[GuestId] | None,
    request_id: RequestId,
    *,
    deadline_s: float = DEADLINE_S,
) -> Plan | Refusal:
    """Steps that bring what is found to what the books say: a fresh start, drift, a new pool.

    Args:
        snapshot: host, guests and books.
        guests: whom to mend, None for every managed guest; others get new pins at most.
        request_id: whom the plan is for.
        deadline_s: for each step that needs a guest.
    """
    amounts = {g: a for g, a in _held(snapshot).items() if a}
    layout = choose_layout(snapshot, amounts)
    if isinstance(layout, Refusal):
        return layout
    draft = _Draft(snapshot, amounts, layout, deadline_s)
    mended = set(amounts if guests is None else guests)
    for guest in sorted(mended & set(amounts)):
        state = snapshot.guests.get(guest)
        # a paused guest answers nobody; what needs it waits until it runs again
        awake = state is not None and state.state is RunState.RUNNING
        draft.bring(guest, memory=awake, guest_answers=awake)
    draft.disturb(mended)
    return draft.plan(request_id)


def plan_lift(snapshot: HostSnapshot, guest: GuestId, request_id: RequestId) -> Plan:
    """Steps that take our hand off a guest: no cap, default shares, free to run anywhere.

    Pins go back to the operator's where the definition has them. Memory and vCPUs stay.
    """
    state = snapshot.guests.get(guest)
    steps: list[Step] = []
    if state is not None and state.active:
        everywhere = snapshot.topology.cpus
        step = _Stepper(state, everywhere)
        pins = {
            v: CpuSet(state.config_pins.get(v, everywhere) & everywhere) or everywhere
            for v in range(state.vcpus_online)
        }
        steps += [pin for v, cpus in pins.items() if (pin := step.pin(v, cpus))]
        steps += step.quota(UNCAPPED) + step.shares(DEFAULT_SHARES) + step.emulator(everywhere)
    orders = {guest: ()} if held_order(snapshot, guest) else {}
    return Plan(request_id, snapshot.generation, tuple(steps), dict(orders))


def held_order(snapshot: HostSnapshot, guest: GuestId) -> tuple[int, ...]:
    """The pCPU order that the books have for a guest."""
    holding = snapshot.books.holdings.get(guest)
    return holding.order if holding else ()


def _held(snapshot: HostSnapshot) -> dict[GuestId, Amounts]:
    return {g: h.amounts for g, h in snapshot.books.holdings.items()}


@dataclass
class _Draft:
    """Steps of a plan under construction, by phase."""

    snapshot: HostSnapshot
    amounts: Mapping[GuestId, Amounts]
    layout: Layout
    deadline_s: float
    memory_in: list[Step] = field(default_factory=list)
    memory_out: list[Step] = field(default_factory=list)
    plugs: list[Step] = field(default_factory=list)
    caps_down: list[Step] = field(default_factory=list)
    pins: list[PinVcpu] = field(default_factory=list)
    new_pins: list[Step] = field(default_factory=list)
    caps_up: list[Step] = field(default_factory=list)
    rest: list[Step] = field(default_factory=list)
    unplugs: list[Step] = field(default_factory=list)

    def bring(self, guest: GuestId, *, memory: bool, guest_answers: bool = True) -> None:
        """Everything that one guest needs to become as intended."""
        state = self.snapshot.guests.get(guest)
        if state is None or not state.active or not state.managed:
            return
        intended = intended_state(self.snapshot, self.amounts, self.layout, guest)
        step = _Stepper(state, self.snapshot.topology.cpus, self.deadline_s)
        if guest_answers:
            self._memory(step, intended, due=memory)
            self._vcpus(step, intended)
        quota = step.quota(intended.quota)
        (self.caps_down if _shrinks(quota) else self.caps_up).extend(quota)
        self._pins(step, intended.pins, plugged=guest_answers)
        self.rest += step.shares(intended.shares)
        self.rest += step.emulator(intended.emulator) + step.nodeset(intended.nodes)

    def _memory(self, step: _Stepper, intended: Intended, *, due: bool) -> None:
        if intended.memory and (due or memory_differs(intended, step.state)):
            for change in step.memory(intended.memory):
                (self.memory_in if change.after < change.before else self.memory_out).append(change)

    def _vcpus(self, step: _Stepper, intended: Intended) -> None:
        if intended.vcpus > step.state.vcpus_online:
            self.plugs.append(step.vcpus(intended.vcpus, optional=False))
        elif intended.vcpus < step.state.vcpus_online and step.state.vcpu_unplug:
            self.unplugs.append(step.vcpus(intended.vcpus, optional=True))

    def _pins(self, step: _Stepper, pins: Mapping[int, CpuSet], *, plugged: bool = False) -> None:
        for vcpu, cpus in pins.items():
            if vcpu >= step.state.vcpus_online:
                if plugged:
                    self.new_pins.append(step.new_pin(vcpu, cpus))
            elif pin := step.pin(vcpu, cpus):
                self.pins.append(pin)

    def disturb(self, done: Collection[GuestId]) -> None:
        """New pins for everyone else whom the new layout concerns."""
        pool, housekeeping = present_layout(self.snapshot)
        same_pool = pool == self.layout.pool
        same_housekeeping = housekeeping == self.layout.housekeeping
        for guest in sorted(self.amounts):
            order = self.layout.orders.get(guest, ())
            if guest in done:
                continue
            moved = order != held_order(self.snapshot, guest)
            if moved or not same_housekeeping or not (same_pool or order):
                self._disturb_one(guest)

    def _disturb_one(self, guest: GuestId) -> None:
        state = self.snapshot.guests.get(guest)
        if state is None or not state.active or not state.managed:
            return
        step = _Stepper(state, self.snapshot.topology.cpus, self.deadline_s)
        order = self.layout.orders.get(guest, ())
        self._pins(step, intended_pins(state, order, self.layout.pool, state.vcpus_online))
        self.rest += step.emulator(self.layout.housekeeping)
        if nodes := self.layout.nodes.get(guest):
            self.rest += step.nodeset(nodes)

    def plan(self, request: RequestId) -> Plan:
        """All phases in order."""
        steps = (
            *self.memory_in, *self.memory_out, *self.plugs, *self.caps_down,
            *order_pins(self.pins, self.layout.orders), *self.new_pins, *self.caps_up, *self.rest,
            *self.unplugs,
        )  # fmt: skip
        # a guest that is dedicated no more gives its order back
        orders: dict[GuestId, tuple[int, ...]] = {
            g: () for g, h in self.snapshot.books.holdings.items() if h.order
        }
        return Plan(
            request, self.snapshot.generation, steps, orders | self.layout.orders,
            self.layout.offers,
        )  # fmt: skip


def order_pins(pins: list[PinVcpu], dedicated: Collection[GuestId]) -> list[PinVcpu]:
    """Leavers before newcomers: narrowing pins, then moves, then widening pins.

    Among moves, who leaves a pCPU goes before who comes to it; a ring of moves has no such order
    and is cut at its first member.
    """
    narrowing: list[PinVcpu] = []
    moving: list[PinVcpu] = []
    widening: list[PinVcpu] = []
    for pin in pins:
        if len(pin.after) < len(pin.before) and pin.after <= pin.before:
            narrowing.append(pin)
        elif pin.before <= pin.after:
            widening.append(pin)
        else:
            moving.append(pin)
    # the pool withdraws before a dedicated vCPU settles on what it left
    narrowing.sort(key=lambda pin: (pin.guest in dedicated, len(pin.after)))
    return narrowing + _order_moves(moving) + widening


def _order_moves(pins: list[PinVcpu]) -> list[PinVcpu]:
    groups: dict[tuple[CpuSet, CpuSet], list[PinVcpu]] = {}
    for pin in pins:
        groups.setdefault((pin.before, pin.after), []).append(pin)
    leaving: dict[int, set[int]] = {}
    keys = list(groups)
    for index, (before, after) in enumerate(keys):
        for cpu in before - after:
            leaving.setdefault(cpu, set()).add(index)
    waits_for = [
        {other for cpu in after - before for other in leaving.get(cpu, ())} - {index}
        for index, (before, after) in enumerate(keys)
    ]
    done: list[int] = []
    left = dict.fromkeys(range(len(keys)))
    while left:
        ready = [i for i in left if waits_for[i].isdisjoint(left)] or [_on_ring(waits_for, left)]
        for index in ready:
            del left[index]
        done += ready
    return [pin for index in done for pin in groups[keys[index]]]


def _on_ring(waits_for: list[set[int]], left: Collection[int]) -> int:
    """A member of a ring, found by following who waits for whom."""
    index = min(left)
    seen: set[int] = set()
    while index not in seen:
        seen.add(index)
        index = min(waits_for[index].intersection(left))
    return index


def _shrinks(quota: Iterable[SetQuota]) -> bool:
    return any(q.before == UNCAPPED or UNCAPPED < q.after < q.before for q in quota)


@dataclass(frozen=True, slots=True)
class _Stepper:
    """Makes steps for one guest from what was found; a step that changes nothing is not made."""

    state: GuestState
    everywhere: CpuSet
    deadline_s: float = DEADLINE_S

    def pin(self, vcpu: int, after: CpuSet) -> PinVcpu | None:
        """Of a plugged vCPU."""
        before = self.state.vcpu_affinity.get(vcpu) or self.everywhere
        if not after or before == after:
            return None
        return PinVcpu(
            guest=self.state.uuid, name=self.state.name, vcpu=vcpu, before=before, after=after
        )

    def new_pin(self, vcpu: int, after: CpuSet) -> PinVcpu:
        """Of a vCPU that an earlier step plugs: undoing that takes the pin along."""
        return PinVcpu(
            guest=self.state.uuid, name=self.state.name, vcpu=vcpu, before=after, after=after
        )

    def quota(self, after: int) -> list[SetQuota]:
        """The cap of the whole guest."""
        before = quota_of(self.state)
        if before == after:
            return []
        return [SetQuota(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def shares(self, after: int) -> list[Step]:
        """Its weight."""
        before = shares_of(self.state)
        if before == after:
            return []
        return [SetShares(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def emulator(self, after: CpuSet) -> list[Step]:
        """Its emulator threads."""
        before = self.state.emulator_affinity or self.everywhere
        if not after or before == after:
            return []
        return [
            PinEmulator(guest=self.state.uuid, name=self.state.name, before=before, after=after)
        ]

    def nodeset(self, after: CpuSet) -> list[Step]:
        """Nodes of a movable guest's memory."""
        before = self.state.numa_nodes
        if not after or not before or before == after:
            return []
        return [SetNodeset(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def vcpus(self, after: int, *, optional: bool) -> SetVcpuCount:
        """Plug, or unplug where the guest lets go."""
        return SetVcpuCount(
            guest=self.state.uuid, name=self.state.name, optional=optional,
            before=self.state.vcpus_online, after=after, deadline_s=self.deadline_s,
        )  # fmt: skip

    def memory(self, after: int) -> list[ResizeVirtioMem | SetBalloon]:
        """Bring the guest's memory to `after` bytes."""
        match self.state.mechanism:
            case MemoryMechanism.VIRTIO_MEM:
                return self._virtio_mem(after)
            case MemoryMechanism.BALLOON if after != self.state.memory_current:
                return [
                    SetBalloon(
                        guest=self.state.uuid, name=self.state.name,
                        before=int(self.state.memory_current), after=after,
                        deadline_s=self.deadline_s,
                    )
                ]  # fmt: skip
            case _:
                return []

    def _virtio_mem(self, after: int) -> list[ResizeVirtioMem | SetBalloon]:
        sizes = spread_virtio_mem(self.state.virtio_mem, after - int(self.state.boot_memory))
        return [
            ResizeVirtioMem(
                guest=self.state.uuid, name=self.state.name, alias=device.alias,
                before=int(device.requested), after=size, deadline_s=self.deadline_s,
            )
            for device, size in zip(self.state.virtio_mem, sizes, strict=True)
            if size != device.requested
        ]  # fmt: skip


def spread_virtio_mem(devices: tuple[VirtioMem, ...], total: int) -> list[int]:
    """What to request of each device so that they make `total` bytes together.

    The last device shrinks first, the first grows first, in whole blocks: a guest never gets more
    than `total` by growing nor less by shrinking; less than a block is inside the tolerance.
    """
    sizes = [int(d.requested) for d in devices]
    change = total - sum(sizes)
    indexes = range(len(devices)) if change > 0 else reversed(range(len(devices)))
    for index in indexes:
        room = int(devices[index].size) - sizes[index] if change > 0 else sizes[index]
        block = int(devices[index].block) or 1
        part = min(abs(change), room) // block * block
        sizes[index] += part if change > 0 else -part
        change -= part if change > 0 else -part
    return sizes
