"""The nouns of a lab host. Frozen; `checks` says which combinations make sense.

An id names one thing in the whole topology and is its id in QEMU, too. It holds no dot, so that
what other modules add beside it (`nvme0.subsys`, `pci.3` of libvirt) can never be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The host's CPUs. Numbers run through threads, then cores, then sockets.

    Attributes:
        cores: in each socket; `threads` in each core.
        vcpus: there at start, the rest is hot-plugged; None means all.
    """

    sockets: int
    cores: int
    threads: int
    vcpus: int | None = None

    @property
    def max_vcpus(self) -> int:
        """How many there can ever be."""
        return self.sockets * self.cores * self.threads

    @property
    def boot_vcpus(self) -> int:
        """How many are there at start."""
        return self.max_vcpus if self.vcpus is None else self.vcpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A NUMA node; without CPUs it is memory only."""

    id: int
    memory: Bytes
    cpus: CpuSet = field(default_factory=CpuSet)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBridge:
    """A root bus of its own (pxb-pcie, or pxb-cxl in `Cxl`).

    Attributes:
        bus: its bus number; what is behind it takes the numbers after it.
        node: the NUMA node that everything behind it belongs to; None for none.
    """

    id: str
    bus: int
    node: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RootPort:
    """A PCIe root port. One that nothing refers to is spare, for hot-plug.

    Attributes:
        bridge: the host bridge it is on; None means the machine's own, pcie.0.
        acs: without it, everything behind the port and the port itself are one IOMMU group (see
            `kernel`), which ports without it in the same slot share.
    """

    id: str
    bridge: str | None = None
    acs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PciBridge:
    """A PCIe-to-PCI bridge: all functions behind it are one IOMMU group."""

    id: str
    port: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Igb:
    """An SR-IOV NIC (Intel 82576). It always has eight VFs, of which Linux's driver takes seven.

    Attributes:
        wire: NICs with the same number are on one hub.
    """

    id: str
    port: str
    mac: str
    wire: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeVfs:
    """The VFs of an NVMe controller; each can have `queues` queues, the admin queue included."""

    count: int
    queues: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvme:
    """An NVMe controller with a subsystem and one shared namespace of `size`."""

    id: str
    port: str
    serial: str
    size: Bytes
    function: int = 0
    vfs: NvmeVfs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edu:
    """QEMU's teaching device: a conventional PCI function with DMA and one interrupt.

    Attributes:
        port: a root port or a PCIe-to-PCI bridge.
        slot: 1 to 31 behind a bridge (its slot 0 is the hot-plug controller's), 0 otherwise.
    """

    id: str
    port: str
    slot: int = 0
    function: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Ports kept for an offload card (vfio-user), which comes by hot-plug, function by function."""

    id: str
    management: str
    slices: tuple[str, ...]

    @property
    def ports(self) -> tuple[str, ...]:
        """All of its ports, the management function's first."""
        return (self.management, *self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlPort:
    """A CXL root port; spare if nothing refers to it."""

    id: str
    bridge: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlSwitch:
    """A CXL switch: its upstream port carries the switch's id, the downstream ports theirs."""

    id: str
    port: str
    downstream: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Type3:
    """A CXL memory device.

    Attributes:
        port: a CXL root port or a downstream port of a switch.
        serial: 64 bits; what to find it by, for memdev names change between boots.
        label_area: where the kernel keeps a persistent region's labels.
    """

    id: str
    port: str
    serial: int
    volatile: Bytes | None = None
    persistent: Bytes | None = None
    label_area: Bytes | None = None

    @property
    def capacity(self) -> Bytes:
        """Volatile and persistent together."""
        return Bytes((self.volatile or 0) + (self.persistent or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A CXL fixed memory window, interleaved over its targets (host bridges) if several."""

    targets: tuple[str, ...]
    size: Bytes
    granularity: Bytes = Bytes(256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cxl:
    """All of a host's CXL."""

    bridges: tuple[HostBridge, ...]
    ports: tuple[CxlPort, ...]
    windows: tuple[Window, ...]
    switches: tuple[CxlSwitch, ...] = ()
    devices: tuple[Type3, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A lab host.

    Attributes:
        memory: of a host without NUMA; None where `nodes` say it.
        nodes: in order of their ids, 0 first; empty for a host without NUMA.
        distances: one row for each node, by id; None leaves QEMU's 10 and 20.
    """

    cpu: Cpu
    description: str = ""
    memory: Bytes | None = None
    nodes: tuple[Node, ...] = ()
    distances: tuple[tuple[int, ...], ...] | None = None
    iommu: bool = True
    bridges: tuple[HostBridge, ...] = ()
    ports: tuple[RootPort, ...] = ()
    pci_bridges: tuple[PciBridge, ...] = ()
    igb: tuple[Igb, ...] = ()
    nvme: tuple[Nvme, ...] = ()
    edu: tuple[Edu, ...] = ()
    cards: tuple[Card, ...] = ()
    cxl: Cxl | None = None

    @property
    def total_memory(self) -> Bytes:
        """The machine's RAM; CXL memory is not part of it."""
        return Bytes(self.memory or sum(node.memory for node in self.nodes))

    @property
    def shared_memory(self) -> bool:
        """Whether another process (a card's firmware) must be able to map the host's memory."""
        return bool(self.cards)

    def occupied_ports(self) -> Iterator[str]:
        """The PCIe root ports with something behind them, a card's not counted; may repeat."""
        yield from (bridge.port for bridge in self.pci_bridges)
        yield from (nic.port for nic in self.igb)
        yield from (controller.port for controller in self.nvme)
        yield from (function.port for function in self.edu)

    def spare_ports(self) -> tuple[str, ...]:
        """The PCIe root ports that are free for anything."""
        taken = {*self.occupied_ports(), *(port for card in self.cards for port in card.ports)}
        return tuple(port.id for port in self.ports if port.id not in taken)

    def spare_cxl_ports(self) -> tuple[str, ...]:
        """The CXL root ports and downstream ports that are free for a type-3 device."""
        if self.cxl is None:
            return ()
        taken = {switch.port for switch in self.cxl.switches}
        taken |= {device.port for device in self.cxl.devices}
        every = [port.id for port in self.cxl.ports]
        every += [port for switch in self.cxl.switches for port in switch.downstream]
        return tuple(port for port in every if port not in taken)
