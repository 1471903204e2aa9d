"""A real QEMU starts each shipped topology and shows what it says; one that cannot, refuses.

`VIRTFABRIC_LAB_QEMU` names another QEMU than the system's. Debian 12's 7.2 knows neither igb nor
volatile CXL memory: there `device_needs` must say so, and QEMU must agree.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.model.units import MIB
from virtfabric.shim.topology.arguments import backing_files, qemu_arguments
from virtfabric.shim.topology.needs import device_needs
from virtfabric.shim.topology.shipped import read_shipped_topology, shipped_topologies

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.shim.topology.model import Topology
    from virtfabric.shim.topology.needs import DeviceNeed

QEMU = os.environ.get("VIRTFABRIC_LAB_QEMU", "qemu-system-x86_64")


def ask(arguments: tuple[str, ...], *questions: dict[str, Any]) -> list[Any] | None:
    """Start a QEMU that runs nothing and ask it over QMP; None if it does not start."""
    commands = [{"execute": "qmp_capabilities"}, *questions, {"execute": "quit"}]
    done = subprocess.run(
        [QEMU, *arguments, "-nodefaults", "-S", "-display", "none", "-qmp", "stdio"],
        input="\n".join(json.dumps(command) for command in commands),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        return None
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    replies = [one for one in answers if "return" in one or "error" in one]
    return [reply.get("return", reply.get("error")) for reply in replies[1:-1]]


def missing(needs: tuple[DeviceNeed, ...]) -> list[str]:
    """What this QEMU lacks of what a topology needs at start."""
    wanted = [need for need in needs if need.at_start]
    # not qom-list-types, for the reason that `needs` gives
    answers = ask(
        ("-machine", "none"),
        *(
            {"execute": "device-list-properties", "arguments": {"typename": need.driver}}
            for need in wanted
        ),
    )
    assert answers is not None
    lacking: list[str] = []
    for need, properties in zip(wanted, answers, strict=True):
        if isinstance(properties, dict):
            lacking.append(need.driver)
        else:
            there = {one["name"] for one in properties}
            lacking += [f"{need.driver}.{name}" for name in need.properties - there]
    return lacking


def expected_places(topology: Topology) -> dict[str, str]:
    """The bus that each device is on, by its id; told from the topology alone."""
    places = {bridge.id: "pcie.0" for bridge in topology.bridges}
    places |= {port.id: port.bridge or "pcie.0" for port in topology.ports}
    places |= {one.id: one.port for one in (*topology.pci_bridges, *topology.igb, *topology.nvme)}
    places |= {one.id: one.port for one in topology.edu}
    if cxl := topology.cxl:
        places |= {bridge.id: "pcie.0" for bridge in cxl.bridges}
        places |= {port.id: port.bridge for port in cxl.ports}
        places |= {one.id: one.port for one in (*cxl.switches, *cxl.devices)}
        places |= {port: switch.id for switch in cxl.switches for port in switch.downstream}
    return places


@pytest.mark.parametrize("name", shipped_topologies())
def test_qemu_shows_what_the_topology_says(name: str, tmp_path: Path) -> None:
    topology = read_shipped_topology(name)
    for file in backing_files(topology, tmp_path):
        with file.path.open("wb") as image:
            image.truncate(file.size)
    answers = ask(
        (*qemu_arguments(topology, tmp_path), "-accel", "tcg", "-cpu", "max"),
        {"execute": "query-pci"},
        {"execute": "qom-list", "arguments": {"path": "/machine/peripheral"}},
        {"execute": "query-hotpluggable-cpus"},
        {"execute": "query-memdev"},
        {"execute": "query-memory-size-summary"},
        *(
            {
                "execute": "qom-get",
                "arguments": {"path": f"/machine/peripheral/{name}", "property": "parent_bus"},
            }
            for name in expected_places(topology)
        ),
    )
    if lacking := missing(device_needs(topology)):
        assert answers is None, f"QEMU started {name} without {lacking}"
        return
    assert answers is not None, f"QEMU did not start {name}"
    pci, devices, cpus, backends, memory, *places = answers
    check_buses(topology, pci)
    expected = expected_places(topology)
    # children only; the container's own type is a plain string. Subsystems and namespaces of NVMe
    # are devices, too, with a dot in their ids or none
    there = {one["name"] for one in devices if one["type"].startswith("child<")}
    assert {name for name in there if "." not in name and "[" not in name} == set(expected)
    assert [str(place).rpartition("/")[2] for place in places] == list(expected.values())
    check_cpus(topology, cpus)
    assert memory["base-memory"] == topology.total_memory
    sizes = {one["id"]: one["size"] for one in backends}
    assert [sizes[f"ram.{node.id}"] for node in topology.nodes] == [
        node.memory for node in topology.nodes
    ]
    for device in topology.cxl.devices if topology.cxl else ():
        parts = [name for name in sizes if name.startswith(f"{device.id}.")]
        assert sum(sizes[part] for part in parts) == device.capacity + (device.label_area or 0)
    if topology.cards:
        assert all(one["share"] for one in backends)
    assert sum(sizes.values()) <= 5120 * MIB


def check_buses(topology: Topology, buses: list[Any]) -> None:
    """The root buses have the topology's numbers, and hold the ports that it gives them."""
    ids = {bus["bus"]: {one["qdev_id"] for one in bus["devices"]} - {""} for bus in buses}
    cxl = topology.cxl
    numbers = {one.id: one.bus for one in (*topology.bridges, *(cxl.bridges if cxl else ()))}
    for port in topology.ports:
        assert port.id in ids[numbers[port.bridge] if port.bridge else 0]
    for cxl_port in cxl.ports if cxl else ():
        assert cxl_port.id in ids[numbers[cxl_port.bridge]]


def check_cpus(topology: Topology, cpus: list[Any]) -> None:
    """Every CPU is in its socket, core and node."""
    cpu = topology.cpu
    assert len(cpus) == cpu.max_vcpus
    for one in cpus:
        place = one["props"]
        core = place["socket-id"] * cpu.cores + place["core-id"]
        number = core * cpu.threads + place["thread-id"]
        assert number in topology.nodes[place["node-id"]].cpus
