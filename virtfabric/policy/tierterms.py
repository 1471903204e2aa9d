"""Terms: whether a guest can have memory of tier `cxl` at all, and how much it can be plugged.

Owns the rules for one guest: movable or tiered, its functions, its policy, its free slots. Which
node the memory comes from is for `farmemory`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import CXL_KEY, Tier
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism, NumaMode
from virtfabric.model.policy import Growth
from virtfabric.model.units import MIB, CpuSet
from virtfabric.policy.deviceterms import spare_ports
from virtfabric.policy.stock import functions_of
from virtfabric.policy.tiers import device_nodes, is_returnable, node_rooms, part_of

if TYPE_CHECKING:
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot

NEW_BLOCK: Final = 2 * MIB
"""Bytes; the block size of a virtio-mem device that this agent makes."""


DIMM_BLOCK: Final = 128 * MIB
"""Bytes; Linux brings memory online by no less on x86-64 (SECTION_SIZE_BITS)."""


def grows_by_dimm(guest: GuestState) -> bool:
    """Whether its policy asks for DIMMs where a device has to be plugged."""
    return guest.policy is not None and guest.policy.memory.growth is Growth.DIMM


def may_have(guest: GuestState, tier: Tier) -> bool:
    """Whether its policy lets it have memory of the tier."""
    return guest.policy is not None and tier in guest.policy.memory.tiers


def has_functions(guest: GuestState, snapshot: HostSnapshot) -> bool:
    """Whether functions pin its memory, or are on their way to it."""
    holding = snapshot.books.holdings.get(guest.uuid)
    named = holding.named if holding else ()
    return bool(guest.devices or named or functions_of(snapshot, guest.uuid))


def open_nodes(guest: GuestState, snapshot: HostSnapshot, *, pinned: bool) -> CpuSet:
    """CXL nodes that the guest may have memory on; `pinned` where it has functions, or gets some.

    None that could not be taken back any more then.
    """
    managed = snapshot.topology.cxl_nodes & snapshot.capacity.cxl.keys()
    return CpuSet(n for n in managed if not (pinned and is_returnable(snapshot, n)))


def new_nodes(guest: GuestState, nodes: CpuSet) -> CpuSet:
    """Of these, the ones that a device can come to; a virtio-mem device can grow, so one each."""
    if grows_by_dimm(guest):
        return nodes
    taken = {n for device in guest.virtio_mem for n in device_nodes(guest, device)}
    return CpuSet(nodes - taken)


def new_page(guest: GuestState, snapshot: HostSnapshot) -> int:
    """Bytes of the huge pages that back a device that comes; 0 for small ones."""
    return int(snapshot.topology.page_of(guest.memory_room.page))


def new_block(guest: GuestState, snapshot: HostSnapshot) -> int:
    """By what a device that comes is sized: QEMU takes no block that is smaller than its pages."""
    least = DIMM_BLOCK if grows_by_dimm(guest) else NEW_BLOCK
    return max(least, new_page(guest, snapshot))


def addable(guest: GuestState, snapshot: HostSnapshot) -> int:
    """Bytes of CXL memory that devices could hold which the guest does not have yet."""
    if not guest.active or why_no_device(guest, snapshot):
        return 0
    nodes = open_nodes(guest, snapshot, pinned=has_functions(guest, snapshot))
    there = sum(int(snapshot.capacity.cxl[n]) for n in new_nodes(guest, nodes))
    block = new_block(guest, snapshot)
    return min(there, int(guest.memory_room.size)) // block * block


def why_no_device(guest: GuestState, snapshot: HostSnapshot, *, ports: int | None = None) -> str:
    """Why no memory device can be attached to it now, with the remedy; empty if one can.

    Args:
        guest: a running one.
        snapshot: for ports that are promised to functions.
        ports: how many are free; None for what the snapshot says.
    """
    room = guest.memory_room
    if guest.numa_mode is not NumaMode.STRICT:
        return (
            "it has no <numatune><memory mode='strict' nodeset='...'/>, so nothing would hold the "
            "device to its node; give it one and start it anew"
        )
    if room.cell is None:
        return "it has no <numa> cell; give it one and <maxMemory>, and start it anew"
    if guest.mechanism is MemoryMechanism.BALLOON and guest.memory_current < guest.boot_memory:
        return "its balloon holds memory, and one mechanism is enough; deflate it first"
    if room.slots <= 0 or room.size < new_block(guest, snapshot):
        return f"<maxMemory> leaves {room.slots} slots and {room.size}; raise it and start it anew"
    if grows_by_dimm(guest):
        return ""  # it is no PCIe device
    if (spare_ports(guest, snapshot) if ports is None else ports) <= 0:
        return (
            f"it has no free PCIe root port: virtfabric ports add {guest.name} --count 1 gives it "
            "one at its next start"
        )
    return ""


def check_far_taker(guest: GuestState, snapshot: HostSnapshot, *, asks: bool) -> Refusal | None:
    """Why a guest cannot be given any CXL memory, whatever there is of it; None when it can.

    Args:
        guest: a running, managed one.
        snapshot: the host.
        asks: whether the same request wants a function for it.
    """
    name = guest.name
    if not snapshot.topology.cxl_nodes & snapshot.capacity.cxl.keys():
        detail = f"tier: the host has no memory of tier {Tier.CXL} to grant ({_why_none(snapshot)})"
        return Refusal(Reason.UNKNOWN_TIER, detail)
    if not may_have(guest, Tier.CXL):
        allowed = ",".join(guest.policy.memory.tiers if guest.policy else ())
        detail = (
            f'tier: the policy of {name} allows it memory of tiers="{allowed}"; '
            f"virtfabric policy set {name} --tiers dram,cxl allows CXL memory"
        )
        return Refusal(Reason.NOT_ALLOWED, detail)
    if guest.numa_mode not in (NumaMode.STRICT, None):
        return Refusal(Reason.NO_MECHANISM, _why_not_tiered(guest))
    pinned = asks or has_functions(guest, snapshot)
    nodes = open_nodes(guest, snapshot, pinned=pinned)
    if not nodes:
        return Refusal(Reason.STRANDS_MEMORY, _why_stranded(guest, asks=asks))
    part = part_of(guest, CXL_KEY, snapshot.topology.cxl_nodes)
    if not any(device_nodes(guest, d) & nodes for d in part.devices):
        why = why_no_device(guest, snapshot)
        if why:
            detail = f"{name} has no memory device on a CXL node and can be given none: {why}"
            return Refusal(Reason.NO_MECHANISM, detail)
    return None


def _why_none(snapshot: HostSnapshot) -> str:
    kept = snapshot.topology.cxl_nodes & snapshot.capacity.withheld.keys()
    if kept:
        return "; ".join(f"node {n}: {snapshot.capacity.withheld[n]}" for n in sorted(kept))
    return "no node that a CXL region became is in [capacity] memory"


def _why_not_tiered(guest: GuestState) -> str:
    mode = guest.numa_mode
    kind = "movable" if mode is NumaMode.RESTRICTIVE else "not tiered"
    because = (
        "its memory is pulled whole from node to node, and libvirt drops the node of a single "
        "memory device"
        if mode is NumaMode.RESTRICTIVE
        else "its memory may lie on other nodes than it names"
    )
    return (
        f"tier: {guest.name} is {kind} (<numatune><memory mode='{mode}'>): {because}; a guest is "
        "movable or tiered, never both: set mode='strict' with virsh edit and start it anew"
    )


def _why_stranded(guest: GuestState, *, asks: bool) -> str:
    has = "asks for a function as well, which" if asks else "has a PCIe function, which"
    return (
        f"tier: {guest.name} {has} pins all of its memory, and every CXL node here can be taken "
        "back: pinned pages would silently move to another node, or keep the node for ever; give "
        "it DRAM, or take its functions away first"
    )


def reachable(guest: GuestState, snapshot: HostSnapshot) -> int:
    """Bytes of free CXL memory that the guest can be given: on a node it has a device on, or gets.

    Whole blocks of each device; what others give up first is not in it.
    """
    rooms = node_rooms(snapshot)
    nodes = open_nodes(guest, snapshot, pinned=has_functions(guest, snapshot))
    part = part_of(guest, CXL_KEY, snapshot.topology.cxl_nodes)
    total = 0
    for device in part.devices:
        own = device_nodes(guest, device) & nodes
        room = max((rooms.get(n, 0) for n in own), default=0)
        block = int(device.block) or NEW_BLOCK
        total += max(0, min(room, int(device.size) - int(device.requested))) // block * block
    if why_no_device(guest, snapshot):
        return total
    count = guest.memory_room.slots
    if not grows_by_dimm(guest):
        count = min(count, spare_ports(guest, snapshot))
    free = sorted((max(0, rooms.get(n, 0)) for n in new_nodes(guest, nodes)), reverse=True)
    block = new_block(guest, snapshot)
    more = sum(room // block * block for room in free[:count])
    return total + min(more, int(guest.memory_room.size) // block * block)
