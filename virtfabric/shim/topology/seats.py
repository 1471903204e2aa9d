"""Who sits where: slots, functions and numbers of everything on the root buses. Always the same.

On pcie.0 slots 0x01 to 0x0f stay free for what others add (disk, NIC, console; libvirt counts up
from 1) and 0x1f is the chipset's. Root ports sit in 0x10 to 0x17, eight in a slot, as libvirt
seats them; host bridges in 0x18 to 0x1e. On a host bridge of its own, root ports sit in 0 to 7,
CXL root ports one in a slot.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtfabric.shim.topology.model import Topology

ROOT_BUS: Final = "pcie.0"
PORT_SLOTS: Final = range(0x10, 0x18)
BRIDGE_SLOTS: Final = range(0x18, 0x1F)
PORTS_PER_SLOT: Final = 8
PORTS_PER_BUS: Final = len(PORT_SLOTS) * PORTS_PER_SLOT
CXL_PORTS_PER_BUS: Final = 32


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a port sits.

    Attributes:
        bus: id of the bus it is on.
        multifunction: whether it shares its slot with others.
        number: its chassis and slot number, from 1; no two ports have the same. A chassis is one
            byte to QEMU; bus numbers, of which each port takes one, run out first.
        index: its place among the ports of its bridge or switch, from 0.
    """

    bus: str
    slot: int
    function: int
    multifunction: bool
    number: int
    index: int

    @property
    def address(self) -> str:
        """QEMU's `addr`."""
        return f"{self.slot:#x}.{self.function:#x}" if self.multifunction else f"{self.slot:#x}"


def choose_bridge_slots(topology: Topology) -> Mapping[str, int]:
    """The slot on pcie.0 of each host bridge, CXL ones after the others."""
    bridges = (*topology.bridges, *(topology.cxl.bridges if topology.cxl else ()))
    return {bridge.id: slot for bridge, slot in zip(bridges, BRIDGE_SLOTS, strict=False)}


def choose_seats(topology: Topology) -> Mapping[str, Seat]:
    """The seat of each root port, CXL root port and downstream port, by its id."""
    seats = dict(_root_port_seats(topology))
    cxl = topology.cxl
    if cxl is None:
        return seats
    places: defaultdict[str, int] = defaultdict(int)
    on_switches = [(port, switch.id) for switch in cxl.switches for port in switch.downstream]
    for name, bus in [*((port.id, port.bridge) for port in cxl.ports), *on_switches]:
        index = places[bus]
        places[bus] += 1
        seats[name] = Seat(bus, index, 0, False, len(seats) + 1, index)  # noqa: FBT003
    return seats


def _root_port_seats(topology: Topology) -> Iterator[tuple[str, Seat]]:
    totals = Counter(port.bridge for port in topology.ports)
    places: defaultdict[str | None, int] = defaultdict(int)
    for number, port in enumerate(topology.ports, start=1):
        index = places[port.bridge]
        places[port.bridge] += 1
        row, function = divmod(index, PORTS_PER_SLOT)
        shared = function > 0 or index + 1 < totals[port.bridge]
        slot = row if port.bridge else PORT_SLOTS[row]
        yield port.id, Seat(port.bridge or ROOT_BUS, slot, function, shared, number, index)
