"""Writes the generated hosts beside this file; numbered as Linux numbers such machines.

`python3 tests/data/hosts/make_hosts.py` (a test compares the files with what it would write).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A machine: `sockets` x `nodes_per_socket` x `cores` (per node) x `threads`."""

    name: str
    about: str
    sockets: int = 1
    nodes_per_socket: int = 1
    cores: int = 1
    threads: int = 1
    node_memory: int = 4 * GIB
    memory_only: int = 0
    same_socket: int = 12
    other_socket: int = 21
    memory_node: int = 24


SHAPES = (
    Shape("small-2", "2 pCPUs, one node: a CI machine", cores=2),
    Shape("flat-8", "8 cores without SMT, one node", cores=8, node_memory=16 * GIB),
    Shape("smt-4x2", "1 socket, 4 cores with SMT", cores=4, threads=2, node_memory=16 * GIB),
    Shape(
        "two-sockets", "2 sockets, 2 nodes, 8 cores each with SMT", sockets=2, cores=8, threads=2,
        node_memory=64 * GIB,
    ),
    Shape(
        "eight-nodes", "2 sockets of 4 nodes, 256 pCPUs (EPYC in NPS4)", sockets=2,
        nodes_per_socket=4, cores=16, threads=2, node_memory=128 * GIB, other_socket=32,
    ),
    Shape(
        "memory-only", "1 socket, 6 cores with SMT, and a CXL expander as a node without pCPUs",
        cores=6, threads=2, node_memory=32 * GIB, memory_only=1,
    ),
)  # fmt: skip


def make_host(shape: Shape) -> dict[str, object]:
    """The host as JSON; threads of a core are numbered one full round of cores apart."""
    node_count = shape.sockets * shape.nodes_per_socket
    core_count = node_count * shape.cores
    pcpus = []
    for number in range(core_count * shape.threads):
        core = number % core_count
        node = core // shape.cores
        siblings = [core + t * core_count for t in range(shape.threads)]
        pcpus.append(
            {
                "number": number, "node": node, "socket": node // shape.nodes_per_socket,
                "core": core, "siblings": ",".join(map(str, siblings)),
            }
        )  # fmt: skip
    nodes = []
    for node in range(node_count + shape.memory_only):
        cpus = [p["number"] for p in pcpus if p["node"] == node]
        nodes.append(
            {
                "number": node, "cpus": ",".join(map(str, cpus)),
                "memory_total": shape.node_memory,
                "memory_free": shape.node_memory * 3 // 4,
                "huge_pages": [{"size": 2 * MIB, "total": 0, "free": 0}],
                "distances": {
                    str(n): distance(shape, node_count, node, n)
                    for n in range(node_count + shape.memory_only)
                },
            }
        )  # fmt: skip
    return {"name": shape.name, "about": shape.about, "nodes": nodes, "pcpus": pcpus}


def distance(shape: Shape, cpu_nodes: int, a: int, b: int) -> int:
    """As the SLIT has it."""
    if a == b:
        return 10
    if a >= cpu_nodes or b >= cpu_nodes:
        return shape.memory_node
    near = a // shape.nodes_per_socket == b // shape.nodes_per_socket
    return shape.same_socket if near else shape.other_socket


def format_host(host: dict[str, object]) -> str:
    """One line for each node and pCPU, so that a difference can be read."""
    rows = {
        k: "[\n" + ",\n".join(f"  {json.dumps(r)}" for r in v) + "\n ]"
        if isinstance(v, list)
        else json.dumps(v)
        for k, v in host.items()
    }
    return "{\n" + ",\n".join(f' "{k}": {v}' for k, v in rows.items()) + "\n}\n"


def main() -> None:
    """Write all of them."""
    for shape in SHAPES:
        path = Path(__file__).with_name(f"{shape.name}.json")
        path.write_text(format_host(make_host(shape)), encoding="utf-8")


if __name__ == "__main__":
    main()
