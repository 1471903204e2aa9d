"""Plans that make a CXL region or take one down: snapshot and inventory -> steps, or why not. Pure.

Whether the decoders can do it is for `regions`; what guests have there is looked at here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfabric.model.cxl import MemoryState
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.device import OUR_ALIAS
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.plan import Plan
from virtfabric.model.units import Bytes
from virtfabric.policy.regions import check_region, order_members
from virtfabric.policy.stepper import Stepper
from virtfabric.policy.tiers import bytes_on, device_nodes, node_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.cxl import CxlInventory, HostMemory, Region, Serial, Window
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.memorysteps import DetachMemory

_GRANULARITY = 256
"""Bytes, where the window has none of its own: what `cxl create-region` takes as well."""


@dataclass(frozen=True, slots=True)
class RegionWish:
    """A region that somebody wants.

    Attributes:
        window: its base (`0x1000000000`) or the kernel's name of it.
        members: memdevs; they are ordered as the window's host bridges take turns.
        size: bytes of the whole; None for all that the smallest member has, of each.
        granularity: None for the window's.
        use: movable or normal.
    """

    window: str
    members: tuple[Serial, ...]
    size: int | None = None
    granularity: int | None = None
    use: MemoryUse = MemoryUse.MOVABLE


def plan_region(
    memory: HostMemory, wish: RegionWish, request: RequestId, generation: int
) -> Plan | Refusal:
    """Make a region and bring its memory online."""
    cxl = memory.cxl
    window = _find_window(cxl, wish.window)
    if window is None:
        known = ", ".join(f"{w.base:#x} ({w.name})" for w in cxl.windows) or "none"
        return Refusal(Reason.UNKNOWN_ID, f"there is no window {wish.window}; there are: {known}")
    members = order_members(cxl, window, wish.members) if window.targets else wish.members
    granularity = wish.granularity or window.granularity or _GRANULARITY
    size = wish.size or _whole(cxl, members)
    refusal = check_region(cxl, window.base, members, size, granularity)
    if refusal is not None:
        return refusal
    create = CreateRegion(
        window=window.base, members=members, size=size, granularity=granularity,
        before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
    )  # fmt: skip
    online = OnlineMemory(
        window=window.base, members=members, before=MemoryUse.OFFLINE, after=wish.use
    )
    return Plan(request, generation, (create, online))


def _find_window(cxl: CxlInventory, text: str) -> Window | None:
    return next((w for w in cxl.windows if text in (w.name, f"{w.base:#x}")), None)


def _whole(cxl: CxlInventory, members: tuple[Serial, ...]) -> int:
    shares = [int(cxl.usable[s].ram) for s in members if s in cxl.usable]
    # a member that is missing is refused by name, whatever the size
    return min(shares, default=0) * len(members)


def plan_region_end(
    snapshot: HostSnapshot, memory: HostMemory, region: Region, request: RequestId
) -> Plan | Refusal:
    """Take a region's memory offline and destroy it; refused while anybody has memory there.

    Devices that it attached for this memory leave their guests first, where those let them go.

    Args:
        snapshot: guests, freshly read, and what plans have reserved.
        memory: freshly read; `region` is of it.
        region: which one.
        request: whose plan it is.
    """
    window = next((w for w in memory.cxl.windows if w.name == region.window), None)
    members = tuple(serial for serial in region.members if serial is not None)
    refusal = _check_end(snapshot, memory, region)
    if refusal is not None:
        return refusal
    if window is None or not members or len(members) != len(region.members):
        detail = f"{region.name}: its window or its members are not known"
        return Refusal(Reason.UNKNOWN_ID, detail)
    offline = OnlineMemory(
        window=window.base, members=members, before=MemoryUse.MOVABLE, after=MemoryUse.OFFLINE
    )
    destroy = CreateRegion(
        window=window.base, members=members, size=int(region.size),
        granularity=region.granularity or _GRANULARITY,
        before=RegionPresence.PRESENT, after=RegionPresence.ABSENT,
    )  # fmt: skip
    steps = (offline, destroy) if _is_online(region) else (destroy,)
    return Plan(request, snapshot.generation, (*_let_go(snapshot, region), *steps))


def _let_go(snapshot: HostSnapshot, region: Region) -> Iterator[DetachMemory]:
    """Its nodes' empty devices: the kernel binds what they map to other nodes when theirs goes."""
    for state in sorted(snapshot.guests.values(), key=lambda guest: guest.name):
        if not (state.managed and state.active):
            continue
        for device in state.virtio_mem:
            (node, *more) = device_nodes(state, device) or (None,)
            if device.alias.startswith(OUR_ALIAS) and node in region.nodes and not more:
                page = snapshot.topology.page_of(device.page)
                stepper = Stepper(state, snapshot.topology.cpus)
                yield stepper.detach_memory(device, node, page)


def _check_end(snapshot: HostSnapshot, memory: HostMemory, region: Region) -> Refusal | None:
    if not region.ours:
        detail = f"{region.name} was made by hand, and is never changed; cxl destroy-region ends it"
        return Refusal(Reason.DEVICE_IN_USE, detail)
    for number in region.nodes:
        users = users_of_node(snapshot, number)
        if users:
            has = ", ".join(f"{name} has {Bytes(size)}" for name, size in sorted(users.items()))
            detail = f"{region.name} is the memory of node {number}, and guests use it: {has}"
            return Refusal(Reason.DEVICE_IN_USE, f"{detail}; take it away from them first")
        if snapshot.pending[node_key(number)] > 0:
            detail = f"{region.name}: a plan that runs gives a guest memory of node {number}"
            return Refusal(Reason.BUSY, detail)
        node = memory.nodes.get(number)
        if node is not None and _is_online(region) and not node.offlinable:
            detail = f"{region.name}: node {number} cannot go offline: {node.why_not_offlinable}"
            return Refusal(Reason.NO_MECHANISM, detail)
    return None


def _is_online(region: Region) -> bool:
    return any(dax.state in (MemoryState.ONLINE, MemoryState.PARTLY) for dax in region.dax)


def users_of_node(snapshot: HostSnapshot, node: int) -> dict[str, int]:
    """Bytes that guests have which may lie on a node, by name, unmanaged guests included.

    What is bound to several nodes counts in full: nobody says which part is where.
    """
    found = {
        guest.name: sum(bytes_on(guest, node)) for guest in snapshot.guests.values() if guest.active
    }
    return {name: size for name, size in found.items() if size}
