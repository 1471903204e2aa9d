"""Placement: from amounts to a plan, the exact ordered steps for one snapshot of the host.

Owns the order of steps: what needs a guest first (memory comes in before it goes out, vCPUs are
plugged), then what is certain, leavers before newcomers, then the mark of the pins, and last the
vCPUs that may be unplugged where the guest cooperates. It must not choose amounts (arbiter),
pCPUs (layout) or functions (functions); `policy.stepper` and `policy.functionsteps` make the
single steps.

Functions come after memory and vCPUs: these fail more often and their undo disturbs nobody, while
a detached function has interrupted its guest. All are detached before one is prepared, a movable
guest is pulled to its function's node before that pins its pages, and pins and caps follow. What
is given back to the host comes last of all, empty memory devices that leave their guest after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtfabric.model.amounts import MEMORY_KEY
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import RunState
from virtfabric.model.memorysteps import DetachMemory
from virtfabric.model.plan import PinVcpu, Plan, SetQuota
from virtfabric.model.policy import DEFAULT_SHARES
from virtfabric.model.units import CpuSet
from virtfabric.policy.farmemory import FarMemory, choose_far_memory, mend_far_memory
from virtfabric.policy.functionrepairs import choose_repairs, held_after
from virtfabric.policy.functions import choose_functions
from virtfabric.policy.functionsteps import FunctionSteps
from virtfabric.policy.hugepages import with_pages
from virtfabric.policy.intent import (
    UNCAPPED,
    intended_pins,
    intended_state,
    memory_differs,
)  # fmt: skip
from virtfabric.policy.layout import Layout, present_layout
from virtfabric.policy.layoutaround import choose_layout_around
from virtfabric.policy.reclaim import share_time
from virtfabric.policy.standing import held_of
from virtfabric.policy.stepper import DEADLINE_S, Stepper
from virtfabric.policy.tiers import part_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from virtfabric.model.amounts import Amounts
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.memorysteps import AttachDimm, AttachMemory
    from virtfabric.model.plan import ResizeVirtioMem, SetBalloon
    from virtfabric.model.step import Step
    from virtfabric.policy.functions import Allotment
    from virtfabric.policy.intent import Intended


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
    choosing = [decision.guest, *sorted(changed.keys() - {decision.guest})]
    allotment = choose_functions(snapshot, amounts, choosing)
    if isinstance(allotment, Refusal):
        return allotment
    far = choose_far_memory(snapshot, amounts, choosing, deadline_s=deadline_s)
    if isinstance(far, Refusal):
        return far
    layout = choose_layout_around(snapshot, amounts, allotment)
    if isinstance(layout, Refusal):
        return layout
    draft = _Draft(snapshot, amounts, layout, deadline_s, allotment, far)
    for guest in sorted({*changed, decision.guest}):
        before, after = held_of(snapshot, guest), amounts.get(guest)
        if after is not None:
            draft.bring(guest, memory=before[MEMORY_KEY] != after[MEMORY_KEY])
    draft.disturb({*changed, decision.guest})
    return with_pages(snapshot, draft.plan(decision.request), amounts)


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
    mended = set(amounts if guests is None else guests)
    allotment = choose_repairs(snapshot, mended)
    far = mend_far_memory(snapshot, amounts, sorted(mended), deadline_s=deadline_s)
    layout = choose_layout_around(snapshot, amounts, allotment)
    if isinstance(layout, Refusal):
        return layout
    draft = _Draft(snapshot, amounts, layout, deadline_s, allotment, far)
    for guest in sorted(mended & set(amounts)):
        state = snapshot.guests.get(guest)
        # a paused guest answers nobody; what needs it waits until it runs again
        awake = state is not None and state.state is RunState.RUNNING
        draft.bring(guest, memory=awake, guest_answers=awake)
    draft.disturb(mended)
    return with_pages(snapshot, draft.plan(request_id), amounts, mend=True)


def plan_lift(snapshot: HostSnapshot, guest: GuestId, request_id: RequestId) -> Plan:
    """Steps that take our hand off a guest: no cap, default shares, free to run anywhere.

    Pins go back to the operator's where the definition has them. Memory and vCPUs stay; its
    functions go back to the host.
    """
    state = snapshot.guests.get(guest)
    allotment = choose_functions(snapshot, {}, [guest])
    assert not isinstance(allotment, Refusal)  # nobody gains
    functions = FunctionSteps(snapshot, held_after(snapshot, allotment), DEADLINE_S)
    functions.carry_out(allotment)
    steps: list[Step] = [*functions.detaches]
    if state is not None and state.active:
        everywhere = snapshot.topology.cpus
        step = Stepper(state, everywhere)
        pins = {
            v: CpuSet(state.config_pins.get(v, everywhere) & everywhere) or everywhere
            for v in range(state.vcpus_online)
        }
        steps += [pin for v, cpus in pins.items() if (pin := step.pin(v, cpus))]
        steps += step.quota(UNCAPPED) + step.shares(DEFAULT_SHARES) + step.emulator(everywhere)
        steps += step.no_mark()
    orders = {guest: ()} if held_order(snapshot, guest) else {}
    return Plan(
        request_id, snapshot.generation, (*steps, *functions.returns, *functions.ends),
        dict(orders),
        functions=allotment.after, retired=allotment.retired,
    )  # fmt: skip


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
    allotment: Allotment
    far: FarMemory
    memory_in: list[Step] = field(default_factory=list)
    memory_out: list[Step] = field(default_factory=list)
    plugs: list[Step] = field(default_factory=list)
    caps_down: list[Step] = field(default_factory=list)
    pins: list[PinVcpu] = field(default_factory=list)
    new_pins: list[Step] = field(default_factory=list)
    caps_up: list[Step] = field(default_factory=list)
    rest: list[Step] = field(default_factory=list)
    pulls: list[Step] = field(default_factory=list)
    marks: list[Step] = field(default_factory=list)
    unplugs: list[Step] = field(default_factory=list)
    leaving: list[Step] = field(default_factory=list)

    def bring(self, guest: GuestId, *, memory: bool, guest_answers: bool = True) -> None:
        """Everything that one guest needs to become as intended."""
        state = self.snapshot.guests.get(guest)
        if state is None or not state.active or not state.managed:
            return
        intended = intended_state(self.snapshot, self.amounts, self.layout, guest)
        step = Stepper(state, self.snapshot.topology.cpus, self.deadline_s)
        if guest_answers:
            self._memory(step, intended, due=memory)
            self._vcpus(step, intended)
        quota = step.quota(intended.quota)
        (self.caps_down if _shrinks(quota) else self.caps_up).extend(quota)
        self._pins(step, intended.pins, plugged=guest_answers)
        self.rest += step.shares(intended.shares)
        self.rest += step.emulator(intended.emulator)
        pulls = self.pulls if guest in self.allotment.pulls else self.rest
        pulls += step.nodeset(intended.nodes)
        self._mark(step, intended.pins, intended.emulator, plugged=guest_answers)

    def _memory(self, step: Stepper, intended: Intended, *, due: bool) -> None:
        changes: list[ResizeVirtioMem | SetBalloon | AttachMemory | AttachDimm] = []
        if intended.memory and (due or memory_differs(intended, step.state)):
            near = part_of(step.state, MEMORY_KEY, intended.cxl_nodes)
            least = self.snapshot.recall.least_of(intended.guest)
            changes += step.memory(intended.memory, near, least)
        for change in self.far.steps.get(intended.guest, ()):
            if isinstance(change, DetachMemory):
                self.leaving.append(change)
            else:
                changes.append(change)
        self.memory_in += share_time([c for c in changes if c.after < c.before], self.deadline_s)
        self.memory_out += [c for c in changes if c.after >= c.before]

    def _vcpus(self, step: Stepper, intended: Intended) -> None:
        if intended.vcpus > step.state.vcpus_online:
            self.plugs.append(step.vcpus(intended.vcpus, optional=False))
        elif intended.vcpus < step.state.vcpus_online:
            self.unplugs.append(step.vcpus(intended.vcpus, optional=True))

    def _pins(self, step: Stepper, pins: Mapping[int, CpuSet], *, plugged: bool = False) -> None:
        for vcpu, cpus in pins.items():
            if vcpu >= step.state.vcpus_online:
                if plugged:
                    self.new_pins.append(step.new_pin(vcpu, cpus))
            elif pin := step.pin(vcpu, cpus):
                self.pins.append(pin)

    def _mark(
        self, step: Stepper, pins: Mapping[int, CpuSet], emulator: CpuSet, *, plugged: bool = False
    ) -> None:
        there = {v: c for v, c in pins.items() if plugged or v < step.state.vcpus_online}
        self.marks += step.mark(there, emulator)

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
        step = Stepper(state, self.snapshot.topology.cpus, self.deadline_s)
        order = self.layout.orders.get(guest, ())
        pins = intended_pins(state, order, self.layout.pool, state.vcpus_online)
        self._pins(step, pins)
        self.rest += step.emulator(self.layout.housekeeping)
        self._mark(step, pins, self.layout.housekeeping)
        if nodes := self.layout.nodes.get(guest):
            self.rest += step.nodeset(nodes)

    def plan(self, request: RequestId) -> Plan:
        """All phases in order."""
        functions = FunctionSteps(
            self.snapshot, held_after(self.snapshot, self.allotment), self.deadline_s
        )
        functions.carry_out(self.allotment)
        steps = (
            *self.memory_in, *self.memory_out, *self.plugs, *functions.detaches,
            *functions.prepares, *self.pulls, *functions.attaches, *self.caps_down,
            *order_pins(self.pins, self.layout.orders), *self.new_pins, *self.caps_up, *self.rest,
            *self.marks, *self.unplugs, *functions.returns, *self.leaving,
            *functions.ends,
        )  # fmt: skip
        # a guest that is dedicated no more gives its order back
        orders: dict[GuestId, tuple[int, ...]] = {
            g: () for g, h in self.snapshot.books.holdings.items() if h.order
        }
        changed = {
            g: order
            for g, order in (orders | self.layout.orders).items()
            if order != held_order(self.snapshot, g)
        }
        return Plan(
            request, self.snapshot.generation, steps, changed,
            (*self.far.offers, *self.allotment.offers, *self.layout.offers),
            self.allotment.after, self.allotment.retired, self.far.needs,
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
