"""The host and the guests whose lives `tier_lives` tells: two kinds of memory, little of each."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from host_data import BLOCK, BOOT_MEMORY, load_host, make_guest

from virtfabric.model.device import GuestDevice, PciAddress
from virtfabric.model.guest import GuestState, MemoryRoom, NumaMode, RunState, VirtioMem
from virtfabric.model.ids import RequestId
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from random import Random

    from virtfabric.model.host import HostTopology

REQUEST = RequestId("req-1")
CXL = (2, 3)
RESERVE = 8 * BLOCK
PRIORITIES = (10, 30, 50, 50, 90)
FUNCTION = GuestDevice(PciAddress("0000:01:00.0"), "hostdev0", managed=True)


@cache
def four_nodes(*, offlinable: frozenset[int]) -> HostTopology:
    """Two sockets; two CXL nodes, node 2 nearer to node 0 and node 3 to node 1."""
    topology = load_host("two-sockets")
    far = {
        number: replace(
            topology.nodes[0], number=number, cpus=CpuSet(), tier="cxl",
            distances={0: 17 if number == 2 else 27, 1: 27 if number == 2 else 17, number: 10},
            offlinable=number in offlinable,
            why_not_offlinable="" if number in offlinable else "block memory9 is of ZONE_NORMAL",
        )
        for number in CXL
    }  # fmt: skip
    near = {n: replace(topology.nodes[n], distances=_distances(n)) for n in (0, 1)}
    return replace(topology, nodes=near | far)


def _distances(node: int) -> dict[int, int]:
    return {0: 10, 1: 21, 2: 17, 3: 27} if node == 0 else {0: 21, 1: 10, 2: 27, 3: 17}


def make_guests(draw: Random) -> list[GuestState]:
    ranks = draw.sample(PRIORITIES, len(PRIORITIES))
    return [_guest(draw, number, ranks[number]) for number in range(draw.choice((3, 3, 4)))]


def _guest(draw: Random, number: int, priority: int) -> GuestState:
    mode = draw.choice((NumaMode.STRICT,) * 9 + (NumaMode.RESTRICTIVE, None, NumaMode.PREFERRED))
    guest = make_guest(
        number, priority=priority, numa_mode=mode, numa_nodes=CpuSet((draw.choice((0, 1)),)),
        memory_max=BOOT_MEMORY + 40 * BLOCK, free_ports=draw.choice((0, 1, 2, 2, 2)),
        memory_room=MemoryRoom(draw.choice((0, 1, 2, 2)), Bytes(draw.choice((12, 40)) * BLOCK), 0),
        devices=1,
    )  # fmt: skip
    if draw.randint(0, 2) == 0:
        node, size = draw.choice(CXL), draw.choice((10, 30)) * BLOCK
        first = Bytes(draw.choice((0, 0, 3)) * BLOCK)
        own = VirtioMem("own", 0, Bytes(size), Bytes(BLOCK), first, first, CpuSet((node,)))
        guest = replace(
            guest, virtio_mem=(*guest.virtio_mem, own),
            memory_max=Bytes(guest.memory_max + size),
            memory_current=Bytes(guest.memory_current + first),
        )  # fmt: skip
    tiers = draw.choice((("dram", "cxl"),) * 7 + (("dram",),))
    limit = draw.choice((None, None, Bytes(BOOT_MEMORY + 25 * BLOCK)))
    policy = replace(guest.policy, memory=replace(guest.policy.memory, tiers=tiers, limit=limit))
    functions = (FUNCTION,) if draw.randint(0, 7) == 0 else ()
    guest = replace(guest, policy=policy, state=RunState.SHUTOFF)
    if functions and any(d.requested and d.host_nodes for d in guest.virtio_mem):
        functions = ()
    return replace(guest, devices=functions)
