"""A topology as arguments of the outer QEMU: all that it determines, and nothing else.

Accelerator, CPU model, kernel, disks and network of the host are another's. With KVM and an IOMMU
that other must say `-accel kvm,kernel-irqchip=split`, for interrupt remapping needs it.

Everything on the machine's root bus names it: once there is a pxb, QEMU no longer knows which bus
is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.units import MIB, Bytes
from virtfabric.shim.topology.seats import ROOT_BUS, choose_bridge_slots, choose_seats

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from virtfabric.shim.topology.model import Cxl, HostBridge, Nvme, RootPort, Topology, Type3
    from virtfabric.shim.topology.seats import Seat

NVME_OWN_QUEUES: Final = 2
"""Queues (admin and one for data) that an NVMe PF keeps when its VFs have all others."""
NO_WATCHDOG: Final = ("-global", "ICH9-LPC.noreboot=on")
"""q35's own watchdog (iTCO) does nothing when it runs out. Under TCG it has, in a host whose Linux
had it as inactive: QEMU 11.1 resets the machine then, and libvirt 9.0, told of it and knowing
of no such watchdog, ends by SIGSEGV (`qemuProcessHandleWatchdog`, 2026-11-22).
"""


@dataclass(frozen=True, slots=True)
class BackingFile:
    """A file that must be there, sparse, before QEMU starts."""

    path: Path
    size: Bytes


def qemu_arguments(topology: Topology, state: Path) -> tuple[str, ...]:
    """The arguments for the machine of a valid topology.

    `state` is the directory of the topology's `backing_files`.
    """
    cpu = topology.cpu
    shape = f"sockets={cpu.sockets},cores={cpu.cores},threads={cpu.threads}"
    arguments = ["-machine", ",".join(("q35", *machine_options(topology), *_ram_option(topology)))]
    arguments += NO_WATCHDOG
    arguments += ["-smp", f"cpus={cpu.boot_vcpus},maxcpus={cpu.max_vcpus},{shape}"]
    arguments += ["-m", f"size={_size(topology.total_memory)}"]
    arguments += _memory_arguments(topology)
    arguments += device_arguments(topology, state)
    return tuple(arguments)


def backing_files(topology: Topology, state: Path) -> tuple[BackingFile, ...]:
    """The files of NVMe namespaces, persistent memory and label areas."""
    files = [BackingFile(_file(state, f"{one.id}.disk"), one.size) for one in topology.nvme]
    for device in topology.cxl.devices if topology.cxl else ():
        if device.persistent and device.label_area:
            name = f"{device.id}.persistent"
            files.append(BackingFile(_file(state, name), device.persistent))
            files.append(BackingFile(_file(state, f"{device.id}.labels"), device.label_area))
    return tuple(files)


def machine_options(topology: Topology) -> tuple[str, ...]:
    """What `-machine` says beside the type: CXL and its fixed memory windows."""
    if topology.cxl is None:
        return ()
    options = ["cxl=on"]
    for number, window in enumerate(topology.cxl.windows):
        name = f"cxl-fmw.{number}"
        options += [f"{name}.targets.{n}={bridge}" for n, bridge in enumerate(window.targets)]
        options += [
            f"{name}.size={_size(window.size)}",
            f"{name}.interleave-granularity={int(window.granularity)}",
        ]
    return tuple(options)


def device_arguments(
    topology: Topology,
    state: Path,
    *,
    buses: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    iommu: bool = True,
) -> tuple[str, ...]:
    """All `-device`, and the backends they need.

    Args:
        topology: a valid one.
        state: see `qemu_arguments`.
        buses: the bus names of host bridges that are not called by their id.
        without: ids of host bridges and ports that somebody else (libvirt) makes.
        iommu: False if somebody else makes the IOMMU.
    """
    names = buses or {}
    arguments: list[str] = []
    if topology.iommu and iommu:
        # without caching-mode QEMU aborts when a vfio-user device is mapped
        arguments += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    slots, seats = choose_bridge_slots(topology), choose_seats(topology)
    for bridge in topology.bridges:
        if bridge.id not in without:
            arguments += _host_bridge("pxb-pcie", bridge, slots[bridge.id])
    for port in topology.ports:
        if port.id not in without:
            arguments += _root_port(port, seats[port.id], names)
    arguments += _function_arguments(topology, state)
    if topology.cxl:
        for bridge in topology.cxl.bridges:
            arguments += _host_bridge("pxb-cxl", bridge, slots[bridge.id])
        arguments += _cxl_arguments(topology, topology.cxl, state)
    return tuple(arguments)


def node_arguments(topology: Topology, *, ids: Collection[int]) -> tuple[str, ...]:
    """The nodes with these ids, each with its memory."""
    arguments: list[str] = []
    for node in topology.nodes:
        if node.id in ids:
            cpus = "".join(f",cpus={run}" for run in str(node.cpus).split(",") if run)
            arguments += _ram(topology, f"ram.{node.id}", node.memory)
            arguments += ["-numa", f"node,nodeid={node.id}{cpus},memdev=ram.{node.id}"]
    return tuple(arguments)


def distance_arguments(topology: Topology) -> tuple[str, ...]:
    """How far the nodes are from each other, if the topology says so."""
    arguments: list[str] = []
    for source, row in enumerate(topology.distances or ()):
        for target, distance in enumerate(row):
            if source != target:
                arguments += ["-numa", f"dist,src={source},dst={target},val={distance}"]
    return tuple(arguments)


def _ram_option(topology: Topology) -> tuple[str, ...]:
    return () if topology.nodes else ("memory-backend=ram.0",)


def _memory_arguments(topology: Topology) -> tuple[str, ...]:
    if not topology.nodes:
        return _ram(topology, "ram.0", topology.total_memory)
    every = {node.id for node in topology.nodes}
    return (*node_arguments(topology, ids=every), *distance_arguments(topology))


def _ram(topology: Topology, name: str, size: Bytes) -> tuple[str, str]:
    kind = "memory-backend-memfd" if topology.shared_memory else "memory-backend-ram"
    share = ",share=on" if topology.shared_memory else ""
    return "-object", f"{kind},id={name},size={_size(size)}{share}"


def _host_bridge(driver: str, bridge: HostBridge, slot: int) -> tuple[str, str]:
    node = "" if bridge.node is None else f",numa_node={bridge.node}"
    place = f"bus={ROOT_BUS},addr={slot:#x},bus_nr={bridge.bus}"
    return "-device", f"{driver},id={bridge.id},{place}{node}"


def _root_port(port: RootPort, seat: Seat, names: Mapping[str, str]) -> tuple[str, str]:
    shared = ",multifunction=on" if seat.multifunction and seat.function == 0 else ""
    place = f"bus={names.get(seat.bus, seat.bus)},addr={seat.address}{shared}"
    numbers = f"chassis={seat.number},slot={seat.number}"
    return "-device", f"pcie-root-port,id={port.id},{place},{numbers}"


def _function_arguments(topology: Topology, state: Path) -> Iterator[str]:
    for bridge in topology.pci_bridges:
        yield from ("-device", f"pcie-pci-bridge,id={bridge.id},bus={bridge.port},addr=0x0")
    for nic in topology.igb:
        yield from ("-netdev", f"hubport,id={nic.id}.net,hubid={nic.wire}")
        place = f"bus={nic.port},addr=0x0"
        yield from ("-device", f"igb,id={nic.id},{place},netdev={nic.id}.net,mac={nic.mac}")
    for controller in topology.nvme:
        yield from _nvme(topology, controller, state)
    for edu in topology.edu:
        place = f"bus={edu.port},{_function_address(topology, edu.port, edu.slot, edu.function)}"
        yield from ("-device", f"edu,id={edu.id},{place}")


def _function_address(topology: Topology, port: str, slot: int, function: int) -> str:
    """The address behind a port; all functions of a slot say that it has several."""
    neighbours = [one.id for one in topology.nvme if one.port == port]
    neighbours += [one.id for one in topology.edu if (one.port, one.slot) == (port, slot)]
    shared = ",multifunction=on" if len(neighbours) > 1 else ""
    return f"addr={slot:#x}.{function:#x}{shared}"


def _nvme(topology: Topology, one: Nvme, state: Path) -> Iterator[str]:
    file = _escape(_file(state, f"{one.id}.disk"))
    yield from ("-drive", f"file={file},if=none,id={one.id}.disk,format=raw")
    yield from ("-device", f"nvme-subsys,id={one.id}.subsys,nqn={one.id}")
    place = f"bus={one.port},{_function_address(topology, one.port, 0, one.function)}"
    device = f"nvme,id={one.id},{place},serial={one.serial},subsys={one.id}.subsys"
    if one.vfs:
        queues = one.vfs.count * one.vfs.queues
        vectors = one.vfs.count * (one.vfs.queues - 1)  # the admin queue shares the first
        total = queues + NVME_OWN_QUEUES
        device += f",sriov_max_vfs={one.vfs.count},sriov_vq_flexible={queues}"
        device += f",sriov_vi_flexible={vectors},max_ioqpairs={total},msix_qsize={total + 1}"
    yield from ("-device", device)
    yield from ("-device", f"nvme-ns,drive={one.id}.disk,bus={one.id},nsid=1,shared=on")


def _cxl_arguments(topology: Topology, cxl: Cxl, state: Path) -> Iterator[str]:
    seats = choose_seats(topology)

    def port(driver: str, name: str) -> tuple[str, str]:
        seat = seats[name]
        numbers = f"port={seat.index},chassis={seat.number},slot={seat.number}"
        return "-device", f"{driver},id={name},bus={seat.bus},addr={seat.address},{numbers}"

    for root_port in cxl.ports:
        yield from port("cxl-rp", root_port.id)
    for switch in cxl.switches:
        yield from ("-device", f"cxl-upstream,id={switch.id},bus={switch.port},addr=0x0")
        for downstream in switch.downstream:
            yield from port("cxl-downstream", downstream)
    for device in cxl.devices:
        yield from _type3(topology, device, state)


def _type3(topology: Topology, device: Type3, state: Path) -> Iterator[str]:
    argument = f"cxl-type3,id={device.id},bus={device.port},addr=0x0,sn={device.serial:#x}"
    if device.volatile:
        yield from _ram(topology, f"{device.id}.volatile", device.volatile)
        argument += f",volatile-memdev={device.id}.volatile"
    if device.persistent and device.label_area:
        yield from _kept(state, f"{device.id}.persistent", device.persistent)
        yield from _kept(state, f"{device.id}.labels", device.label_area)
        argument += f",persistent-memdev={device.id}.persistent,lsa={device.id}.labels"
    yield from ("-device", argument)


def _kept(state: Path, name: str, size: Bytes) -> tuple[str, str]:
    path = _escape(_file(state, name))
    return "-object", f"memory-backend-file,id={name},mem-path={path},size={_size(size)},share=on"


def _file(state: Path, name: str) -> Path:
    return state / name


def _escape(path: Path) -> str:
    """QEMU ends a value at a comma; two stand for one."""
    return str(path).replace(",", ",,")


def _size(size: int) -> str:
    return f"{size // MIB}M" if size % MIB == 0 else f"{size // 1024}K"
