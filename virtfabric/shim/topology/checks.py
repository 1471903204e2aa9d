"""What the schema cannot say of ids, CPUs and memory; `portchecks` and `cxlchecks` say the rest.

Each check yields its findings as errors with a path; nothing is changed, nothing is started.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MIB, Bytes
from virtfabric.shim.topology.cxlchecks import check_cxl
from virtfabric.shim.topology.portchecks import check_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtfabric.shim.topology.model import Cpu, Topology

MAX_VCPUS: Final = 255
MAX_APIC_ID: Final = 254
"""Beyond, x2APIC and an interrupt remapper in EIM mode are needed; no lab wants that many."""
MEMORY_UNIT: Final = Bytes(2 * MIB)
"""A huge page of x86: the coarsest page that a memory backend may have to be cut into."""
MAX_ADDRESS: Final = 1 << 40
"""`-cpu max` under TCG has 40 physical address bits (TCG_PHYS_ADDR_BITS, target/i386/cpu.h)."""
_PCI_HOLE: Final = 64 << 30
"""Left for the hole below 4 GiB and the 64-bit BARs above all memory."""


class _Named(Protocol):
    @property
    def id(self) -> str: ...


def check_topology(topology: Topology) -> None:
    """Check that a topology is possible.

    Raises:
        InvalidValueError: the first finding, by its path in the JSON.
    """
    checks = (
        check_ids,
        check_node_ids,
        check_cpus,
        check_memory,
        check_distances,
        check_ports,
        check_cxl,
    )
    for finding in chain.from_iterable(check(topology) for check in checks):
        raise finding


def check_ids(topology: Topology) -> Iterator[InvalidValueError]:
    """An id names one thing."""
    seen: dict[str, str] = {}
    for path, name in _ids(topology):
        if name in seen:
            yield InvalidValueError(path, name, f"is also {seen[name]}")
        seen[name] = path


def _ids(topology: Topology) -> Iterator[tuple[str, str]]:
    lists: dict[str, Sequence[_Named]] = {
        "bridges": topology.bridges,
        "ports": topology.ports,
        "pci_bridges": topology.pci_bridges,
        "functions.igb": topology.igb,
        "functions.nvme": topology.nvme,
        "functions.edu": topology.edu,
        "cards": topology.cards,
    }
    if cxl := topology.cxl:
        lists |= {
            "cxl.bridges": cxl.bridges,
            "cxl.ports": cxl.ports,
            "cxl.switches": cxl.switches,
            "cxl.devices": cxl.devices,
        }
        for number, switch in enumerate(cxl.switches):
            for place, port in enumerate(switch.downstream):
                yield f"cxl.switches[{number}].downstream[{place}]", port
    for path, things in lists.items():
        for number, thing in enumerate(things):
            yield f"{path}[{number}].id", thing.id


def check_cpus(topology: Topology) -> Iterator[InvalidValueError]:
    """No more vCPUs than there can be; each in exactly one node, beside its siblings."""
    cpu = topology.cpu
    shape = f"{cpu.sockets} x {cpu.cores} x {cpu.threads}"
    if cpu.max_vcpus > MAX_VCPUS:
        yield InvalidValueError("cpu", shape, f"is {cpu.max_vcpus} CPUs, more than {MAX_VCPUS}")
        return
    if (last := _last_apic_id(cpu)) > MAX_APIC_ID:
        problem = f"has APIC ids up to {last}, more than {MAX_APIC_ID}"
        advice = "powers of two for cores and threads leave out none"
        yield InvalidValueError("cpu", shape, problem, advice=advice)
        return
    if cpu.boot_vcpus > cpu.max_vcpus:
        problem = f"is more than sockets x cores x threads, {cpu.max_vcpus}"
        yield InvalidValueError("cpu.vcpus", cpu.vcpus, problem)
    if topology.nodes:
        yield from _check_node_cpus(topology)


def _last_apic_id(cpu: Cpu) -> int:
    """Socket, core and thread have whole bits of an id (QEMU's include/hw/i386/topology.h)."""
    thread_bits, core_bits = (cpu.threads - 1).bit_length(), (cpu.cores - 1).bit_length()
    socket_and_core = (cpu.sockets - 1 << core_bits) + cpu.cores - 1
    return (socket_and_core << thread_bits) + cpu.threads - 1


def _check_node_cpus(topology: Topology) -> Iterator[InvalidValueError]:
    cpu = topology.cpu
    node_of: dict[int, int] = {}
    for number, node in enumerate(topology.nodes):
        path = f"nodes[{number}].cpus"
        for one in node.cpus:
            if one >= cpu.max_vcpus:
                problem = f"has CPU {one}, but the host has {cpu.max_vcpus} (0 is the first)"
                yield InvalidValueError(path, str(node.cpus), problem)
            elif one in node_of:
                problem = f"has CPU {one}, which is in node {node_of[one]}, too"
                yield InvalidValueError(path, str(node.cpus), problem)
            node_of.setdefault(one, node.id)
    for one in range(cpu.max_vcpus):
        if one not in node_of:
            yield InvalidValueError("nodes", one, "is a CPU that is in no node")
            return
    yield from _check_siblings(topology, cpu, node_of)


def _check_siblings(
    topology: Topology, cpu: Cpu, node_of: dict[int, int]
) -> Iterator[InvalidValueError]:
    for first in range(0, cpu.max_vcpus, cpu.threads):
        nodes = {node_of[one] for one in range(first, first + cpu.threads)}
        if len(nodes) > 1:
            number = next(n for n, node in enumerate(topology.nodes) if first in node.cpus)
            cpus = str(topology.nodes[number].cpus)
            siblings = f"{first}-{first + cpu.threads - 1}"
            problem = f"splits the siblings {siblings} of one core over nodes {sorted(nodes)}"
            yield InvalidValueError(f"nodes[{number}].cpus", cpus, problem)
            return


def check_memory(topology: Topology) -> Iterator[InvalidValueError]:
    """Memory is said once, in whole huge pages, within the address space."""
    if topology.memory is None and not topology.nodes:
        yield InvalidValueError("nodes", None, "is missing", advice="give nodes, or memory")
    if topology.memory is not None and topology.nodes:
        yield InvalidValueError("memory", str(topology.memory), "is said by the nodes already")
    amounts = [(f"nodes[{n}].memory", node.memory) for n, node in enumerate(topology.nodes)]
    if topology.memory is not None:
        amounts.append(("memory", topology.memory))
    for path, amount in amounts:
        if amount % MEMORY_UNIT:
            yield InvalidValueError(path, str(amount), f"is not a multiple of {MEMORY_UNIT}")
    windows = sum(window.size for window in topology.cxl.windows) if topology.cxl else 0
    if topology.total_memory + windows + _PCI_HOLE > MAX_ADDRESS:
        amount = Bytes(topology.total_memory + windows)
        problem = "of memory and CXL windows are more than 40 address bits reach"
        yield InvalidValueError("topology", str(amount), problem)


def check_node_ids(topology: Topology) -> Iterator[InvalidValueError]:
    """Nodes are 0, 1, 2..., as QEMU wants them."""
    for number, node in enumerate(topology.nodes):
        if node.id != number:
            problem = f"is not {number}: nodes come in order, without gaps"
            yield InvalidValueError(f"nodes[{number}].id", node.id, problem)


def check_distances(topology: Topology) -> Iterator[InvalidValueError]:
    """A square of the nodes, 10 on the diagonal and more elsewhere."""
    rows = topology.distances
    if rows is None:
        return
    count = len(topology.nodes)
    if len(rows) != count:
        yield InvalidValueError(
            "distances", len(rows), f"rows are not one for each of {count} nodes"
        )
        return
    for source, row in enumerate(rows):
        if len(row) != count:
            problem = f"entries are not one for each of {count} nodes"
            yield InvalidValueError(f"distances[{source}]", len(row), problem)
        for target, distance in enumerate(row):
            if (distance == 10) != (source == target):
                problem = "is not 10" if source == target else "is a node's distance to itself"
                yield InvalidValueError(f"distances[{source}][{target}]", distance, problem)
