"""A host as the kernel and libvirt show it, and the part of it that may be granted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from virtfabric.model.amounts import Tier
from virtfabric.model.units import MIB, Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.ids import HostId


@dataclass(frozen=True, slots=True)
class Pcpu:
    """One logical CPU. `siblings` are the threads of its core, itself included."""

    number: int
    node: int
    socket: int
    core: int
    siblings: CpuSet


@dataclass(frozen=True, slots=True)
class HugePages:
    """Huge pages of one size on one node. Source: `/sys/devices/system/node/nodeN/hugepages`.

    Attributes:
        total, free: pages; `free` has those that are promised already.
        reserved: how many of the free ones may be promised to somebody: the kernel counts these for
            the host as a whole only, and they may all be of this node.
        surplus: of the total, beyond the pool's size: the kernel takes them when they are free.
    """

    size: Bytes
    total: int
    free: int
    reserved: int = 0
    surplus: int = 0

    @property
    def available(self) -> int:
        """Free ones that are promised to nobody, at least."""
        return max(0, self.free - self.reserved)

    @property
    def persistent(self) -> int:
        """The size of the pool, as somebody set it."""
        return self.total - self.surplus


@dataclass(frozen=True, slots=True)
class Access:
    """How fast a node's memory is for its nearest CPUs, as the firmware tells (HMAT, CDAT).

    Attributes:
        bandwidth: MB/s of reads; 0 where it is not told.
        latency: nanoseconds of a read; 0 where it is not told.
    """

    bandwidth: int = 0
    latency: int = 0


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node; `cpus` is empty for a memory-only node.

    Attributes:
        memory_total: bytes, as `MemTotal` in the node's meminfo.
        memory_free: bytes at the time of reading.
        huge_pages: one entry per page size.
        distances: by node id, from the SLIT (10 is local).
        tier: `cxl` for a node that CXL regions became.
        offlinable: whether the kernel can give all of its memory back: it is in ZONE_MOVABLE.
        why_not_offlinable: for people; empty for an offlinable one.
    """

    number: int
    cpus: CpuSet
    memory_total: Bytes
    memory_free: Bytes
    huge_pages: tuple[HugePages, ...] = ()
    distances: dict[int, int] = field(default_factory=dict)
    tier: Tier = Tier.DRAM
    offlinable: bool = False
    why_not_offlinable: str = ""
    access: Access = Access()


@dataclass(frozen=True)
class HostTopology:
    """Nodes by id and pCPUs by number (online ones only).

    Attributes:
        huge_page: bytes of the huge pages that whoever names no size gets.
    """

    host_id: HostId
    nodes: dict[int, NumaNode]
    pcpus: dict[int, Pcpu]
    huge_page: Bytes = Bytes(2 * MIB)

    def page_of(self, page: Bytes | None) -> Bytes:
        """Of memory that names huge pages of no size (None) the default; `SMALL_PAGES` stays."""
        return self.huge_page if page is None else page

    @cached_property
    def cpus(self) -> CpuSet:
        """Every online pCPU."""
        return CpuSet(self.pcpus)

    @cached_property
    def has_smt(self) -> bool:
        """Whether any core has more than one thread online."""
        return any(len(p.siblings) > 1 for p in self.pcpus.values())

    @cached_property
    def cores(self) -> tuple[CpuSet, ...]:
        """The sibling sets, one per core, ordered by lowest pCPU."""
        return tuple(sorted({p.siblings for p in self.pcpus.values()}, key=min))

    @cached_property
    def cxl_nodes(self) -> frozenset[int]:
        """The nodes of tier `cxl`."""
        return frozenset(n for n, node in self.nodes.items() if node.tier == Tier.CXL)

    @property
    def memory_total(self) -> Bytes:
        """Memory of all nodes."""
        return Bytes(sum(n.memory_total for n in self.nodes.values()))


@dataclass(frozen=True, slots=True)
class Capacity:
    """What may be granted (`[capacity]` of the configuration, resolved against the host).

    Attributes:
        cpus: managed pCPUs; dedicated sets and the shared pool come from here.
        housekeeping: pCPUs for emulator and I/O threads; may overlap `cpus` on small hosts, and
            are taken for dedicated guests last.
        memory: bytes of DRAM that may be granted, by node id.
        reserve: bytes held back of the sum of `memory`; covers residues.
        overhead: bytes counted for each guest's QEMU beside its memory.
        cxl: bytes of CXL memory that may be granted, by node id; nothing is held back of them.
        withheld: why nothing is granted of a node for now, for people, by node id: one that is not
            there yet, or that libvirt does not know.
    """

    cpus: CpuSet
    housekeeping: CpuSet
    memory: dict[int, Bytes]
    reserve: Bytes
    overhead: Bytes
    cxl: dict[int, Bytes] = field(default_factory=dict)
    withheld: dict[int, str] = field(default_factory=dict)

    def without(self, withheld: Mapping[int, str]) -> Capacity:
        """The same, with nothing of these nodes, for these reasons."""
        return replace(
            self,
            memory={n: amount for n, amount in self.memory.items() if n not in withheld},
            cxl={n: amount for n, amount in self.cxl.items() if n not in withheld},
            withheld={**self.withheld, **withheld},
        )

    @property
    def grantable_memory(self) -> Bytes:
        """Bytes of DRAM that may be granted in all."""
        return Bytes(max(0, sum(self.memory.values()) - self.reserve))

    @property
    def grantable_cxl(self) -> Bytes:
        """Bytes of CXL memory that may be granted in all."""
        return Bytes(sum(self.cxl.values()))
