"""Tiers: what of a guest's memory lies on which kind of node, and what is left of each CXL node.

Owns the reading of guests by tier, and the sums by node. How much a guest may have of a tier is
for `standing` to say, which node it comes from for `farmemory`.

Memory counts for tier `cxl` where every node that it is bound to is of that tier; anything else,
bound to nothing or to nodes of both, counts as DRAM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import CXL_KEY, MEMORY, MEMORY_KEY, Key, node_locality
from virtfabric.model.guest import FixedMemory, NumaMode
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.model.ledger import HostSnapshot


class Part(NamedTuple):
    """What a guest has of one tier, in bytes.

    Attributes:
        boot: what it cannot give: cells and DIMMs.
        most: with all its virtio-mem devices full.
        current: what it has now.
        devices: the virtio-mem devices of the tier.
    """

    boot: int
    most: int
    current: int
    devices: tuple[VirtioMem, ...]


_NOTHING: Final = Part(0, 0, 0, ())


def part_of(guest: GuestState, key: Key, cxl: AbstractSet[int]) -> Part:
    """What a guest has of the tier that `key` counts, where `cxl` are the nodes of tier `cxl`."""
    if not cxl and key is MEMORY_KEY:  # most hosts, in the inner loops
        return Part(guest.boot_memory, guest.memory_max, guest.memory_current, guest.virtio_mem)
    far = _far_part(guest, cxl) if cxl else _NOTHING
    if key == CXL_KEY:
        return far
    if far is _NOTHING:
        return Part(
            guest.boot_memory, guest.memory_max, guest.memory_current, guest.virtio_mem
        )  # fmt: skip
    return Part(
        guest.boot_memory - far.boot,
        guest.memory_max - far.most,
        max(0, guest.memory_current - far.current),
        tuple(device for device in guest.virtio_mem if device not in far.devices),
    )


def _far_part(guest: GuestState, cxl: AbstractSet[int]) -> Part:
    devices = tuple(d for d in guest.virtio_mem if _is_far(device_nodes(guest, d), cxl))
    boot = sum(p.size for p in fixed_parts(guest) if _is_far(p.host_nodes, cxl))
    if not devices and not boot:
        return _NOTHING
    return Part(
        boot,
        boot + sum(device.size for device in devices),
        boot + sum(device.current for device in devices),
        devices,
    )


def _is_far(nodes: AbstractSet[int], cxl: AbstractSet[int]) -> bool:
    return bool(nodes) and nodes <= cxl


def fixed_parts(guest: GuestState) -> tuple[FixedMemory, ...]:
    """What it boots with, each with the nodes that it is bound to, by itself or with the guest."""
    parts = guest.fixed_memory or (FixedMemory("boot memory", guest.boot_memory),)
    home = guest.numa_nodes or guest.config_numa_nodes
    own = guest.numa_mode is not NumaMode.RESTRICTIVE
    return tuple(
        part if own and part.host_nodes else FixedMemory(part.what, part.size, home, part.page)
        for part in parts
    )


def device_nodes(guest: GuestState, device: VirtioMem) -> CpuSet:
    """Host nodes of a virtio-mem device; libvirt drops its nodemask under `restrictive`."""
    if device.host_nodes and guest.numa_mode is not NumaMode.RESTRICTIVE:
        return device.host_nodes
    return guest.numa_nodes or guest.config_numa_nodes


def bytes_on(guest: GuestState, node: int) -> tuple[int, int]:
    """Of a guest's memory that is bound to a node: cells and DIMMs, what its devices hold."""
    fixed = sum(int(part.size) for part in fixed_parts(guest) if node in part.host_nodes)
    moving = sum(
        max(int(device.requested), int(device.current))
        for device in guest.virtio_mem
        if node in device_nodes(guest, device)
    )
    return fixed, moving


def used_nodes(guest: GuestState) -> dict[int, int]:
    """Bytes of a guest by the node that they are bound to, the first one where it is several.

    A device counts with what is requested of it, or with more while it has more; that of an
    unmanaged guest with all that it can hold.
    """
    used: dict[int, int] = {}
    found = [(part.host_nodes, int(part.size)) for part in fixed_parts(guest)]
    for device in guest.virtio_mem:
        most = max(device.requested, device.current) if guest.managed else device.size
        found.append((device_nodes(guest, device), int(most)))
    for nodes, size in found:
        if nodes:
            used[min(nodes)] = used.get(min(nodes), 0) + size
    return used


def node_rooms(snapshot: HostSnapshot) -> dict[int, int]:
    """What is left to grant of each CXL node, in bytes; below zero where it is overcommitted."""
    rooms = {n: int(snapshot.capacity.cxl.get(n, 0)) for n in snapshot.topology.cxl_nodes}
    if not rooms:
        return rooms
    for uuid, guest in snapshot.guests.items():
        if guest.active or uuid in snapshot.books.holdings:
            for node, size in used_nodes(guest).items():
                if node in rooms:
                    rooms[node] -= size
    return {n: room - snapshot.pending[node_key(n)] for n, room in rooms.items()}


def node_key(node: int) -> Key:
    """The coordinate of one node's memory: plans reserve by it what they take of a CXL node."""
    return Key(MEMORY, node_locality(node))


def block_of(devices: tuple[VirtioMem, ...], default: int) -> int:
    """Bytes by which these devices change, the coarsest of them."""
    if len(devices) == 1:
        return int(devices[0].block) or default
    return max((int(device.block) for device in devices), default=0) or default


def on_returnable(guest: GuestState, snapshot: HostSnapshot) -> CpuSet:
    """Nodes that can be taken back and that the guest has memory on.

    With a function attached, pages on such a node go to another without an error, or the node can
    never be taken back (measured: facts/nested-lab.md, CXL).
    """
    bound = {node for part in fixed_parts(guest) for node in part.host_nodes}
    for device in guest.virtio_mem:
        if device.requested or device.current:
            bound.update(device_nodes(guest, device))
    return CpuSet(node for node in bound if is_returnable(snapshot, node))


def is_returnable(snapshot: HostSnapshot, node: int) -> bool:
    """Whether a node may be taken back: one of CXL that is offlinable, any other without CPUs."""
    found = snapshot.topology.nodes.get(node)
    if found is None or found.cpus:
        return False
    return found.offlinable or node not in snapshot.topology.cxl_nodes
