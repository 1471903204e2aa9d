"""Far memory: which CXL node a guest's memory of that tier comes from, and by which device.

Owns the choice of nodes, after the arbiter has chosen amounts: what shrinks gives first, then each
guest that grows takes the best of what the nodes have by then. A device of its own on a node is
resized; where it has none, one is attached, which costs a root port and a memory slot. It must not
look at DRAM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import CXL_KEY, Amounts, Tier
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.plan import Offer, ResizeVirtioMem
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.policy.deviceterms import spare_ports
from virtfabric.policy.nearness import far_from
from virtfabric.policy.sources import giving_order
from virtfabric.policy.standing import held_of
from virtfabric.policy.stepper import Stepper
from virtfabric.policy.stock import device_amounts
from virtfabric.policy.tiers import device_nodes, node_key, node_rooms, part_of, used_nodes
from virtfabric.policy.tierterms import (
    NEW_BLOCK,
    grows_by_dimm,
    has_functions,
    new_block,
    new_nodes,
    new_page,
    open_nodes,
    why_no_device,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory

    FarStep = ResizeVirtioMem | AttachMemory | DetachMemory | AttachDimm


@dataclass(frozen=True, slots=True)
class FarMemory:
    """How CXL memory moves.

    Attributes:
        steps: of each guest whose CXL memory changes.
        needs: what is taken of each node, beyond what is given there (`Plan.node_needs`).
    """

    steps: dict[GuestId, tuple[FarStep, ...]] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()
    needs: Amounts = Amounts()


class Spot(NamedTuple):
    """A node that a guest could grow on; the lowest cost wins.

    Attributes:
        cost: (bytes that it lacks of the whole need, whether a device has to be attached, distance
            from the guest's CPUs, less the bytes free on the node, node).
        room: bytes, in whole blocks, that the guest can get there.
        device: None where one has to be attached.
    """

    cost: tuple[int, ...]
    node: int
    room: int
    device: VirtioMem | None


def choose_far_memory(
    snapshot: HostSnapshot,
    amounts: Mapping[GuestId, Amounts],
    guests: Iterable[GuestId],
    *,
    deadline_s: float,
) -> FarMemory | Refusal:
    """Steps that bring guests to the CXL memory that they hold afterwards.

    Args:
        snapshot: the host.
        amounts: what each guest holds afterwards.
        guests: those whose amounts change, in the order in which they choose; the first one is
            who the decision is about.
        deadline_s: for each step.

    Returns:
        `NO_PLACEMENT` where the tier has enough, but not on nodes that the first guest can use.
        What comes home to others is placed as far as it goes, and what the first one lacks already
        is no reason to keep it from giving; the rest is drift, mended later.
    """
    deal = _Deal(snapshot, amounts, deadline_s)
    order = list(guests)
    lacking = deal.carry_out(order)
    before = held_of(snapshot, order[0])[CXL_KEY]
    if order[0] in lacking and amounts[order[0]][CXL_KEY] > before:
        return lacking[order[0]]
    return deal.finish()


def mend_far_memory(
    snapshot: HostSnapshot,
    amounts: Mapping[GuestId, Amounts],
    guests: Iterable[GuestId],
    *,
    deadline_s: float,
) -> FarMemory:
    """As `choose_far_memory`, as far as it goes: what is amiss with one must not keep another."""
    deal = _Deal(snapshot, amounts, deadline_s)
    deal.carry_out(guests)
    return deal.finish()


class _Deal:
    """What is left of each node while memory changes hands."""

    def __init__(
        self, snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts], deadline_s: float
    ) -> None:
        self.snapshot = snapshot
        self.amounts = amounts
        self.deadline_s = deadline_s
        self.rooms = node_rooms(snapshot)
        self.steps: dict[GuestId, list[FarStep]] = {}
        self.offers: list[Offer] = []
        self.moved: dict[int, int] = {}

    def carry_out(self, guests: Iterable[GuestId]) -> dict[GuestId, Refusal]:
        """Shrink, then grow; refusals of those that could not grow as they should."""
        if not self.snapshot.topology.cxl_nodes:
            return {}
        found = (self.snapshot.guests.get(guest) for guest in guests)
        states = [state for state in found if state is not None and state.managed]
        changes = [(state, by) for state in states if state.active and (by := self._due(state))]
        for state, by in changes:
            if by < 0:
                self._shrink(state, -by)
        if self.snapshot.recall.detach:
            for state in (one for one in states if one.active):
                self._let_go(state)
        refusals = {state.uuid: self._grow(state, by) for state, by in changes if by > 0}
        refusals |= {state.uuid: self._start(state) for state in states if not state.active}
        return {guest: refusal for guest, refusal in refusals.items() if refusal is not None}

    def _start(self, state: GuestState) -> Refusal | None:
        """A guest that starts brings its devices along: each of its nodes must have room."""
        if state.uuid in self.snapshot.books.holdings:
            return None  # counted already
        for node, size in sorted(used_nodes(state).items()):
            if node not in self.rooms:
                continue
            if size > self.rooms[node]:
                free = self._describe_room(node)
                detail = f"{state.name}: needs {Bytes(size)} of CXL memory, but {free}"
                return Refusal(Reason.NO_CAPACITY, detail)
            self._move(CpuSet((node,)), size)
        return None

    def _due(self, state: GuestState) -> int:
        """Bytes by which what is requested of its devices is off."""
        after = self.amounts.get(state.uuid)
        if after is None:
            return 0
        part = part_of(state, CXL_KEY, self.snapshot.topology.cxl_nodes)
        return max(0, after[CXL_KEY] - part.boot) - sum(int(d.requested) for d in part.devices)

    # -- less -----------------------------------------------------------------------------------

    def _shrink(self, state: GuestState, by: int) -> None:
        """What is withheld gives first, then the farthest: what stays is sound and near."""
        step = self._stepper(state)
        part = part_of(state, CXL_KEY, self.snapshot.topology.cxl_nodes)
        least = self.snapshot.recall.least_of(state.uuid)
        for device in giving_order(state, part.devices, self.snapshot, self.rooms):
            block = int(device.block) or NEW_BLOCK
            room = max(0, int(device.requested) - least.get(device.alias, 0))
            gift = min(by, room) // block * block
            if gift:
                by -= gift
                self._move(device_nodes(state, device), -gift)
                self._add(step.resize(device, int(device.requested) - gift, Tier.CXL))

    def _let_go(self, state: GuestState) -> None:
        """Devices on nodes that are called home leave the guest when they are empty."""
        part = part_of(state, CXL_KEY, self.snapshot.topology.cxl_nodes)
        steps = self.steps.get(state.uuid, [])
        after = {step.alias: step.after for step in steps if isinstance(step, ResizeVirtioMem)}
        for device in part.devices:
            nodes = device_nodes(state, device)
            if nodes & self.snapshot.recall.nodes and not after.get(
                device.alias, int(device.requested)
            ):
                page = self.snapshot.topology.page_of(device.page)
                self._add(self._stepper(state).detach_memory(device, min(nodes), page))

    # -- more -----------------------------------------------------------------------------------

    def _grow(self, state: GuestState, by: int) -> Refusal | None:
        budget = _Budget.of(state, self.snapshot, self.amounts[state.uuid])
        step, need, used = self._stepper(state), by, set[int]()
        while need > 0:
            spots = [s for s in self._spots(state, need, budget) if s.node not in used]
            if not spots:
                return self._nowhere(state, by, by - need)
            best = spots[0]
            part = min(need, best.room)
            self._tell(state, spots, need)
            self._add(self._step(step, best, part, need - part, budget))
            self._move(CpuSet((best.node,)), part)
            used.add(best.node)
            need -= part
        return None

    def _spots(self, state: GuestState, need: int, budget: _Budget) -> list[Spot]:
        """Where it can grow, best first; none that could not give a block."""
        nodes = open_nodes(state, self.snapshot, pinned=budget.pinned)
        cxl = self.snapshot.topology.cxl_nodes
        found = []
        for device in part_of(state, CXL_KEY, cxl).devices:
            node = min(device_nodes(state, device))
            block = int(device.block) or NEW_BLOCK
            room = min(self.rooms.get(node, 0), int(device.size) - int(device.requested))
            if node in nodes and room >= block:
                found.append(self._spot(state, node, room // block * block, need, device))
        block = new_block(state, self.snapshot)
        for node in new_nodes(state, nodes) if budget.devices > 0 else ():
            room = min(self.rooms.get(node, 0), budget.size, need)
            if room >= block:
                found.append(self._spot(state, node, room // block * block, need, None))
        return sorted(found, key=lambda spot: spot.cost)

    def _spot(
        self, state: GuestState, node: int, room: int, need: int, device: VirtioMem | None
    ) -> Spot:
        far, free = far_from(self.snapshot, state.uuid, node), self.rooms[node]
        cost = (max(0, need - room), int(device is None), far, -free, node)
        return Spot(cost, node, room, device)

    def _step(self, step: Stepper, spot: Spot, part: int, rest: int, budget: _Budget) -> FarStep:
        """A new device is as large as can be, so that it can grow later; `rest` needs another."""
        device = spot.device
        if device is not None:
            return step.resize(device, int(device.requested) + part, Tier.CXL)
        there = int(self.snapshot.capacity.cxl[spot.node])
        block = new_block(step.state, self.snapshot)
        size = max(part, min(there, budget.size - rest) // block * block)
        page = new_page(step.state, self.snapshot)
        budget.devices -= 1
        if grows_by_dimm(step.state):
            budget.size -= part
            return step.attach_dimm(spot.node, part, page)
        budget.size -= size
        return step.attach_memory(spot.node, size, block, part, page)

    def _tell(self, state: GuestState, spots: list[Spot], need: int) -> None:
        for spot in spots:
            chosen = spot is spots[0]
            self.offers.append(Offer(state.uuid, (), spot.cost, self._why(spot, need), chosen))

    def _why(self, spot: Spot, need: int) -> str:
        how = f"resizes {spot.device.alias}" if spot.device else "a device is attached"
        free = Bytes(self.rooms[spot.node])
        text = f"CXL node {spot.node}: {free} free, {spot.cost[2]} from its CPUs; {how}"
        if spot.room < need:
            text += f"; has {Bytes(spot.room)} of {Bytes(need)} for it"
        return text

    def _nowhere(self, state: GuestState, by: int, placed: int) -> Refusal:
        rooms = [self._describe_room(node) for node in sorted(self.rooms)]
        why = why_no_device(state, self.snapshot)
        new = f"; no further device can be attached: {why}" if why else ""
        detail = (
            f"{state.name}: CXL memory: {Bytes(placed)} of {Bytes(by)} can be placed on nodes that "
            f"it can use ({', '.join(rooms)}){new}"
        )
        return Refusal(Reason.NO_PLACEMENT, detail, {str(CXL_KEY): placed})

    def _describe_room(self, node: int) -> str:
        why = self.snapshot.capacity.withheld.get(node)
        room = Bytes(max(0, self.rooms[node]))
        return f"node {node} has {room} free" + (f" ({why})" if why else "")

    # -- both -----------------------------------------------------------------------------------

    def _stepper(self, state: GuestState) -> Stepper:
        return Stepper(state, self.snapshot.topology.cpus, self.deadline_s)

    def _add(self, step: FarStep) -> None:
        self.steps.setdefault(step.guest, []).append(step)

    def _move(self, nodes: CpuSet, by: int) -> None:
        node = min(nodes)
        self.rooms[node] = self.rooms.get(node, 0) - by
        self.moved[node] = self.moved.get(node, 0) + by

    def finish(self) -> FarMemory:
        """What came of it."""
        needs = Amounts({node_key(n): by for n, by in self.moved.items()}).positive()
        steps = {guest: tuple(steps) for guest, steps in self.steps.items()}
        return FarMemory(steps, tuple(self.offers), needs)


@dataclass
class _Budget:
    """What a guest can still be attached.

    Attributes:
        devices: by ports and slots; functions that come with the same plan have theirs already.
        size: bytes up to its `<maxMemory>`.
        pinned: whether functions pin its memory then.
    """

    devices: int
    size: int
    pinned: bool

    @classmethod
    def of(cls, state: GuestState, snapshot: HostSnapshot, after: Amounts) -> _Budget:
        """Of a guest that holds so much afterwards."""
        holding = snapshot.books.holdings.get(state.uuid)
        wanted = sum(device_amounts(after).values())
        held = sum(device_amounts(holding.amounts).values()) if holding else 0
        ports = spare_ports(state, snapshot) - max(0, wanted - held)
        room = state.memory_room
        able = not why_no_device(state, snapshot, ports=ports)
        pinned = wanted > 0 or has_functions(state, snapshot)
        most = room.slots if grows_by_dimm(state) else min(room.slots, ports)
        return cls(most if able else 0, int(room.size), pinned)
