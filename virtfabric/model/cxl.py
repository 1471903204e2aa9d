"""CXL memory of a host: devices, ports, windows, and the regions made of them.

A *memdev* is a CXL memory device, a *window* a range of host addresses that the platform routes to
CXL (the kernel's root decoder), a *region* a part of a window that memdevs answer for. A volatile
region shows as a *dax device*, which the kernel turns into memory of a NUMA node.

The kernel's names (`mem0`, `region0`, `dax0.0`) change between boots: whatever is kept names a
memdev by its serial and a region by its window's base and its members.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MAX_BYTES, MIB, Bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from virtfabric.model.device import PciAddress
    from virtfabric.model.host import NumaNode

ALIGNMENT: Final = 256 * MIB
"""Every capacity, window and share of a region is a multiple of it (CXL 3.1, 8.2.9.9.1.1)."""
_SERIAL_BITS: Final = 64


class Serial(int):
    """Who a memdev is: its PCIe device serial number, 64 bits, shown as `0x100`."""

    @classmethod
    def parse(cls, text: str, *, field: str = "serial") -> Self:
        """Read a serial in hexadecimal with `0x`, or in decimal.

        Raises:
            InvalidValueError: not a number, or one that no device can have.
        """
        try:
            value = int(text, 0)
        except ValueError:
            raise InvalidValueError(
                field, text, "is not a serial number", advice="write it like 0x100"
            ) from None
        if not 0 < value < 1 << _SERIAL_BITS:
            raise InvalidValueError(field, text, "is not a serial number that a device can have")
        return cls(value)

    def __str__(self) -> str:
        return f"{int(self):#x}"


@dataclass(frozen=True, slots=True)
class PoisonRecord:
    """A part of a memdev that lost its content: offset and length in bytes of the device.

    Attributes:
        source: who found it, in the words of `cxl list`: `Internal`, `External`, `Injected`...
    """

    offset: int
    length: int
    source: str = ""

    def __str__(self) -> str:
        found = f" ({self.source.lower()})" if self.source else ""
        return f"{Bytes(self.length)} at {self.offset:#x}{found}"


@dataclass(frozen=True, slots=True)
class Condition:
    """How a memdev does, as it tells itself.

    Attributes:
        health: `ok`, or in words what is wrong; empty where it was not asked.
        poison: its poison list; empty where it was not asked.
    """

    health: str = ""
    poison: tuple[PoisonRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Memdev:
    """A CXL memory device.

    Attributes:
        name: the kernel's of this boot, for its tools only.
        serial: None where the device tells none that can be one.
        ram, pmem: bytes, volatile and persistent.
        node: of the host bridge that it is behind; None where the firmware does not say.
        address: its PCI function; None for one that is none (a mock).
        port: the port or switch that it is behind, by the kernel's name.
        firmware: revision, as the device words it.
        problems: why it is not used, for people; empty for a sound one.
    """

    name: str
    serial: Serial | None
    ram: Bytes = Bytes(0)
    pmem: Bytes = Bytes(0)
    node: int | None = None
    address: PciAddress | None = None
    port: str = ""
    firmware: str = ""
    condition: Condition = Condition()
    problems: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a region may be made of it."""
        return not self.problems

    @property
    def label(self) -> str:
        """`0x100`, or the kernel's name for one without a serial."""
        return self.name if self.serial is None else str(self.serial)


class PortKind(StrEnum):
    """What a CXL port is."""

    ROOT = "root"
    BRIDGE = "host bridge"
    SWITCH = "switch"


@dataclass(frozen=True, slots=True)
class CxlPort:
    """The root, a host bridge or a switch.

    Attributes:
        name: the kernel's.
        parent: the port above; empty for the root.
        device: what it is on: `pci0000:40` for a bridge, a PCI address for a switch.
        decoders: how many address decoders it has.
    """

    name: str
    kind: PortKind
    parent: str = ""
    device: str = ""
    decoders: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """A root decoder: host addresses that the platform routes to host bridges.

    Attributes:
        name: the kernel's (`decoder0.0`).
        base: first address; who a window is.
        ram, pmem: which memory may be mapped there.
        granularity: bytes before the next host bridge's turn; 0 where there is one only.
        targets: names of the ports of its host bridges, in the order of interleaving.
    """

    name: str
    base: int
    size: Bytes
    ram: bool = True
    pmem: bool = False
    ways: int = 1
    granularity: int = 0
    targets: tuple[str, ...] = ()


class MemoryState(StrEnum):
    """What the kernel does with the memory of a dax device."""

    ONLINE = "online"
    PARTLY = "partly online"
    OFFLINE = "offline"
    DEVICE = "device"
    """It is no system memory: programs may map the device."""


@dataclass(frozen=True, slots=True)
class DaxDevice:
    """A range of memory that the kernel may use as its own.

    Attributes:
        name: `dax0.0`.
        node: the NUMA node that it becomes or is; None where none is told.
        movable: whether all that is online is in ZONE_MOVABLE: it can be taken offline again.
    """

    name: str
    size: Bytes
    node: int | None
    state: MemoryState
    movable: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a window with memdevs behind it.

    Attributes:
        name: the kernel's of this boot.
        window: the window's name; empty where it is not told.
        base: first address; 0 until one is assigned.
        granularity: bytes before the next memdev's turn.
        mode: `ram` or `pmem`.
        members: memdevs' serials in the order of interleaving; None for one that is unknown.
        committed: whether the decoders are programmed.
        ours: whether this agent made it; any other is never changed.
        problems: for people; empty for a sound one.
    """

    name: str
    window: str
    base: int
    size: Bytes
    ways: int = 1
    granularity: int = 0
    mode: str = "ram"
    members: tuple[Serial | None, ...] = ()
    committed: bool = False
    ours: bool = False
    dax: tuple[DaxDevice, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA nodes that it becomes or is."""
        return tuple(sorted({d.node for d in self.dax if d.node is not None}))


@dataclass(frozen=True)
class CxlInventory:
    """All CXL memory of a host. An empty one is a host without any.

    Attributes:
        problems: what is wrong with it, in words, devices' and regions' own problems included.
    """

    memdevs: tuple[Memdev, ...] = ()
    ports: tuple[CxlPort, ...] = ()
    windows: tuple[Window, ...] = ()
    regions: tuple[Region, ...] = ()
    problems: tuple[str, ...] = ()

    @cached_property
    def usable(self) -> dict[Serial, Memdev]:
        """Memdevs of which regions may be made, by serial: each one is the only one with it."""
        return {m.serial: m for m in self.memdevs if m.usable and m.serial is not None}

    @cached_property
    def node_regions(self) -> dict[int, Region]:
        """The region that each NUMA node of the tier `cxl` is made of."""
        return {node: region for region in self.regions for node in region.nodes}

    @cached_property
    def taken(self) -> frozenset[Serial]:
        """Memdevs that are part of a region."""
        return frozenset(s for r in self.regions for s in r.members if s is not None)

    def window_at(self, base: int) -> Window | None:
        """The window that begins there."""
        return next((w for w in self.windows if w.base == base), None)

    def region_of(self, base: int, members: tuple[Serial, ...]) -> Region | None:
        """The region of exactly these members, in this order, in the window that begins there."""
        window = self.window_at(base)
        return next(
            (
                r
                for r in self.regions
                if window and r.window == window.name and r.members == members
            ),
            None,
        )

    def behind(self, port: str) -> frozenset[str]:
        """Names of a port and all ports below it."""
        found, added = {port}, {port}
        while added:
            added = {one.name for one in self.ports if one.parent in added} - found
            found |= added
        return frozenset(found)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What there is of memory: NUMA nodes by number, and the CXL memory that some are made of."""

    nodes: Mapping[int, NumaNode] = field(default_factory=dict)
    cxl: CxlInventory = field(default_factory=CxlInventory)


def check_capacity(name: str, amount: int) -> str:
    """What is wrong with an amount that a memdev tells, in words; empty when nothing is."""
    if not 0 <= amount <= MAX_BYTES:
        return f"its {name} capacity of {amount} bytes is impossible"
    if amount % ALIGNMENT:
        return f"its {name} capacity of {Bytes(amount)} is no multiple of {Bytes(ALIGNMENT)}"
    return ""
