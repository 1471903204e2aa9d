from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.sysfs import Sysfs
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ids import HostId
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from pathlib import Path

HOST = HostId("h")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def meminfo(node: int, total: int, free: int) -> str:
    return f"Node {node} MemTotal:  {total} kB\nNode {node} MemFree:   {free} kB\n"


@pytest.fixture
def smt_host(tmp_path: Path) -> Path:
    """Two sockets with SMT, one of four pCPUs of the second offline, a memory-only node."""
    system = "devices/system"
    files = {
        f"{system}/cpu/online": "0-6\n",
        f"{system}/node/online": "0-2\n",
        f"{system}/node/node0/cpulist": "0-3\n",
        f"{system}/node/node1/cpulist": "4-7\n",
        f"{system}/node/node2/cpulist": "\n",
        f"{system}/node/node0/hugepages/hugepages-2048kB/nr_hugepages": "8\n",
        f"{system}/node/node0/hugepages/hugepages-2048kB/free_hugepages": "3\n",
        f"{system}/node/node0/hugepages/hugepages-1048576kB/nr_hugepages": "0\n",
        f"{system}/node/node0/hugepages/hugepages-1048576kB/free_hugepages": "0\n",
    }
    for node, distance in enumerate(("10 21 17", "21 10 28", "17 28 10")):
        files[f"{system}/node/node{node}/distance"] = distance
        files[f"{system}/node/node{node}/meminfo"] = meminfo(node, 1024 * (node + 1), 512)
    for cpu in range(8):
        topology = f"{system}/cpu/cpu{cpu}/topology"
        first = cpu - cpu % 2
        files[f"{topology}/physical_package_id"] = f"{cpu // 4}\n"
        files[f"{topology}/core_id"] = f"{cpu % 4 // 2}\n"
        files[f"{topology}/thread_siblings_list"] = f"{first}-{first + 1}\n"
    write(tmp_path, files)
    return tmp_path


def test_nodes(smt_host: Path) -> None:
    nodes = Sysfs(smt_host).read_topology(HOST).nodes
    assert {n: str(node.cpus) for n, node in nodes.items()} == {0: "0-3", 1: "4-6", 2: ""}
    assert nodes[1].memory_total == 2048 << 10
    assert nodes[1].memory_free == 512 << 10
    assert nodes[1].distances == {0: 21, 1: 10, 2: 28}
    assert [(h.size, h.total, h.free) for h in nodes[0].huge_pages] == [
        (2 << 20, 8, 3),
        (1 << 30, 0, 0),
    ]
    assert nodes[2].huge_pages == ()


def test_promised_pages_may_be_of_any_node(smt_host: Path) -> None:
    """The kernel tells of reservations for the host as a whole only."""
    write(
        smt_host,
        {
            "kernel/mm/hugepages/hugepages-2048kB/resv_hugepages": "5\n",
            "devices/system/node/node0/hugepages/hugepages-2048kB/surplus_hugepages": "2\n",
        },
    )
    pages = Sysfs(smt_host).read_topology(HOST).nodes[0].huge_pages[0]
    assert (pages.free, pages.reserved, pages.available) == (3, 3, 0)
    assert (pages.total, pages.surplus, pages.persistent) == (8, 2, 6)


def test_the_hosts_default_huge_page(tmp_path: Path, smt_host: Path) -> None:
    proc = tmp_path / "proc"
    assert Sysfs(smt_host, proc).read_topology(HOST).huge_page == 2 << 20
    write(proc, {"meminfo": "MemTotal: 1 kB\nHugepagesize:  1048576 kB\n"})
    assert Sysfs(smt_host, proc).read_topology(HOST).huge_page == 1 << 30


def test_pcpus(smt_host: Path) -> None:
    topology = Sysfs(smt_host).read_topology(HOST)
    assert topology.host_id == HOST
    assert list(topology.pcpus) == [0, 1, 2, 3, 4, 5, 6]
    assert (topology.pcpus[5].node, topology.pcpus[5].socket, topology.pcpus[5].core) == (1, 1, 0)
    assert topology.pcpus[5].siblings == CpuSet([4, 5])
    assert topology.pcpus[6].siblings == CpuSet([6])  # its sibling is offline
    assert topology.has_smt


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    sys, proc = tmp_path / "sys", tmp_path / "proc"
    write(sys, {"devices/system/cpu/online": "0-1\n"})
    write(proc, {"meminfo": "MemTotal:  4096 kB\nMemFree:  1024 kB\n"})
    topology = Sysfs(sys, proc).read_topology(HOST)
    assert topology.nodes[0].cpus == CpuSet([0, 1])
    assert topology.memory_total == 4096 << 10
    assert topology.pcpus[1].siblings == CpuSet([1])
    assert not topology.has_smt


def test_a_malformed_file_is_named(smt_host: Path) -> None:
    (smt_host / "devices/system/node/node0/cpulist").write_text("zero\n")
    with pytest.raises(InvalidValueError, match="node0/cpulist"):
        Sysfs(smt_host).read_topology(HOST)


def test_this_machine() -> None:
    topology = Sysfs().read_topology(HOST)
    assert topology.cpus == Sysfs().read_online()
    assert topology.memory_total > 0
