"""Ready-made simulated machines: the one of `virtfabricd --simulate`, and generated topologies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.adapters.simulated.devices import small_devices
from virtfabric.adapters.simulated.guest import GuestSpec, MemoryDevice
from virtfabric.adapters.simulated.host import SimulatedHost, build_simulated_host
from virtfabric.model.host import HostTopology, NumaNode, Pcpu
from virtfabric.model.ids import GuestId, HostId
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from virtfabric.ports import Clock

BATCH: Final = GuestId("00000000-0000-4000-8000-000000000010")
WEB: Final = GuestId("00000000-0000-4000-8000-000000000050")
DATABASE: Final = GuestId("00000000-0000-4000-8000-000000000090")


def make_topology(
    *, cores: int, threads: int = 2, nodes: int = 1, node_memory: int = 8 * GIB
) -> HostTopology:
    """A host with `cores` on each node, one socket a node; siblings are numbered side by side."""
    pcpus: dict[int, Pcpu] = {}
    by_node: dict[int, list[int]] = {}
    for core in range(cores * nodes):
        siblings = CpuSet(range(core * threads, (core + 1) * threads))
        for number in siblings:
            node = core // cores
            pcpus[number] = Pcpu(number, node, node, core % cores, siblings)
            by_node.setdefault(node, []).append(number)
    return HostTopology(
        HostId("simulated"),
        {
            node: NumaNode(
                node,
                CpuSet(cpus),
                Bytes(node_memory),
                Bytes(node_memory),
                distances={other: 10 if other == node else 21 for other in by_node},
            )
            for node, cpus in by_node.items()
        },
        pcpus,
    )


def small_topology() -> HostTopology:
    """8 pCPUs in 4 cores with SMT, one node, 8 GiB."""
    return make_topology(cores=4)


def small_guests() -> tuple[GuestSpec, ...]:
    """Three guests that share a host: batch and web on the pool, a dedicated database."""

    def guest(
        uuid: GuestId, name: str, priority: int, placement: Placement, *, shares: int = 100
    ) -> GuestSpec:
        return GuestSpec(
            uuid=uuid,
            name=name,
            vcpus=2,
            vcpus_max=4,
            boot_memory=Bytes(512 * MIB),
            devices=(MemoryDevice("ua-vm0", 0, Bytes(4 * GIB), Bytes(512 * MIB)),),
            policy=GuestPolicy(
                priority=priority,
                cpu=CpuPolicy(MilliCpu(1000), MilliCpu(4000), shares, placement),
                memory=MemoryPolicy(Bytes(512 * MIB), Bytes(4 * GIB)),
            ),
        )

    return (
        guest(BATCH, "batch", 10, Placement.SHARED, shares=50),
        guest(WEB, "web", 50, Placement.SHARED),
        guest(DATABASE, "database", 90, Placement.DEDICATED),
    )


def small_host(clock: Clock | None = None) -> SimulatedHost:
    """The machine of `virtfabricd --simulate`."""
    return build_simulated_host(small_topology(), small_guests(), clock, small_devices())
