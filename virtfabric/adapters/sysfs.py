"""The machine's topology from sysfs and procfs.

Reads only. Roots are arguments, so that a recorded machine and this one are read by the same code.
Source: Documentation/admin-guide/cputopology.rst and Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.cxl.nodes import explain_staying, read_access, read_tiers, read_zones
from virtfabric.adapters.hugepages.pools import read_huge_pages
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.amounts import Tier
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.host import HostTopology, NumaNode, Pcpu
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from virtfabric.model.ids import HostId


class Sysfs:
    """Nodes and pCPUs of one machine."""

    def __init__(self, root: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        """Read below these; nothing is touched before a call."""
        self._system = root / "devices" / "system"
        self._proc = proc
        self._trees = SysTree(root), SysTree(proc)

    def read_topology(self, host_id: HostId) -> HostTopology:
        """Nodes by id and online pCPUs by number, with memory as it is now.

        A kernel without NUMA (no node directory) is one node 0 with everything.

        Raises:
            InvalidValueError: a file does not have the form that the kernel documents.
            OSError: sysfs is not there.
        """
        online = self.read_online()
        nodes = self.read_nodes(online)
        node_of = {cpu: node.number for node in nodes.values() for cpu in node.cpus}
        pcpus = {cpu: self._read_pcpu(cpu, node_of.get(cpu, 0), online) for cpu in online}
        return HostTopology(host_id, nodes, pcpus, **self._read_default_page())

    def _read_default_page(self) -> dict[str, Bytes]:
        """Nothing where the kernel has no huge pages."""
        page = _parse_meminfo(self._trees[1].text("meminfo") or "").get("Hugepagesize")
        return {} if page is None else {"huge_page": page}

    def read_online(self) -> CpuSet:
        """The online pCPUs."""
        path = self._system / "cpu" / "online"
        return CpuSet.parse(path.read_text(), field=str(path))

    def read_nodes(self, online: CpuSet | None = None) -> dict[int, NumaNode]:
        """The nodes alone, by id; of the online pCPUs, which are read if not given.

        Raises:
            InvalidValueError, OSError: as for the topology.
        """
        cpus = self.read_online() if online is None else online
        listed = self._system / "node" / "online"
        sys, proc = self._trees
        zones, tiers = read_zones(proc), read_tiers(sys)
        if not listed.exists():
            return {0: _judge(self._read_only_node(cpus), zones.get(0), Tier.DRAM)}
        numbers = CpuSet.parse(listed.read_text(), field=str(listed))
        return {
            number: replace(
                _judge(
                    self._read_node(number, numbers, cpus),
                    zones.get(number),
                    tiers.get(number, Tier.DRAM),
                ),
                access=read_access(sys, number),
            )
            for number in numbers
        }

    def _read_node(self, number: int, numbers: CpuSet, online: CpuSet) -> NumaNode:
        directory = self._system / "node" / f"node{number}"
        cpulist = directory / "cpulist"
        memory = _read_meminfo(directory / "meminfo")
        # One column for each online node, in ascending order.
        distances = (directory / "distance").read_text().split()
        return NumaNode(
            number=number,
            cpus=CpuSet(CpuSet.parse(cpulist.read_text(), field=str(cpulist)) & online),
            memory_total=memory["MemTotal"],
            memory_free=memory["MemFree"],
            huge_pages=read_huge_pages(self._trees[0], number),
            distances=dict(zip(numbers, map(int, distances), strict=False)),
        )

    def _read_only_node(self, online: CpuSet) -> NumaNode:
        memory = _read_meminfo(self._proc / "meminfo")
        return NumaNode(
            number=0,
            cpus=online,
            memory_total=memory["MemTotal"],
            memory_free=memory["MemFree"],
            huge_pages=read_huge_pages(self._trees[0], None),
            distances={0: 10},
        )

    def _read_pcpu(self, number: int, node: int, online: CpuSet) -> Pcpu:
        topology = self._system / "cpu" / f"cpu{number}" / "topology"
        siblings = _read_text(topology / "thread_siblings_list", str(number))
        together = CpuSet.parse(siblings, field=f"cpu{number}.thread_siblings_list") & online
        return Pcpu(
            number=number,
            node=node,
            # -1: the architecture does not say (topology_physical_package_id's default).
            socket=max(0, int(_read_text(topology / "physical_package_id", "0"))),
            core=max(0, int(_read_text(topology / "core_id", str(number)))),
            siblings=CpuSet(together | {number}),
        )


def _judge(node: NumaNode, zones: dict[str, Bytes] | None, tier: Tier) -> NumaNode:
    """With its tier, and whether it can be taken offline."""
    why = explain_staying(zones, node.huge_pages)
    return replace(node, tier=tier, offlinable=not why, why_not_offlinable=why)


def _read_text(path: Path, default: str) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return default


def _parse_meminfo(text: str) -> dict[str, Bytes]:
    found = re.findall(r"^(?:Node \d+ )?(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: Bytes(int(kib) << 10) for name, kib in found}


def _read_meminfo(path: Path) -> dict[str, Bytes]:
    memory = _parse_meminfo(path.read_text())
    for name in ("MemTotal", "MemFree"):
        if name not in memory:
            raise InvalidValueError(f"{path}: {name}", None, "is missing")
    return memory
