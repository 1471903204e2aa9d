"""Ready-made simulated machines: the one of `virtfabricd --simulate`, and generated topologies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.adapters.simulated.devices import small_devices
from virtfabric.adapters.simulated.guest import GuestSpec, MemoryDevice
from virtfabric.adapters.simulated.host import SimulatedHost, build_simulated_host
from virtfabric.model.cxl import CxlInventory, CxlPort, Memdev, PortKind, Serial, Window
from virtfabric.model.guest import MemoryRoom, NumaMode
from virtfabric.model.host import HostTopology, NumaNode, Pcpu
from virtfabric.model.ids import GuestId, HostId
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from virtfabric.ports import Clock

BATCH: Final = GuestId("00000000-0000-4000-8000-000000000010")
WEB: Final = GuestId("00000000-0000-4000-8000-000000000050")
CACHE: Final = GuestId("00000000-0000-4000-8000-000000000070")
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
    """The machine of `virtfabricd --simulate`: node 1 is a CXL region, `cache` may have of it."""
    host = build_simulated_host(
        small_topology(), (*small_guests(), tiered_guest()), clock, small_devices()
    )
    host.memory.cxl = small_cxl()
    host.memory.make_region(host.memory.cxl.windows[0].base, (Serial(0x100),), GIB, 256)
    return host


def tiered_guest() -> GuestSpec:
    """A guest that may have memory of both tiers, and has a port and a slot for it."""
    return GuestSpec(
        uuid=CACHE,
        name="cache",
        vcpus=1,
        vcpus_max=2,
        boot_memory=Bytes(512 * MIB),
        devices=(MemoryDevice("ua-vm0", 0, Bytes(1 * GIB), Bytes(0)),),
        numa_mode=NumaMode.STRICT,
        numa_nodes=CpuSet([0]),
        memory_room=MemoryRoom(2, Bytes(4 * GIB), 0),
        policy=GuestPolicy(
            priority=70,
            cpu=CpuPolicy(MilliCpu(500), MilliCpu(2000)),
            memory=MemoryPolicy(Bytes(512 * MIB), Bytes(4 * GIB), tiers=("dram", "cxl")),
        ),
    )


def small_cxl() -> CxlInventory:
    """Two host bridges with two memdevs of 1 GiB each: a window for either, one over both."""
    ports = ("port1", "port2")
    return CxlInventory(
        memdevs=tuple(
            Memdev(f"mem{n}", Serial(0x100 + n), ram=Bytes(GIB), node=0, port=ports[n // 2])
            for n in range(4)
        ),
        ports=(
            CxlPort("root0", PortKind.ROOT),
            *(CxlPort(name, PortKind.BRIDGE, "root0", decoders=4) for name in ports),
        ),
        windows=(
            Window("decoder0.0", 0x1000000000, Bytes(4 * GIB), targets=ports[:1]),
            Window("decoder0.1", 0x2000000000, Bytes(4 * GIB), targets=ports[1:]),
            Window("decoder0.2", 0x3000000000, Bytes(4 * GIB), ways=2, granularity=256,
                   targets=ports),
        ),
    )  # fmt: skip
