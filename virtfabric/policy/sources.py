"""Sources: what of a guest can really give memory to the host, in the order in which it is asked.

Owns the order of a guest's devices when it gives, and what each can give at most. How much is
wanted of it is for others to say (`reclaim` of a victim, `stepper` and `farmemory` of a plan).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import CXL_KEY, MEMORY_KEY
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.units import CpuSet
from virtfabric.policy.nearness import far_from
from virtfabric.policy.standing import BALLOON_STEP, VIRTIO_MEM_BLOCK
from virtfabric.policy.tiers import device_nodes, part_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.model.ledger import HostSnapshot


class Source(NamedTuple):
    """One device that a guest can be asked for memory by.

    Attributes:
        alias: empty for a balloon.
        nodes: of the host, that its memory is bound to.
        room: bytes that it can give, in whole blocks.
        has: what is requested of it now.
    """

    mechanism: MemoryMechanism
    alias: str
    nodes: CpuSet
    block: int
    room: int
    has: int


def giving_order(
    state: GuestState,
    devices: Iterable[VirtioMem],
    snapshot: HostSnapshot,
    rooms: Mapping[int, int],
) -> list[VirtioMem]:
    """Devices on CXL nodes that give first: on called nodes, on withheld ones, then the farthest.

    What stays is sound and near.
    """

    def turn(device: VirtioMem) -> tuple[bool, bool, int, int, str]:
        nodes = device_nodes(state, device)
        node, far = min(nodes), far_from(snapshot, state.uuid, min(nodes))
        called = bool(nodes & snapshot.recall.nodes)
        kept = bool(nodes & snapshot.capacity.withheld.keys())
        return called, kept, far, -rooms.get(node, 0), device.alias

    return sorted(devices, key=turn, reverse=True)


def sources_of(
    state: GuestState, key: Key, snapshot: HostSnapshot, rooms: Mapping[int, int]
) -> tuple[Source, ...]:
    """What can give memory of one tier; nothing of a guest whose memory cannot be had.

    A device that was asked and did not go below a size keeps that (`Recall.stuck`). A balloon is
    the last resort: of a guest that has no virtio-mem, where `memory.lend_ballooned` is set, and
    not under PCIe functions, which pin all of its pages, nor on huge pages, of which it frees few.
    """
    part = part_of(state, key, snapshot.topology.cxl_nodes)
    if part.devices and state.mechanism is MemoryMechanism.VIRTIO_MEM:
        devices = (
            giving_order(state, part.devices, snapshot, rooms)
            if key == CXL_KEY
            else reversed(part.devices)
        )
        least = snapshot.recall.least_of(state.uuid)
        return tuple(_source(state, device, least.get(device.alias, 0)) for device in devices)
    lends = snapshot.lend_ballooned and not state.devices and not state.on_huge_pages
    if key == MEMORY_KEY and lends and state.mechanism is MemoryMechanism.BALLOON:
        has = int(state.memory_current)
        least_balloon = snapshot.recall.least_of(state.uuid).get("", 0)
        room = max(0, has - least_balloon) // BALLOON_STEP * BALLOON_STEP
        return (Source(MemoryMechanism.BALLOON, "", CpuSet(), BALLOON_STEP, room, has),)
    return ()


def _source(state: GuestState, device: VirtioMem, least: int) -> Source:
    block = int(device.block) or VIRTIO_MEM_BLOCK
    has = int(device.requested)
    room = max(0, has - least) // block * block
    nodes = device_nodes(state, device)
    return Source(MemoryMechanism.VIRTIO_MEM, device.alias, nodes, block, room, has)
