"""A topology for vagrant-libvirt: settings of the provider, and the rest as its `qemuargs`.

libvirt makes CPUs, RAM and the nodes that have CPUs; vagrant-libvirt (0.11) can say no more of a
node. Arguments of `qemuargs` come after libvirt's own, and QEMU lets a later `-m` win, which is how
nodes of memory only are added.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MIB
from virtfabric.shim.topology.arguments import (
    NO_WATCHDOG,
    device_arguments,
    distance_arguments,
    machine_options,
    node_arguments,
)
from virtfabric.shim.topology.kernel import kernel_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.model.units import CpuSet
    from virtfabric.shim.topology.model import Topology


def check_for_vagrant(topology: Topology) -> None:
    """Check that vagrant-libvirt can make a valid topology.

    Raises:
        InvalidValueError: it cannot.
    """
    # it numbers nodes by their place among those it is told of, all of which must have CPUs
    last = max((node.id for node in topology.nodes if node.cpus), default=-1)
    for number, node in enumerate(topology.nodes[: last + 1]):
        field, cpus = f"nodes[{number}].cpus", str(node.cpus)
        if not cpus:
            problem = f"is missing, and node {last} has CPUs: under Vagrant such nodes come last"
            raise InvalidValueError(field, None, problem)
        if "," in cpus:
            raise InvalidValueError(field, cpus, "is several runs of CPUs; Vagrant takes one")
        if number == last and max(node.cpus) + 1 != topology.cpu.max_vcpus:
            problem = "is without the last CPU, which under Vagrant the last node must have"
            raise InvalidValueError(field, cpus, problem)


def vagrant_qemuargs(topology: Topology, state: Path) -> tuple[str, ...]:
    """The values for `libvirt.qemuargs`, one for each QEMU argument.

    `state` is the directory of the topology's `backing_files`, readable by libvirt's QEMU.
    """
    arguments = [*NO_WATCHDOG]
    if options := machine_options(topology):
        arguments += ["-machine", ",".join(options)]
    if bare := {node.id for node in topology.nodes if not node.cpus}:
        arguments += ["-m", f"size={topology.total_memory // MIB}M"]
        arguments += node_arguments(topology, ids=bare)
    arguments += distance_arguments(topology)
    arguments += device_arguments(topology, state)
    return tuple(arguments)


def format_vagrant_settings(topology: Topology, state: Path) -> str:
    """What a Vagrantfile sets on its provider, as a JSON object.

    `cpus`, `memory` (MiB), `cputopology` and `numa_nodes` are in vagrant-libvirt's own words.
    `memory_backing` is what to pass to `memorybacking`, in order; `qemuargs` is a list of values;
    `kernel_arguments` belong on the kernel's command line. All CPUs are there at start, whatever
    `cpu.vcpus` says.

    Raises:
        InvalidValueError: see `check_for_vagrant`.
    """
    check_for_vagrant(topology)
    cpu = topology.cpu
    with_cpus = [node for node in topology.nodes if node.cpus]
    total = sum(node.memory for node in with_cpus) or topology.total_memory
    access = {"memAccess": "shared"} if topology.shared_memory else {}
    settings = {
        "cpus": cpu.max_vcpus,
        "memory": total // MIB,
        "cputopology": {
            "sockets": str(cpu.sockets),
            "cores": str(cpu.cores),
            "threads": str(cpu.threads),
        },
        "numa_nodes": [
            {"cpus": _format_run(node.cpus), "memory": str(node.memory // MIB)} | access
            for node in with_cpus
        ],
        "memory_backing": [["source", {"type": "memfd"}], ["access", {"mode": "shared"}]]
        if topology.shared_memory
        else [],
        "qemuargs": list(vagrant_qemuargs(topology, state)),
        "kernel_arguments": list(kernel_arguments(topology)),
    }
    return json.dumps(settings, indent=2) + "\n"


def _format_run(cpus: CpuSet) -> str:
    """vagrant-libvirt wants "0-0" for one CPU."""
    return f"{cpus}-{cpus}" if len(cpus) == 1 else str(cpus)
