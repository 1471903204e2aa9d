"""Arguments of the outer QEMU: ids, numbers and places are unique, whatever the topology."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from topologies import SOME, WHOLE, topologies

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.shim.topology.arguments import backing_files, qemu_arguments
from virtfabric.shim.topology.checks import check_topology
from virtfabric.shim.topology.kernel import kernel_arguments
from virtfabric.shim.topology.model import Cpu, Node, Topology
from virtfabric.shim.topology.needs import device_needs, needs_tcg
from virtfabric.shim.topology.shipped import read_shipped_topology
from virtfabric.shim.topology.text import parse_topology
from virtfabric.shim.topology.vagrant import format_vagrant_settings, vagrant_qemuargs

STATE = Path("/state")
PORTS = {"pcie-root-port", "cxl-rp", "cxl-downstream"}
BUSES = {"pcie-pci-bridge", "pxb-pcie", "pxb-cxl", "cxl-upstream"}


def options(arguments: tuple[str, ...], option: str) -> list[dict[str, str]]:
    """Each use of an option as a dict; what stands before the first `=` is its `kind`."""
    values = [b for a, b in zip(arguments[::2], arguments[1::2], strict=True) if a == option]
    return [
        dict(part.split("=", 1) if "=" in part else ("kind", part) for part in value.split(","))
        for value in values
    ]


@SOME
@given(topologies())
def test_ids_numbers_and_places_are_unique(topology: Topology) -> None:
    arguments = qemu_arguments(topology, STATE)
    devices = options(arguments, "-device")
    every = devices + options(arguments, "-object") + options(arguments, "-netdev")
    ids = Counter(one["id"] for one in every if "id" in one)
    assert not [name for name, count in ids.items() if count > 1]
    ports = [one for one in devices if one["kind"] in PORTS]
    assert len({(one["chassis"], one["slot"]) for one in ports}) == len(ports)
    assert all(0 < int(one["chassis"]) < 256 for one in ports)
    places = Counter((one["bus"], _place(one["addr"])) for one in devices if "addr" in one)
    assert not [place for place, count in places.items() if count > 1]


@SOME
@given(topologies())
def test_everything_is_on_a_bus_that_is_there_already(topology: Topology) -> None:
    there = {"pcie.0"}
    for one in options(qemu_arguments(topology, STATE), "-device"):
        if one["kind"] in ("intel-iommu", "nvme-subsys"):
            continue
        assert one["bus"] in there, one
        if one["kind"] in PORTS | BUSES | {"nvme"}:
            there.add(one["id"])


@SOME
@given(topologies())
def test_a_root_port_holds_one_slot_and_vfs_stand_alone(topology: Topology) -> None:
    devices = options(qemu_arguments(topology, STATE), "-device")
    ports = {one["id"] for one in devices if one["kind"] in PORTS}
    behind: dict[str, list[dict[str, str]]] = {}
    for one in devices:
        if one.get("bus") in ports:
            behind.setdefault(one["bus"], []).append(one)
    for things in behind.values():
        assert {_place(one["addr"])[0] for one in things} == {0}
        if len(things) > 1:
            assert all(one.get("multifunction") == "on" for one in things)
            assert {one["kind"] for one in things} <= {"edu", "nvme"}
            assert not any("sriov_max_vfs" in one for one in things)
    free = ports - set(behind)
    spare = {*topology.spare_ports(), *topology.spare_cxl_ports()}
    kept = {port for card in topology.cards for port in card.ports}
    assert free == spare | kept


@SOME
@given(topologies())
def test_memory_and_nodes_add_up(topology: Topology) -> None:
    arguments = qemu_arguments(topology, STATE)
    backends = {one["id"]: one for one in options(arguments, "-object")}
    ram = [one for name, one in backends.items() if name.startswith("ram.")]
    total = sum(int(one["size"].removesuffix("M")) for one in ram)
    assert options(arguments, "-m") == [{"size": f"{total}M"}]
    nodes = [one for one in options(arguments, "-numa") if one["kind"] == "node"]
    assert [one["memdev"] for one in nodes] == [f"ram.{node.id}" for node in topology.nodes]
    kinds = {one["kind"] for one in ram}
    assert kinds == {"memory-backend-memfd" if topology.cards else "memory-backend-ram"}


def test_the_whole_machine() -> None:
    arguments = qemu_arguments(parse_topology(json.dumps(WHOLE)), STATE)
    assert arguments[:8] == (
        "-machine",
        "q35,cxl=on,cxl-fmw.0.targets.0=cxl0,cxl-fmw.0.size=1024M,"
        "cxl-fmw.0.interleave-granularity=256,cxl-fmw.1.targets.0=cxl0,cxl-fmw.1.targets.1=cxl1,"
        "cxl-fmw.1.size=1024M,cxl-fmw.1.interleave-granularity=4096",
        "-global",
        "ICH9-LPC.noreboot=on",
        "-smp",
        "cpus=8,maxcpus=8,sockets=2,cores=2,threads=2",
        "-m",
        "size=2304M",
    )
    assert "node,nodeid=2,memdev=ram.2" in arguments
    assert "dist,src=0,dst=2,val=30" in arguments
    assert "memory-backend-memfd,id=mem0.volatile,size=256M,share=on" in arguments
    assert "pxb-pcie,id=pxb1,bus=pcie.0,addr=0x18,bus_nr=40,numa_node=1" in arguments
    assert (
        "cxl-type3,id=mem1,bus=d0,addr=0x0,sn=0x2,persistent-memdev=mem1.persistent,lsa=mem1.labels"
        in arguments
    )
    nvme = next(one for one in options(arguments, "-device") if one.get("id") == "nvme0")
    numbers = ("sriov_max_vfs", "sriov_vq_flexible", "sriov_vi_flexible", "max_ioqpairs")
    assert [nvme[name] for name in numbers] == ["4", "8", "4", "10"]


def test_backing_files_are_those_of_the_arguments() -> None:
    topology = parse_topology(json.dumps(WHOLE))
    files = backing_files(topology, Path("/a,b"))
    text = " ".join(qemu_arguments(topology, Path("/a,b")))
    assert [file.path.name for file in files] == [
        "nvme0.disk", "nvme1.disk", "mem1.persistent", "mem1.labels",
    ]  # fmt: skip
    assert all(f"=/a,,b/{file.path.name}," in text for file in files)
    assert [file.size for file in files] == [64 << 20, 64 << 20, 256 << 20, 1 << 20]


@pytest.mark.parametrize(
    ("name", "drivers", "tcg"),
    [
        ("small", {"igb"}, False),
        ("cxl", {"igb", "pxb-cxl", "cxl-upstream", "cxl-type3"}, True),
        ("passthrough", {"igb", "nvme", "edu"}, False),
        ("card", {"vfio-user-pci"}, False),
        ("big", set(), False),
    ],
)
def test_what_a_topology_needs(name: str, drivers: set[str], tcg: bool) -> None:
    topology = read_shipped_topology(name)
    needs = {need.driver: need for need in device_needs(topology)}
    assert set(needs) == drivers
    assert needs_tcg(topology) is tcg
    assert all(need.at_start != (driver == "vfio-user-pci") for driver, need in needs.items())
    assert "volatile-memdev" in needs["cxl-type3"].properties if tcg else True


@SOME
@given(topologies())
def test_the_kernel_is_told_where_the_ports_without_acs_are(topology: Topology) -> None:
    devices = {one.get("id"): one for one in options(qemu_arguments(topology, STATE), "-device")}
    buses = {"pcie.0": 0} | {bridge.id: bridge.bus for bridge in topology.bridges}
    expected = []
    for port in topology.ports:
        if not port.acs:
            slot, function = _place(devices[port.id]["addr"])
            expected.append(f"{buses[devices[port.id]['bus']]:02x}:{slot:02x}.{function}")
    arguments = kernel_arguments(topology)
    found = [one.removeprefix("pci=disable_acs_redir=").split(";") for one in arguments]
    assert found == ([expected] if expected else [])


@SOME
@given(topologies())
def test_vagrant_and_libvirt_make_the_rest(topology: Topology) -> None:
    runs = [list(node.cpus) for node in topology.nodes]
    told = [run for run in runs if run]
    gap = any(run != [*range(run[0], run[-1] + 1)] for run in told)
    bare_first = runs[: len(told)] != told
    if gap or bare_first or (told and told[-1][-1] + 1 != topology.cpu.max_vcpus):
        with pytest.raises(InvalidValueError, match=r"^nodes\[[0-2]\]\.cpus: "):
            format_vagrant_settings(topology, STATE)
        return
    settings = json.loads(format_vagrant_settings(topology, STATE))
    assert settings["qemuargs"] == list(vagrant_qemuargs(topology, STATE))
    ours = options(qemu_arguments(topology, STATE), "-device")
    assert options(tuple(settings["qemuargs"]), "-device") == ours
    assert settings["kernel_arguments"] == list(kernel_arguments(topology))
    assert settings["cpus"] == topology.cpu.max_vcpus
    nodes = [one for one in options(tuple(settings["qemuargs"]), "-numa") if one["kind"] == "node"]
    libvirts = range(len(settings["numa_nodes"]))  # it numbers them by their place
    assert [*libvirts, *(int(node["nodeid"]) for node in nodes)] == [*range(len(topology.nodes))]
    by_vagrant = sum(int(node["memory"]) for node in settings["numa_nodes"])
    assert len(nodes) + len(settings["numa_nodes"]) == len(topology.nodes)
    if topology.nodes:
        assert by_vagrant == settings["memory"]
    total = options(tuple(settings["qemuargs"]), "-m")
    assert total == ([{"size": f"{topology.total_memory >> 20}M"}] if nodes else [])


@pytest.mark.parametrize(
    ("cpus", "field", "problem"),
    [
        (["", "0-3"], "nodes[0].cpus", "such nodes come last"),
        (["0,3", "1-2"], "nodes[0].cpus", "several runs"),
        (["2-3", "0-1"], "nodes[1].cpus", "without the last CPU"),
    ],
)
def test_what_vagrant_cannot_make_is_refused_by_its_path(
    cpus: list[str], field: str, problem: str
) -> None:
    nodes = tuple(
        Node(id=number, memory=Bytes(256 << 20), cpus=CpuSet.parse(run))
        for number, run in enumerate(cpus)
    )
    topology = Topology(cpu=Cpu(sockets=4, cores=1, threads=1), nodes=nodes)
    check_topology(topology)
    with pytest.raises(InvalidValueError, match=problem) as caught:
        format_vagrant_settings(topology, STATE)
    assert caught.value.field == field


def _place(address: str) -> tuple[int, int]:
    slot, _, function = address.partition(".")
    return int(slot, 16), int(function or "0", 16)
