"""Topologies for tests: valid ones out of hypothesis, and one to break in a single place."""

from __future__ import annotations

import copy
import json
from typing import Any

from examples import examples
from hypothesis import settings
from hypothesis import strategies as st

from virtfabric.model.units import GIB, KIB, MIB, Bytes, CpuSet
from virtfabric.shim.topology.model import (
    Card,
    Cpu,
    Cxl,
    CxlPort,
    CxlSwitch,
    Edu,
    HostBridge,
    Igb,
    Node,
    Nvme,
    NvmeVfs,
    PciBridge,
    RootPort,
    Topology,
    Type3,
    Window,
)

SOME = settings(max_examples=examples(40), deadline=None)

WHOLE: dict[str, Any] = {
    "version": 1,
    "cpu": {"sockets": 2, "cores": 2, "threads": 2},
    "nodes": [
        {"id": 0, "memory": "1GiB", "cpus": "0-3"},
        {"id": 1, "memory": "1GiB", "cpus": "4-7"},
        {"id": 2, "memory": "256MiB"},
    ],
    "distances": [[10, 20, 30], [20, 10, 30], [30, 30, 10]],
    "bridges": [{"id": "pxb1", "bus": 40, "node": 1}],
    "ports": [
        {"id": "p0"},
        {"id": "p1"},
        {"id": "p2"},
        {"id": "p3"},
        {"id": "p4"},
        {"id": "p5", "bridge": "pxb1"},
        {"id": "p6", "bridge": "pxb1"},
    ],
    "pci_bridges": [{"id": "pci0", "port": "p0"}],
    "functions": {
        "igb": [{"id": "igb0", "port": "p1", "mac": "52:54:00:00:00:01"}],
        "nvme": [
            {"id": "nvme0", "port": "p2", "serial": "n0", "size": "64MiB", "vfs": {"count": 4}},
            {"id": "nvme1", "port": "p3", "serial": "n1", "size": "64MiB"},
        ],
        "edu": [
            {"id": "edu0", "port": "pci0", "slot": 1},
            {"id": "edu1", "port": "p3", "function": 1},
        ],
    },
    "cards": [{"id": "card0", "management": "p4", "slices": ["p5"]}],
    "cxl": {
        "bridges": [{"id": "cxl0", "bus": 64, "node": 0}, {"id": "cxl1", "bus": 96}],
        "ports": [
            {"id": "c0", "bridge": "cxl0"},
            {"id": "c1", "bridge": "cxl0"},
            {"id": "c2", "bridge": "cxl1"},
        ],
        "switches": [{"id": "sw0", "port": "c1", "downstream": ["d0", "d1"]}],
        "devices": [
            {"id": "mem0", "port": "c0", "serial": "0x1", "volatile": "256MiB"},
            {
                "id": "mem1",
                "port": "d0",
                "serial": "0x2",
                "persistent": "256MiB",
                "label_area": "1MiB",
            },
        ],
        "windows": [
            {"targets": ["cxl0"], "size": "1GiB"},
            {"targets": ["cxl0", "cxl1"], "size": "1GiB", "granularity": "4KiB"},
        ],
    },
}


def changed(path: str, value: object) -> str:
    """The text of `WHOLE` with one value changed; `path` is dotted, `-` appends to a list."""
    document = copy.deepcopy(WHOLE)
    *steps, last = path.split(".")
    place: Any = document
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if last == "-":
        place.append(value)
    elif isinstance(place, list):
        place[int(last)] = value
    elif value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any valid topology, of a size that keeps tests fast."""
    cpu = Cpu(
        sockets=draw(st.integers(1, 4)),
        cores=draw(st.integers(1, 4)),
        threads=draw(st.integers(1, 2)),
    )
    if draw(st.booleans()):
        cpu = Cpu(
            sockets=cpu.sockets,
            cores=cpu.cores,
            threads=cpu.threads,
            vcpus=draw(st.integers(1, cpu.max_vcpus)),
        )
    nodes = draw(_nodes(cpu)) if draw(st.booleans()) else ()
    bridges = tuple(
        HostBridge(id=f"pxb{n}", bus=100 + 12 * n, node=draw(_node_of(nodes)))
        for n in range(draw(st.integers(0, 2)))
    )
    choices = [None, *(bridge.id for bridge in bridges)]
    ports = tuple(
        RootPort(id=f"p{n}", bridge=draw(st.sampled_from(choices)), acs=draw(st.booleans()))
        for n in range(draw(st.integers(0, 10)))
    )
    behind: dict[str, Any] = {"pci_bridges": [], "igb": [], "nvme": [], "edu": [], "cards": []}
    for port in ports:
        draw(_behind(port.id, behind))
    return Topology(
        cpu=cpu,
        description=draw(st.text(max_size=20)),
        memory=None if nodes else draw(_memory()),
        nodes=nodes,
        distances=draw(_distances(len(nodes))) if nodes else None,
        iommu=draw(st.booleans()),
        bridges=bridges,
        ports=ports,
        cxl=draw(_cxl(nodes)) if nodes and draw(st.booleans()) else None,
        **{kind: tuple(things) for kind, things in behind.items()},
    )


def _memory() -> st.SearchStrategy[Bytes]:
    return st.integers(1, 2048).map(lambda pages: Bytes(pages * 2 * MIB))


@st.composite
def _nodes(draw: st.DrawFn, cpu: Cpu) -> tuple[Node, ...]:
    cores = cpu.sockets * cpu.cores
    owners = [draw(st.integers(0, 2)) for _ in range(cores)]
    return tuple(
        Node(
            id=number,
            memory=draw(_memory()),
            cpus=CpuSet.of(
                core * cpu.threads + thread
                for core in range(cores)
                if owners[core] == number
                for thread in range(cpu.threads)
            ),
        )
        for number in range(3)
    )


@st.composite
def _distances(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], ...] | None:
    if draw(st.booleans()):
        return None
    return tuple(
        tuple(10 if a == b else draw(st.integers(11, 255)) for b in range(count))
        for a in range(count)
    )


def _node_of(nodes: tuple[Node, ...]) -> st.SearchStrategy[int | None]:
    return st.sampled_from([None, *(node.id for node in nodes)])


@st.composite
def _behind(draw: st.DrawFn, port: str, behind: dict[str, Any]) -> None:
    kinds = ("nothing", "pci", "igb", "nvme", "nvme-vfs", "edu", "slot", "card")
    match draw(st.sampled_from(kinds)):
        case "pci":
            behind["pci_bridges"].append(PciBridge(id=f"{port}-pci", port=port))
            for slot in draw(st.sets(st.integers(1, 31), max_size=3)):
                place = {"port": f"{port}-pci", "slot": slot}
                behind["edu"].append(Edu(id=f"{port}-edu{slot}", **place))
        case "igb":
            mac = f"52:54:00:00:00:{len(behind['igb']):02x}"
            wire = draw(st.integers(0, 3))
            behind["igb"].append(Igb(id=f"{port}-igb", port=port, mac=mac, wire=wire))
        case "nvme" | "nvme-vfs" as kind:
            counts = st.builds(NvmeVfs, count=st.integers(1, 8), queues=st.integers(2, 4))
            size = Bytes(draw(st.integers(1, 4096)) * KIB)
            vfs = draw(counts) if kind == "nvme-vfs" else None
            name = f"{port}-nvme"
            behind["nvme"].append(Nvme(id=name, port=port, serial=name, size=size, vfs=vfs))
        case "edu":
            behind["edu"].append(Edu(id=f"{port}-edu", port=port))
        case "slot":
            for function in {0, *draw(st.sets(st.integers(0, 7), max_size=3))}:
                edu = Edu(id=f"{port}-edu{function}", port=port, function=function)
                behind["edu"].append(edu)
        case "card":
            behind["cards"].append(Card(id=f"{port}-card", management=port, slices=()))


@st.composite
def _cxl(draw: st.DrawFn, nodes: tuple[Node, ...]) -> Cxl:
    bridges = tuple(
        HostBridge(id=f"cxl{n}", bus=150 + 24 * n, node=draw(_node_of(nodes)))
        for n in range(draw(st.integers(1, 2)))
    )
    ports = tuple(
        CxlPort(id=f"c{n}", bridge=draw(st.sampled_from(bridges)).id)
        for n in range(draw(st.integers(1, 6)))
    )
    switches: list[CxlSwitch] = []
    devices: list[Type3] = []
    for port in ports:
        free = [port.id]
        if draw(st.booleans()):
            downstream = tuple(f"{port.id}-d{n}" for n in range(draw(st.integers(1, 2))))
            switches.append(CxlSwitch(id=f"{port.id}-sw", port=port.id, downstream=downstream))
            free = list(downstream)
        for place in free:
            if draw(st.booleans()):
                devices.append(draw(_type3(place, len(devices))))
    size = Bytes(max(4 * GIB, 2 * sum(device.capacity for device in devices)))
    windows = [Window(targets=(bridge.id,), size=size) for bridge in bridges]
    if len(bridges) == 2:
        granularity = Bytes(draw(st.sampled_from([256, 4096, 16384])))
        targets = tuple(bridge.id for bridge in bridges)
        windows.append(Window(targets=targets, size=size, granularity=granularity))
    return Cxl(
        bridges=bridges,
        ports=ports,
        switches=tuple(switches),
        devices=tuple(devices),
        windows=tuple(windows),
    )


@st.composite
def _type3(draw: st.DrawFn, port: str, number: int) -> Type3:
    size = Bytes(draw(st.integers(1, 4)) * 256 * MIB)
    serial = 0x100 + number
    match draw(st.sampled_from(("volatile", "persistent", "both"))):
        case "volatile":
            return Type3(id=f"{port}-mem", port=port, serial=serial, volatile=size)
        case kind:
            return Type3(
                id=f"{port}-mem",
                port=port,
                serial=serial,
                volatile=size if kind == "both" else None,
                persistent=size,
                label_area=Bytes(MIB),
            )
