"""Whole cores, local memory and vCPUs that leave: what only KVM guests on two nodes with SMT show.

The `small` lab is such a host (docs/lab.md). The agent has one core of node 0 and all of node 1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab_host import Guest, LabHost, checker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo.checker import Finding, Observation

Seen = dict[str, "Observation"]

FAR_CORE, NEAR_CORES = frozenset({2, 3}), frozenset({4, 5, 6, 7})
MANAGED = FAR_CORE | NEAR_CORES
OWN = Guest(
    name="own", priority=90, cpu="2:4", vcpus=2, max_vcpus=4, virtio_mem=None,
    placement="dedicated", nodes="1",
)  # fmt: skip
FLOATING = Guest(name="floating", cpu="1:1", max_vcpus=1, virtio_mem=None)
MOVABLE = Guest(
    name="movable", cpu="1:4", vcpus=4, max_vcpus=4, virtio_mem=None, nodes="0-1"
)  # fmt: skip


def read_list(path: str) -> frozenset[int]:
    return checker.parse_cpu_list(Path("/sys/devices/system", path).read_text())


def read_core(cpu: int) -> frozenset[int]:
    return read_list(f"cpu/cpu{cpu}/topology/thread_siblings_list")


def fits() -> bool:
    nodes = {int(p.name[4:]): p.name for p in Path("/sys/devices/system/node").glob("node[0-9]*")}
    return (
        set(nodes) == {0, 1}
        and read_list("node/node0/cpulist") >= FAR_CORE == read_core(2)
        and read_list("node/node1/cpulist") == NEAR_CORES == read_core(4) | read_core(6)
    )


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    if not fits():
        pytest.skip("needs two nodes of two cores with two threads each: the `small` lab")
    with LabHost(f"vfnode{os.getpid()}", tmp_path_factory.mktemp("nodes") / "lab") as lab:
        assert lab.unplugs, "KVM guests"
        cpus = checker.format_cpu_list(MANAGED)
        lab.config(capacity={"cpus": cpus, "housekeeping": "2"})
        lab.start_agent()
        lab.start_guests(OWN, FLOATING)
        lab.settle()
        yield lab


def read_memory_nodes(pid: int) -> dict[int, int]:
    """Pages of the guest's memory on each node; it is QEMU's largest anonymous mapping."""
    largest: dict[int, int] = {}
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        pages = {int(key[1:]): int(n) for key, n in words.items() if key[0] == "N" and n.isdigit()}
        if "anon" in words and sum(pages.values()) > sum(largest.values()):
            largest = pages
    return largest


def expect_memory_on(seen: Observation, node: int) -> Finding:
    pages = read_memory_nodes(seen.pid)
    return set(pages) == {node}, f"{seen.guest}: memory on node {node} (numa_maps): {pages}"


def expect_whole_cores(seen: Observation, cpus: frozenset[int]) -> Finding:
    """A vCPU a pCPU, by thread affinity and cgroup, and together whole cores among `cpus`."""
    each = [seen.affinity, seen.cpuset]
    alone = all(len(place) == 1 for places in each for place in places.values())
    whole = frozenset().union(*(read_core(cpu) for cpu in seen.cpus)) == seen.cpus
    good = alone and whole and seen.affinity == seen.cpuset and len(seen.cpus) == seen.vcpus
    return good and seen.cpus <= cpus, f"{seen.guest}: whole cores of its own: {seen.affinity}"


def expect_own(seen: Seen, count: int) -> list[Finding]:
    """It has `count` vCPUs on whole cores of its memory's node, and the pool is the rest."""
    own, rest = seen["own"], MANAGED - seen["own"].cpus
    return [
        checker.expect_vcpus(own, count),
        expect_whole_cores(own, NEAR_CORES),
        expect_memory_on(own, 1),
        checker.expect_quota(own, None),
        checker.expect_affinity(seen["floating"], rest),
    ]


def test_a_dedicated_guest_has_whole_cores_where_its_memory_is(host: LabHost) -> None:
    seen = host.expect(lambda seen: expect_own(seen, 2))
    assert Path("/sys/fs/cgroup/cgroup.controllers").exists(), "cgroup v2"
    group = Path(f"/proc/{seen['floating'].pid}/cgroup").read_text()
    assert group.startswith("0::"), group


def test_vcpus_come_and_go_and_the_pool_follows(host: LabHost) -> None:
    assert host.cli("allocate", "own", "--cpu", "+2").returncode == 0
    seen = host.expect(lambda seen: expect_own(seen, 4))
    assert seen["own"].cpus == NEAR_CORES
    (grant,) = host.cli_json("grants")
    assert host.cli("release", grant["id"]).returncode == 0
    host.expect(lambda seen: expect_own(seen, 2))
    assert [g["residues"] for g in host.cli_json("guests")] == [[], []]


def test_memory_is_pulled_after_its_vcpus(host: LabHost) -> None:
    """Four pCPUs are on node 1 only; the memory is on node 0, and follows in full."""
    host.virsh("destroy", "own")
    host.guests.pop("own")
    host.start_guests(MOVABLE)
    host.settle()
    host.virsh("numatune", "movable", "--nodeset", "0", "--live")
    host.expect(lambda seen: [expect_memory_on(seen["movable"], 0)])
    done = host.cli("policy", "set", "movable", "--cpu", "4:4", "--placement", "dedicated")
    assert done.returncode == 0, done.stdout + done.stderr
    host.expect(
        lambda seen: [
            expect_whole_cores(seen["movable"], NEAR_CORES),
            expect_memory_on(seen["movable"], 1),
            checker.expect_affinity(seen["floating"], FAR_CORE),
        ]
    )
    assert host.cli_json("drift") == []
