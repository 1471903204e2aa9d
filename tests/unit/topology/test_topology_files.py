"""Topology files: what is shipped reads, every impossible one is refused by its path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from topologies import SOME, WHOLE, changed, topologies

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MIB
from virtfabric.shim.topology.checks import check_topology
from virtfabric.shim.topology.shipped import read_shipped_topology, shipped_topologies
from virtfabric.shim.topology.text import format_topology, parse_topology

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology

NODE_0, NODE_1, NODE_2 = WHOLE["nodes"]
DEEP = "[" * 100_000
IMPOSSIBLE = {
    # CPUs and nodes
    "more vCPUs than maximum": ("cpu.vcpus", 9, "cpu.vcpus", "more than sockets"),
    "more than the machine takes": ("cpu.cores", 64, "cpu", "256 CPUs, more than 255"),
    "more APIC ids than there are": (
        "cpu", {"sockets": 3, "cores": 65, "threads": 1}, "cpu", "APIC ids up to 320, more than",
    ),
    "threads that waste APIC ids": (
        "cpu", {"sockets": 5, "cores": 17, "threads": 3}, "cpu", "'5 x 17 x 3' has APIC ids up to",
    ),
    "a CPU in two nodes": ("nodes.1.cpus", "3-7", "nodes[1].cpus", "CPU 3, which is in node 0"),
    "a CPU in no node": ("nodes.1.cpus", "4-6", "nodes", "7 is a CPU that is in no node"),
    "a CPU that is not there": ("nodes.1.cpus", "4-8", "nodes[1].cpus", "the host has 8"),
    "siblings split": (
        "nodes",
        [NODE_0 | {"cpus": "0-2"}, NODE_1 | {"cpus": "3-7"}, NODE_2],
        "nodes[0].cpus", "splits the siblings 2-3",
    ),
    "a gap in the nodes": ("nodes.2.id", 3, "nodes[2].id", "is not 2"),
    "a range the wrong way": ("nodes.0.cpus", "3-0", "nodes[0].cpus", "impossible range"),
    "odd memory": ("nodes.0.memory", "3MiB", "nodes[0].memory", "multiple of 2MiB"),
    "memory said twice": ("memory", "1GiB", "memory", "said by the nodes"),
    "too much memory": ("nodes.0.memory", "1TiB", "topology", "40 address bits"),
    "no memory": ("nodes", None, "nodes", "is missing"),
    "a row too few": ("distances", [[10, 20, 30]], "distances", "one for each of 3"),
    "a short row": ("distances.1", [20, 10], "distances[1]", "one for each of 3"),
    "far from itself": ("distances.1.1", 11, "distances[1][1]", "is not 10"),
    "no distance": ("distances.0.1", 10, "distances[0][1]", "distance to itself"),
    # ids and places
    "an id twice": ("ports.1.id", "p0", "ports[1].id", "is also ports[0].id"),
    "an id twice, far apart": ("cxl.devices.0.id", "p0", "cxl.devices[0].id", "also ports[0].id"),
    "a port that is taken": ("functions.igb.0.port", "p0", "functions.igb[0].port", "by 'pci0'"),
    "a card's port taken": ("functions.igb.0.port", "p4", "cards[0].management", "by 'igb0'"),
    "one port twice in a card": ("cards.0.slices.0", "p4", "cards[0].slices[0]", "by 'card0'"),
    "a function twice": ("functions.edu.1.function", 0, "functions.edu[1].port", "by 'nvme1'"),
    "a function beside VFs": ("functions.edu.1.port", "p2", "functions.edu[1].port", "by 'nvme0'"),
    "a PF that is not function 0": (
        "functions.nvme.0.function", 1, "functions.nvme[0].function", "has its slot for itself",
    ),
    "no function 0": (
        "functions.nvme.1.function", 2, "functions.nvme[1].function", "no function 0",
    ),
    "slot 0 of a PCI bridge": ("functions.edu.0.slot", 0, "functions.edu[0].slot", "take 1 to 31"),
    "a slot of a root port": ("functions.edu.1.slot", 1, "functions.edu[1].slot", "only slot"),
    "an unknown port": ("functions.igb.0.port", "px", "functions.igb[0].port", "is no root port"),
    "PCIe behind PCI": ("functions.igb.0.port", "pci0", "functions.igb[0].port", "no root port"),
    "an unknown bridge": ("ports.5.bridge", "cxl0", "ports[5].bridge", "is no host bridge"),
    "an unknown node": ("bridges.0.node", 3, "bridges[0].node", "is no node"),
    "a CXL bridge's unknown node": ("cxl.bridges.1.node", 9, "cxl.bridges[1].node", "is no node"),
    "a serial twice": ("functions.nvme.1.serial", "n0", "functions.nvme[1].serial", "is also"),
    "a MAC twice": (
        "functions.igb.-", {"id": "x", "port": "p6", "mac": "52:54:00:00:00:01"},
        "functions.igb[1].mac", "is also functions.igb[0].mac",
    ),
    "more root ports than slots": (
        "ports", [*WHOLE["ports"], *({"id": f"more{n}"} for n in range(60))], "ports",
        "65 root ports are on pcie.0, which has slots for 64",
    ),
    "more ports than bus numbers": (
        "ports", [*WHOLE["ports"], *({"id": f"more{n}"} for n in range(24))],
        "bridges[0].bus", "is a bus number of pcie.0",
    ),
    "too many host bridges": (
        "bridges",
        [{"id": "pxb1", "bus": 40}, *({"id": f"x{n}", "bus": 200 + n} for n in range(5))],
        "cxl.bridges[1]", "too many",
    ),
    "a bus of the root bus": ("bridges.0.bus", 20, "bridges[0].bus", "is a bus number of pcie.0"),
    "a bus of another": ("cxl.bridges.1.bus", 68, "cxl.bridges[1].bus", "a bus number of cxl0"),
    "a bus given twice": ("cxl.bridges.0.bus", 40, "cxl.bridges[0].bus", "a bus number of pxb1"),
    "a bus too high": ("bridges.0.bus", 254, "bridges[0].bus", "leaves too few bus numbers"),
    # CXL
    "an unknown target": (
        "cxl.windows.1.targets.1", "cxl9", "cxl.windows[1].targets[1]", "is no CXL host bridge",
    ),
    "a plain bridge as target": (
        "cxl.windows.0.targets.0", "pxb1", "cxl.windows[0].targets[0]", "is no CXL host bridge",
    ),
    "no target": ("cxl.windows.0.targets", [], "cxl.windows[0].targets", "no host bridge"),
    "a target twice": (
        "cxl.windows.1.targets.1", "cxl0", "cxl.windows[1].targets[1]", "is there twice",
    ),
    "a window too small": ("cxl.windows.0.size", "256MiB", "cxl.windows[0].size", "the 512MiB of"),
    "an odd window": ("cxl.windows.0.size", "640MiB", "cxl.windows[0].size", "multiple of 256MiB"),
    "an odd window of two": (
        "cxl.windows.1.size", "768MiB", "cxl.windows[1].size", "multiple of 512MiB",
    ),
    "a CXL serial twice": (
        "cxl.devices.1.serial", "0x1", "cxl.devices[1].serial", "is also cxl.devices[0].serial",
    ),
    "no serial": ("cxl.devices.1.serial", "0x" + "f" * 16, "cxl.devices[1].serial", "no serial"),
    "an odd capacity": (
        "cxl.devices.0.volatile", "100MiB", "cxl.devices[0].volatile", "multiple of 256MiB",
    ),
    "no capacity": ("cxl.devices.0.volatile", None, "cxl.devices[0]", "neither volatile nor"),
    "no label area": ("cxl.devices.1.label_area", None, "cxl.devices[1].label_area", "missing"),
    "labels of volatile memory": (
        "cxl.devices.0.label_area", "1MiB", "cxl.devices[0].label_area", "needs persistent",
    ),
    "a small label area": (
        "cxl.devices.1.label_area", "64KiB", "cxl.devices[1].label_area", "128KiB at least",
    ),
    "a CXL port taken": ("cxl.devices.0.port", "c1", "cxl.devices[0].port", "taken by 'sw0'"),
    "two devices behind a port": ("cxl.devices.1.port", "c0", "cxl.devices[1].port", "by 'mem0'"),
    "a PCIe port for CXL": ("cxl.devices.0.port", "p6", "cxl.devices[0].port", "is no CXL port"),
    "a switch below a switch": ("cxl.switches.0.port", "d1", "cxl.switches[0].port", "root port"),
    "an unknown CXL bridge": ("cxl.ports.0.bridge", "pxb1", "cxl.ports[0].bridge", "no CXL host"),
    "too many CXL ports": (
        "cxl.ports", [{"id": f"c{n}", "bridge": "cxl1"} for n in range(33)],
        "cxl.ports[32].id", "root port 33 of 'cxl1'",
    ),
    # the shape
    "an unknown key": ("cxl.windows.0.sise", 1, "cxl.windows[0].sise", "is an unknown key"),
    "a missing key": ("cxl.windows.0.size", None, "cxl.windows[0].size", "is missing"),
    "a word for a number": ("cpu.cores", "2", "cpu.cores", "is not an integer"),
    "a number for a size": ("nodes.0.memory", 1024, "nodes[0].memory", "is not a string"),
    "a size without a unit": ("nodes.0.memory", "1024", "nodes[0].memory", "is not a size"),
    "a size beyond all": ("nodes.0.memory", "999999999TiB", "nodes[0].memory", "1 PiB"),
    "an id with a comma": ("ports.0.id", "p,x=y", "ports[0].id", "is not an id"),
    "an id with a line end": ("ports.0.id", "p0\n", "ports[0].id", "is not an id"),
    "a multicast MAC": (
        "functions.igb.0.mac", "53:54:00:00:00:01", "functions.igb[0].mac", "unicast",
    ),
    "no cores": ("cpu.cores", 0, "cpu.cores", "is below 1"),
    "a true for a number": ("cpu.cores", True, "cpu.cores", "is not an integer"),
    "a fraction": ("cpu.cores", 2.5, "cpu.cores", "2.5 is not an integer"),
    "whole sockets, but for a point": ("cpu.sockets", 2.0, "cpu.sockets", "2.0 is not an integer"),
    "a bus with a point": ("bridges.0.bus", 40.0, "bridges[0].bus", "40.0 is not an integer"),
    "a function with a point": (
        "functions.edu.1.function", 1.0, "functions.edu[1].function", "1.0 is not an integer",
    ),
    "no number": ("distances.0.1", float("nan"), "distances[0][1]", "nan is not an integer"),
    "an odd granularity": (
        "cxl.windows.0.granularity", "3KiB", "cxl.windows[0].granularity", "is not [",
    ),
    "another version": ("version", 2, "version", "is not 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_is_impossible_is_refused_by_its_path(what: str) -> None:
    path, value, field, problem = IMPOSSIBLE[what]
    with pytest.raises(InvalidValueError) as caught:
        parse_topology(changed(path, value))
    assert caught.value.field == field
    assert problem in str(caught.value)


def test_the_topology_that_the_refusals_change_is_possible() -> None:
    topology = parse_topology(json.dumps(WHOLE))
    assert topology.nodes[2].memory == 256 * MIB
    assert not topology.nodes[2].cpus
    assert topology.spare_ports() == ("p6",)
    assert topology.spare_cxl_ports() == ("c2", "d1")
    assert topology.shared_memory


@pytest.mark.parametrize("shape", [(255, 1, 1), (1, 255, 1), (2, 127, 1), (1, 127, 2), (8, 31, 1)])
def test_this_many_cpus_are_possible(shape: tuple[int, int, int]) -> None:
    cpu = dict(zip(("sockets", "cores", "threads"), shape, strict=True))
    parse_topology(json.dumps({"version": 1, "cpu": cpu, "memory": "1GiB"}))


def test_cxl_wants_a_numa_node() -> None:
    document = {**WHOLE, "memory": "1GiB"}
    for key in ("nodes", "distances", "bridges", "ports", "pci_bridges", "functions", "cards"):
        del document[key]
    document["cxl"] = {
        **WHOLE["cxl"],
        "bridges": [{"id": "cxl0", "bus": 64}, {"id": "cxl1", "bus": 96}],
    }
    with pytest.raises(InvalidValueError, match="needs at least one NUMA node") as caught:
        parse_topology(json.dumps(document))
    assert caught.value.field == "cxl"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ("[]", "is not an object"),
        ("null", "is not an object"),
        ('{"version": 1', "is not JSON"),
        ('{"version": 1, "version": 1}', "there twice"),
        (DEEP, "is not JSON"),
        (" " * (1 << 20) + "{}", "characters are more than"),
        ('{"version": NaN}', "cpu"),
    ],
    ids=["empty", "list", "null", "cut off", "key twice", "deep", "long", "NaN"],
)
def test_what_is_no_topology_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidValueError, match=problem):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"version": 1, "version": 2}', "version"),
        ('{"nodes": [{"id": 0}, {"id": 1, "memory": "1GiB", "id": 2}]}', "nodes[1].id"),
        ('{"cxl": {"windows": [{"size": 1, "size": {"a": 1, "a": 1}}]}}', "cxl.windows[0].size"),
        ("[" * 100 + '{"a": 1, "a": 2}' + "]" * 100, "[0]" * 100 + ".a"),
    ],
    ids=["top", "entry", "within", "deep"],
)
def test_a_key_that_is_there_twice_is_told_by_its_path(text: str, field: str) -> None:
    with pytest.raises(InvalidValueError, match="there twice") as caught:
        parse_topology(text)
    assert caught.value.field == field


@SOME
@given(topologies())
def test_a_topology_survives_its_file(topology: Topology) -> None:
    check_topology(topology)
    assert parse_topology(format_topology(topology)) == topology


def test_these_are_shipped() -> None:
    assert shipped_topologies() == ("big", "card", "cxl", "passthrough", "small")


def test_the_examples_of_the_documentation_are_one_valid_topology() -> None:
    text = (Path(__file__).parents[3] / "docs/lab.md").read_text()
    document: dict[str, object] = {}
    for example in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        document |= json.loads(example)
    topology = parse_topology(json.dumps(document))
    assert topology.cxl is not None
    assert (topology.spare_ports(), len(topology.edu)) == (("spare0",), 5)
    assert topology.spare_cxl_ports() == ("cxl1-spare0", "sw0-port1")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidValueError) as caught:
        read_shipped_topology("../small")
    assert caught.value.advice == "there are big, card, cxl, passthrough, small"


def test_what_is_shipped_has_what_its_description_says() -> None:
    small, cxl, passthrough, card, big = map(
        read_shipped_topology, ("small", "cxl", "passthrough", "card", "big")
    )
    assert (len(small.nodes), small.cpu.threads, len(small.igb)) == (2, 2, 1)
    assert len(small.spare_ports()) == 4
    assert cxl.cxl is not None
    assert [len(window.targets) for window in cxl.cxl.windows] == [1, 1, 2]
    assert len(cxl.cxl.bridges) == 2
    assert len([one for one in cxl.cxl.devices if one.port in cxl.cxl.switches[0].downstream]) == 2
    assert len([one for one in cxl.cxl.devices if one.persistent]) == 1
    assert len(cxl.spare_cxl_ports()) == 4
    assert passthrough.nvme[0].vfs is not None
    assert passthrough.nvme[0].vfs.count == 4
    assert passthrough.bridges[0].node == 1
    assert len(passthrough.spare_ports()) == 4
    assert [len(one.ports) for one in card.cards] == [9, 9]
    assert (len(big.nodes), big.cpu.max_vcpus) == (4, 32)
    for topology in (small, cxl, passthrough, card, big):
        assert topology.total_memory <= 3 * 1024 * MIB
