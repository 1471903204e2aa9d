"""A topology as a libvirt domain, through `xml_templates/`.

libvirt makes what it has elements for: CPUs, nodes, the IOMMU, host bridges and the spare root
ports, into which `virsh attach-device` can then plug. A port that holds something for which libvirt
has no element (igb, nvme, edu, a card's functions) stands in `<qemu:commandline>` with it, as does
all of CXL: on a port that libvirt knew and thought free, it would plug something else.

Every device here has its address, so libvirt chooses none that is taken behind its back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from virtfabric.domxml.templates import render
from virtfabric.model.units import KIB
from virtfabric.shim.topology.arguments import device_arguments, machine_options
from virtfabric.shim.topology.kernel import kernel_arguments
from virtfabric.shim.topology.seats import ROOT_BUS, choose_bridge_slots, choose_seats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from virtfabric.shim.topology.model import HostBridge, Node, Topology
    from virtfabric.shim.topology.seats import Seat

_CPU_MODE = {"qemu": "maximum", "kvm": "host-passthrough"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabDomain:
    """What a lab's domain has beside its topology.

    Attributes:
        state: the directory of the topology's backing files.
        cmdline: the kernel's arguments; what the topology needs of them is added.
        disk: a raw image that becomes vda.
        console_log: where libvirt writes the serial console.
        domain_type: "kvm" only where it really runs and the topology does not need TCG.
    """

    name: str
    state: Path
    kernel: Path
    initrd: Path
    cmdline: str
    disk: Path
    console_log: Path
    uuid: str | None = None
    domain_type: Literal["qemu", "kvm"] = "qemu"
    emulator: str = "/usr/bin/qemu-system-x86_64"


def format_lab_xml(topology: Topology, domain: LabDomain) -> str:
    """The domain XML of a valid topology, ready for `virsh create` or `define`."""
    spare = topology.spare_ports()
    # libvirt calls the bus of PCI controller N "pci.N"; 0 is the machine's own
    indexes = {bridge.id: index for index, bridge in enumerate(topology.bridges, start=1)}
    arguments = device_arguments(
        topology,
        domain.state,
        buses={name: f"pci.{index}" for name, index in indexes.items()},
        without={*indexes, *spare},
        iommu=False,
    )
    if options := machine_options(topology):
        arguments = ("-machine", ",".join(options), *arguments)
    return render(
        "lab.xml.j2",
        domain=domain,
        cmdline=" ".join((domain.cmdline, *kernel_arguments(topology))),
        cpu=topology.cpu,
        cpu_mode=_CPU_MODE[domain.domain_type],
        memory_kib=topology.total_memory // KIB,
        shared=topology.shared_memory,
        iommu=topology.iommu,
        cells=[Markup(_cell(topology, node)) for node in topology.nodes],
        controllers=[Markup(text) for text in _controllers(topology, indexes, spare)],
        commandline=Markup(format_commandline(arguments)) if arguments else None,
    )


def format_commandline(arguments: tuple[str, ...]) -> str:
    """The `<qemu:commandline>` element with these arguments."""
    return render("commandline.xml.j2", arguments=arguments)


def format_cell(
    node: Node, *, shared: bool = False, distances: Mapping[int, int] | None = None
) -> str:
    """The `<cell>` of a node; `distances` are from it to each, by id, and None leaves them out."""
    return render(
        "cell.xml.j2",
        node=node,
        memory_kib=node.memory // KIB,
        shared=shared,
        distances=dict(distances or {}),
    )


def format_host_bridge(bridge: HostBridge, *, index: int, slot: int) -> str:
    """The `<controller>` of a host bridge on pcie.0."""
    address = {"bus": 0, "slot": slot, "function": 0, "multifunction": False}
    return _controller("pcie-expander-bus", index, address, bus_nr=bridge.bus, node=bridge.node)


def format_root_port(seat: Seat, *, index: int, bus: int) -> str:
    """The `<controller>` of a root port; `bus` is the index of the controller it is on."""
    shared = seat.multifunction and seat.function == 0
    address = {"bus": bus, "slot": seat.slot, "function": seat.function, "multifunction": shared}
    return _controller("pcie-root-port", index, address, chassis=seat.number)


def _controller(
    model: str,
    index: int,
    address: Mapping[str, int],
    *,
    bus_nr: int | None = None,
    node: int | None = None,
    chassis: int | None = None,
) -> str:
    return render(
        "controller.xml.j2",
        model=model,
        index=index,
        address=address,
        bus_nr=bus_nr,
        node=node,
        chassis=chassis,
    )


def _cell(topology: Topology, node: Node) -> str:
    row = topology.distances[node.id] if topology.distances else ()
    return format_cell(node, shared=topology.shared_memory, distances=dict(enumerate(row)))


def _controllers(
    topology: Topology, indexes: Mapping[str, int], spare: tuple[str, ...]
) -> Iterator[str]:
    slots, seats = choose_bridge_slots(topology), choose_seats(topology)
    for bridge in topology.bridges:
        yield format_host_bridge(bridge, index=indexes[bridge.id], slot=slots[bridge.id])
    buses = {ROOT_BUS: 0, **indexes}
    for index, port in enumerate(spare, start=len(indexes) + 1):
        yield format_root_port(seats[port], index=index, bus=buses[seats[port].bus])
