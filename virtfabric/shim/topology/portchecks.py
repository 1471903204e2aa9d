"""Whether everything that plugs into PCIe has a place of its own, and every bus a number.

An SR-IOV function, a bridge and a card's function want a port for themselves: the VFs of QEMU's
nvme take the function numbers after their PF's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.shim.topology.seats import BRIDGE_SLOTS, PORTS_PER_BUS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtfabric.shim.topology.model import HostBridge, Topology

SPARE_BUSES: Final = 16
"""Bus numbers on the machine's own root bus for what a lab adds beside the topology."""


@dataclass(frozen=True, slots=True)
class _Occupant:
    path: str
    id: str
    port: str
    slot: int = 0
    function: int = 0
    alone: bool = True


def check_ports(topology: Topology) -> Iterator[InvalidValueError]:
    """Ports are on known bridges, taken once; buses do not overlap; nodes exist."""
    yield from _check_bridges(topology)
    yield from _check_serials(topology)
    yield from _check_seats_suffice(topology)
    yield from _check_occupants(topology)
    yield from _check_buses(topology)


def find_twice(
    values: Iterable[tuple[str, object]], what: Callable[[object], str]
) -> Iterator[InvalidValueError]:
    """A finding for each value that came before, told with the first one's path."""
    seen: dict[object, str] = {}
    for path, value in values:
        if value in seen:
            yield InvalidValueError(path, what(value), f"is also {seen[value]}")
        seen.setdefault(value, path)


def _check_serials(topology: Topology) -> Iterator[InvalidValueError]:
    serials = ((f"functions.nvme[{n}].serial", one.serial) for n, one in enumerate(topology.nvme))
    yield from find_twice(serials, str)
    macs = ((f"functions.igb[{n}].mac", one.mac) for n, one in enumerate(topology.igb))
    yield from find_twice(macs, str)


def _check_bridges(topology: Topology) -> Iterator[InvalidValueError]:
    known = {bridge.id for bridge in topology.bridges}
    nodes = {node.id for node in topology.nodes}
    for number, port in enumerate(topology.ports):
        if port.bridge is not None and port.bridge not in known:
            yield InvalidValueError(f"ports[{number}].bridge", port.bridge, "is no host bridge")
    for path, bridge in _host_bridges(topology):
        if bridge.node is not None and bridge.node not in nodes:
            yield InvalidValueError(f"{path}.node", bridge.node, "is no node")


def _host_bridges(topology: Topology) -> Iterator[tuple[str, HostBridge]]:
    for number, bridge in enumerate(topology.bridges):
        yield f"bridges[{number}]", bridge
    for number, bridge in enumerate(topology.cxl.bridges if topology.cxl else ()):
        yield f"cxl.bridges[{number}]", bridge


def _check_seats_suffice(topology: Topology) -> Iterator[InvalidValueError]:
    bridges = list(_host_bridges(topology))
    if len(bridges) > len(BRIDGE_SLOTS):
        problem = f"is host bridge {len(BRIDGE_SLOTS) + 1}, CXL ones counted: too many"
        yield InvalidValueError(bridges[len(BRIDGE_SLOTS)][0], bridges[-1][1].id, problem)
    for bus, count in Counter(port.bridge for port in topology.ports).items():
        if count > PORTS_PER_BUS:
            problem = f"root ports are on {bus or 'pcie.0'}, which has slots for {PORTS_PER_BUS}"
            yield InvalidValueError("ports", count, problem)


def _occupants(topology: Topology) -> Iterator[_Occupant]:
    for number, bridge in enumerate(topology.pci_bridges):
        yield _Occupant(f"pci_bridges[{number}].port", bridge.id, bridge.port)
    for number, nic in enumerate(topology.igb):
        yield _Occupant(f"functions.igb[{number}].port", nic.id, nic.port)
    for number, one in enumerate(topology.nvme):
        path = f"functions.nvme[{number}].port"
        alone = one.vfs is not None
        yield _Occupant(path, one.id, one.port, function=one.function, alone=alone)
    for number, edu in enumerate(topology.edu):
        path = f"functions.edu[{number}].port"
        yield _Occupant(path, edu.id, edu.port, edu.slot, edu.function, alone=False)
    for number, card in enumerate(topology.cards):
        yield _Occupant(f"cards[{number}].management", card.id, card.management)
        for place, port in enumerate(card.slices):
            yield _Occupant(f"cards[{number}].slices[{place}]", card.id, port)


def _check_occupants(topology: Topology) -> Iterator[InvalidValueError]:
    root_ports = {port.id for port in topology.ports}
    pci_bridges = {bridge.id for bridge in topology.pci_bridges}
    before: dict[str, list[_Occupant]] = {}
    for one in _occupants(topology):
        conventional = one.path.startswith("functions.edu")
        if one.port not in root_ports and not (conventional and one.port in pci_bridges):
            allowed = "root port or PCI bridge" if conventional else "root port"
            yield InvalidValueError(one.path, one.port, f"is no {allowed}")
            continue
        yield from _check_slot(one, behind_bridge=one.port in pci_bridges)
        for other in before.setdefault(one.port, []):
            if one.alone or other.alone or (one.slot, one.function) == (other.slot, other.function):
                problem = f"is taken by {other.id!r} ({other.path})"
                yield InvalidValueError(one.path, one.port, problem)
                break
        before[one.port].append(one)
    yield from _check_function_zero(before)


def _check_slot(one: _Occupant, *, behind_bridge: bool) -> Iterator[InvalidValueError]:
    parent = one.path.rpartition(".")[0]
    if behind_bridge and one.slot == 0:
        problem = "is the hot-plug controller's slot of a PCI bridge; take 1 to 31"
        yield InvalidValueError(f"{parent}.slot", one.slot, problem)
    if not behind_bridge and one.slot:
        yield InvalidValueError(f"{parent}.slot", one.slot, "is not 0, a root port's only slot")
    if one.alone and one.function:
        problem = "is not 0: a function with VFs has its slot for itself"
        yield InvalidValueError(f"{parent}.function", one.function, problem)


def _check_function_zero(behind: dict[str, list[_Occupant]]) -> Iterator[InvalidValueError]:
    for occupants in behind.values():
        there = {one.slot for one in occupants if one.function == 0}
        for one in occupants:
            if one.slot not in there:
                problem = "has no function 0 in its slot; the kernel would not find it"
                field = f"{one.path.rpartition('.')[0]}.function"
                yield InvalidValueError(field, one.function, problem)


def _check_buses(topology: Topology) -> Iterator[InvalidValueError]:
    bridge_of = {port.id: port.bridge for port in topology.ports}
    behind = Counter(bridge_of.values())
    behind.update(bridge_of[bridge.port] for bridge in topology.pci_bridges)
    if cxl := topology.cxl:
        cxl_bridge_of = {port.id: port.bridge for port in cxl.ports}
        behind.update(cxl_bridge_of.values())
        for switch in cxl.switches:
            behind[cxl_bridge_of.get(switch.port)] += 1 + len(switch.downstream)
    roots = sorted(_host_bridges(topology), key=lambda root: root[1].bus)
    end, owner = 1 + behind[None] + SPARE_BUSES, "pcie.0"
    for path, bridge in roots:
        if bridge.bus < end:
            problem = f"is a bus number of {owner}, which has those up to {end - 1}"
            yield InvalidValueError(f"{path}.bus", bridge.bus, problem)
        end, owner = bridge.bus + 1 + behind[bridge.id], bridge.id
        if end > 256:
            problem = f"leaves too few bus numbers: {behind[bridge.id]} are needed behind it"
            yield InvalidValueError(f"{path}.bus", bridge.bus, problem)
