"""Nearness: how far a PCIe function is from a guest's memory and CPUs, by the host's distances.

Owns where a guest's memory is, and where it may be pulled to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.guest import NumaMode

if TYPE_CHECKING:
    from collections.abc import Collection

    from virtfabric.model.device import PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import HostTopology
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot

LOCAL: Final = 10
"""SLIT's distance of a node to itself (ACPI 6.5, 5.2.17)."""
REMOTE: Final = 20
"""The kernel's REMOTE_DISTANCE (include/linux/topology.h), where firmware gives no SLIT."""


def distance(topology: HostTopology, a: int, b: int) -> int:
    """How much farther than local node `b` is from node `a`, in SLIT units."""
    known = topology.nodes[a].distances if a in topology.nodes else {}
    return max(0, known.get(b, LOCAL if a == b else REMOTE) - LOCAL)


def farness(topology: HostTopology, node: int | None, homes: Collection[int]) -> int:
    """From a function on `node` to the nearest of `homes`; 0 where one of them is not known."""
    if node is None:
        return 0
    return min((distance(topology, node, home) for home in homes), default=0)


def memory_nodes(snapshot: HostSnapshot, guest: GuestId) -> frozenset[int]:
    """Nodes that its memory is bound to; empty where nothing is known."""
    state = snapshot.guests.get(guest)
    if state is None:
        return frozenset()
    known = frozenset(snapshot.topology.nodes)
    return frozenset(state.numa_nodes or state.config_numa_nodes) & known


def cpu_nodes(snapshot: HostSnapshot, guest: GuestId) -> frozenset[int]:
    """Nodes of its own pCPUs; empty for a shared guest, which may run on all of the pool."""
    holding = snapshot.books.holdings.get(guest)
    pcpus = snapshot.topology.pcpus
    return frozenset(pcpus[c].node for c in holding.order if c in pcpus) if holding else frozenset()


def far_from(snapshot: HostSnapshot, guest: GuestId, node: int) -> int:
    """How far memory of a node is from the guest's pCPUs; from its DRAM, where it floats."""
    homes = cpu_nodes(snapshot, guest) or memory_nodes(snapshot, guest)
    topology = snapshot.topology
    return farness(topology, node, [n for n in homes if n not in topology.cxl_nodes])


def remoteness(snapshot: HostSnapshot, guest: GuestId, address: PciAddress) -> int:
    """How far a function is from a guest's memory and its CPUs together."""
    function = snapshot.devices.functions.get(address)
    node = function.node if function else None
    homes = (memory_nodes(snapshot, guest), cpu_nodes(snapshot, guest))
    return sum(farness(snapshot.topology, node, places) for places in homes)


def pullable_nodes(snapshot: HostSnapshot, state: GuestState, memory: int) -> frozenset[int]:
    """Nodes that a movable guest's memory of so many bytes may follow to; empty for any other.

    None once it has a function: vfio-pci pins all its pages where they are. None on huge pages:
    each of them needs one there, and the pools' sizes would change with every pull.
    """
    nodes = snapshot.topology.nodes
    home = frozenset((state.numa_nodes or state.config_numa_nodes) & frozenset(nodes))
    if state.numa_mode is not NumaMode.RESTRICTIVE or state.devices or state.on_huge_pages:
        return frozenset()
    if not all(nodes[n].cpus for n in home):
        return frozenset()  # memory on a CPU-less node is there on purpose
    # the operator's nodes are a limit
    allowed = state.config_numa_nodes or frozenset(nodes)
    return frozenset(n for n, node in nodes.items() if n in allowed and node.memory_free >= memory)
