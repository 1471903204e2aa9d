"""A domain's memory in parts: cells, DIMMs, virtio-mem devices, and the room for more of these.

Pure. Source: https://libvirt.org/formatdomain.html#memory-devices,
https://libvirt.org/formatdomain.html#numa-node-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.domxml.templates import render
from virtfabric.domxml.values import read_cpus, read_int, read_size
from virtfabric.model.guest import FixedMemory, MemoryRoom, VirtioMem
from virtfabric.model.units import KIB, Bytes, CpuSet

if TYPE_CHECKING:
    from lxml import etree

    from virtfabric.model.memorysteps import AttachMemory, DetachMemory

_VIRTIO_MEM: Final = "devices/memory[@model='virtio-mem']"


def format_memory_device(step: AttachMemory | DetachMemory, port: int | None) -> str:
    """A virtio-mem device on one node of the host, with nothing requested of it yet.

    Args:
        step: says all but the place.
        port: index of the guest's port to put it behind; None leaves that to libvirt.
    """
    return render(
        "memory.xml.j2", host_node=step.node, cell=step.cell, alias=step.alias, port=port,
        size_kib=step.size // KIB, block_kib=step.block // KIB,
    )  # fmt: skip


def read_virtio_mem(root: etree._Element) -> tuple[VirtioMem, ...]:
    """The virtio-mem devices, in the domain's order.

    Raises:
        InvalidValueError: a field of one makes no sense.
    """
    return tuple(_read_device(device) for device in root.findall(_VIRTIO_MEM))


def _read_device(device: etree._Element) -> VirtioMem:
    requested = read_size(device.find("target/requested"), "memory.target.requested")
    current = device.find("target/current")  # only a running guest's
    return VirtioMem(
        alias=_alias(device),
        node=read_int(device.findtext("target/node") or "0", "memory.target.node"),
        size=read_size(device.find("target/size"), "memory.target.size"),
        block=read_size(device.find("target/block"), "memory.target.block"),
        requested=requested,
        current=requested if current is None else read_size(current, "memory.target.current"),
        host_nodes=_source_nodes(device),
    )


def read_fixed_memory(root: etree._Element) -> tuple[FixedMemory, ...]:
    """Cells and DIMMs, each with the nodes that `<memnode>` or its own `<source>` name.

    Empty for a domain without cells: there `<memory>` is all that is known.

    Raises:
        InvalidValueError: a field makes no sense.
    """
    bound = {
        read_int(node.get("cellid"), "numatune.memnode.cellid"): read_cpus(
            node, "nodeset", "numatune.memnode.nodeset"
        )
        for node in root.findall("numatune/memnode")
    }
    cells = _cells(root)
    found = [
        FixedMemory(
            f"cell {number}",
            read_size(cell, "cpu.numa.cell.memory", attribute="memory"),
            bound.get(number, CpuSet()),
        )
        for number, cell in cells
    ]
    if cells:
        found += [
            FixedMemory(
                f"dimm {_alias(dimm)}".rstrip(),
                read_size(dimm.find("target/size"), "memory.target.size"),
                _source_nodes(dimm),
            )
            for dimm in root.findall("devices/memory[@model='dimm']")
        ]
    return tuple(found)


def read_memory_room(root: etree._Element) -> MemoryRoom:
    """What can still be plugged: libvirt counts every memory device, and its full size.

    Source: libvirt 9.0, qemuDomainDefValidateMemoryHotplug.

    Raises:
        InvalidValueError: a field makes no sense.
    """
    limit, cells = root.find("maxMemory"), _cells(root)
    if limit is None or not cells:
        return MemoryRoom(cell=_choose_cell(cells))
    devices = root.findall("devices/memory")
    initial = sum(read_size(c, "cpu.numa.cell.memory", attribute="memory") for _, c in cells)
    taken = sum(read_size(d.find("target/size"), "memory.target.size") for d in devices)
    slots = read_int(limit.get("slots", "0"), "maxMemory.slots")
    return MemoryRoom(
        max(0, slots - len(devices)),
        Bytes(max(0, read_size(limit, "maxMemory") - initial - taken)),
        _choose_cell(cells),
    )


def _cells(root: etree._Element) -> list[tuple[int, etree._Element]]:
    """Cells by number; one that names none is numbered by its place."""
    found = enumerate(root.findall("cpu/numa/cell"))
    return [(read_int(c.get("id", str(n)), "cpu.numa.cell.id"), c) for n, c in found]


def _choose_cell(cells: list[tuple[int, etree._Element]]) -> int | None:
    """Where memory of another kind goes: the guest tells it apart in a cell without vCPUs."""
    if not cells:
        return None
    return next((n for n, cell in reversed(cells) if not cell.get("cpus")), cells[0][0])


def _alias(device: etree._Element) -> str:
    alias = device.find("alias")
    return "" if alias is None else alias.get("name", "")


def _source_nodes(device: etree._Element) -> CpuSet:
    text = device.findtext("source/nodemask") or ""
    return CpuSet.parse(text, field="memory.source.nodemask")
