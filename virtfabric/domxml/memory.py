"""A domain's memory in parts: cells, DIMMs, virtio-mem devices, and the room for more of these.

Pure. Source: https://libvirt.org/formatdomain.html#memory-devices,
https://libvirt.org/formatdomain.html#numa-node-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.domxml.templates import render
from virtfabric.domxml.values import read_cpus, read_int, read_size
from virtfabric.model.guest import SMALL_PAGES, FixedMemory, MemoryRoom, VirtioMem
from virtfabric.model.units import KIB, Bytes, CpuSet

if TYPE_CHECKING:
    from lxml import etree

    from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory

_SMALL: Final = 4 * KIB
"""The kernel's own page size on x86-64."""
_VIRTIO_MEM: Final = "devices/memory[@model='virtio-mem']"


def format_memory_device(step: AttachMemory | DetachMemory, port: int | None) -> str:
    """A virtio-mem device on one node of the host, with nothing requested of it yet.

    Args:
        step: says all but the place.
        port: index of the guest's port to put it behind; None leaves that to libvirt.
    """
    return render(
        "memory.xml.j2", model="virtio-mem", host_node=step.node, cell=step.cell,
        alias=step.alias, port=port,
        size_kib=step.size // KIB, block_kib=step.block // KIB, page_kib=step.page // KIB,
    )  # fmt: skip


def format_dimm(step: AttachDimm) -> str:
    """A DIMM of one node of the host."""
    return render(
        "memory.xml.j2", model="dimm", host_node=step.node, cell=step.cell, alias=step.alias,
        port=None, size_kib=step.size // KIB, block_kib=None, page_kib=step.page // KIB,
    )  # fmt: skip


def read_virtio_mem(root: etree._Element) -> tuple[VirtioMem, ...]:
    """The virtio-mem devices, in the domain's order.

    Raises:
        InvalidValueError: a field of one makes no sense.
    """
    backing = Backing.of(root)
    return tuple(_read_device(device, backing) for device in root.findall(_VIRTIO_MEM))


def _read_device(device: etree._Element, backing: Backing) -> VirtioMem:
    cell = _cell_of(device)
    requested = read_size(device.find("target/requested"), "memory.target.requested")
    current = device.find("target/current")  # only a running guest's
    return VirtioMem(
        alias=_alias(device),
        node=cell,
        size=read_size(device.find("target/size"), "memory.target.size"),
        block=read_size(device.find("target/block"), "memory.target.block"),
        requested=requested,
        current=requested if current is None else read_size(current, "memory.target.current"),
        host_nodes=_source_nodes(device),
        page=backing.page_of(device, cell),
    )


def read_fixed_memory(root: etree._Element, boot_memory: Bytes) -> tuple[FixedMemory, ...]:
    """Cells and DIMMs, each with the nodes that `<memnode>` or its own `<source>` name.

    Empty for a domain without cells: there `<memory>` is all that is known. On huge pages, that is
    told as one part.

    Raises:
        InvalidValueError: a field makes no sense.
    """
    bound = {
        read_int(node.get("cellid"), "numatune.memnode.cellid"): read_cpus(
            node, "nodeset", "numatune.memnode.nodeset"
        )
        for node in root.findall("numatune/memnode")
    }
    cells, backing = _cells(root), Backing.of(root)
    found = [
        FixedMemory(
            f"cell {number}",
            read_size(cell, "cpu.numa.cell.memory", attribute="memory"),
            bound.get(number, CpuSet()),
            backing.page(number),
        )
        for number, cell in cells
    ]
    if not cells and backing.page(0) != SMALL_PAGES:
        return (FixedMemory("boot memory", boot_memory, page=backing.page(0)),)
    if cells:
        found += [
            FixedMemory(
                f"dimm {_alias(dimm)}".rstrip(),
                read_size(dimm.find("target/size"), "memory.target.size"),
                _source_nodes(dimm),
                backing.page_of(dimm, _cell_of(dimm)),
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
    cell = _choose_cell(cells)
    page = SMALL_PAGES if cell is None else Backing.of(root).page(cell)
    if limit is None or not cells:
        return MemoryRoom(cell=cell, page=page)
    devices = root.findall("devices/memory")
    initial = sum(read_size(c, "cpu.numa.cell.memory", attribute="memory") for _, c in cells)
    taken = sum(read_size(d.find("target/size"), "memory.target.size") for d in devices)
    slots = read_int(limit.get("slots", "0"), "maxMemory.slots")
    return MemoryRoom(
        max(0, slots - len(devices)),
        Bytes(max(0, read_size(limit, "maxMemory") - initial - taken)),
        cell,
        page,
    )


@dataclass(frozen=True, slots=True)
class Backing:
    """`<memoryBacking><hugepages>`: which pages back which cell.

    Source: https://libvirt.org/formatdomain.html#memory-backing; libvirt 9.0,
    qemuBuildMemoryGetPagesize: a device's own `<pagesize>` goes first, then the first `<page>` that
    names the cell, then the one that names none. Of the kernel's small size it means none.

    Attributes:
        pages: bytes, and the guest's cells that it is for; None for all others.
        default: of a cell that no entry names.
    """

    pages: tuple[tuple[Bytes, CpuSet], ...] = ()
    default: Bytes | None = SMALL_PAGES

    @classmethod
    def of(cls, root: etree._Element) -> Backing:
        """A domain's.

        Raises:
            InvalidValueError: a field makes no sense.
        """
        element = root.find("memoryBacking/hugepages")
        if element is None:
            return cls()
        entries = element.findall("page")
        if not entries:
            return cls(default=None)
        named = [(_read_page(e), e) for e in entries]
        return cls(
            tuple(
                (page, read_cpus(e, "nodeset", "memoryBacking.hugepages.page.nodeset"))
                for page, e in named
                if e.get("nodeset") is not None
            ),
            next((page for page, e in named if e.get("nodeset") is None), SMALL_PAGES),
        )

    def page(self, cell: int) -> Bytes | None:
        """Of a cell and the devices that go to it."""
        return next((page for page, cells in self.pages if cell in cells), self.default)

    def page_of(self, device: etree._Element, cell: int) -> Bytes | None:
        """Of a device."""
        own = device.find("source/pagesize")
        if own is None:
            return self.page(cell)
        return _huge_or_small(read_size(own, "memory.source.pagesize"))


def _read_page(element: etree._Element) -> Bytes:
    page = read_size(element, "memoryBacking.hugepages.page.size", attribute="size")
    return _huge_or_small(page)


def _huge_or_small(page: Bytes) -> Bytes:
    return page if page > _SMALL else SMALL_PAGES


def _cell_of(device: etree._Element) -> int:
    return read_int(device.findtext("target/node") or "0", "memory.target.node")


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
