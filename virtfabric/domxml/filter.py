"""Placement in a domain's XML, replaced or stripped: what `migrate` and `restore` hooks print.

Pure. Which CPUs is the caller's decision; whose a pin is, the mark in the metadata says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lxml import etree

from virtfabric.domxml.mark import put_mark, read_mark
from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.mark import MarkedPin, PinMark
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Mapping

_PINS = ("vcpupin", "emulatorpin")


def replace_placement(
    xml: str, pins: Mapping[int, CpuSet] | None, emulator: CpuSet | None, nodeset: CpuSet | None
) -> str:
    """The same domain with these pins instead of those that an agent had set and marked.

    Pins that are not marked are the operator's and stay; where a marked one had taken the place of
    one, that is a constraint for what comes instead. The mark tells of the new pins afterwards.

    Args:
        xml: a domain as libvirt hands it to a hook.
        pins: pCPUs by vCPU number; None strips. Numbers that the guest has not are left out.
        emulator: pCPUs of the emulator threads; None (or empty) strips.
        nodeset: nodes for a `restrictive` guest's memory. None leaves `<numatune>` alone: without
            the mode the guest could not be pulled any more. Other modes are the operator's.

    Raises:
        InvalidValueError: not a domain.
    """
    root = parse_xml(xml, what="domain XML")
    if root.tag != "domain":
        raise InvalidValueError("domain XML", f"<{root.tag!s}>", "is not a domain")
    mark = read_mark(root)
    _strip_marked(root, mark)
    wanted = _choose_pins(root, mark, pins or {}, emulator)
    _put_pins(root, wanted)
    put_mark(root, PinMark(tuple(pin for pin in wanted if pin.cpus != pin.instead)))
    memory = root.find("numatune/memory[@mode='restrictive']")
    if nodeset and memory is not None:
        memory.set("nodeset", str(nodeset))
    return etree.tostring(root, encoding="unicode") + "\n"


def _strip_marked(root: etree._Element, mark: PinMark) -> None:
    for cputune in root.findall("cputune"):
        for pin in [child for child in cputune if child.tag in _PINS]:
            if mark.find(*_read_pin(pin)):
                _remove(pin)
        if len(cputune) == 0:
            _remove(cputune)


def _read_pin(pin: etree._Element) -> tuple[int | None, CpuSet]:
    text = pin.get("vcpu", "")
    vcpu = int(text) if pin.tag == "vcpupin" and text.isdecimal() else None
    return vcpu, CpuSet.parse(pin.get("cpuset", ""), field="cputune.cpuset")


def _remove(element: etree._Element) -> None:
    """Take an element out with the line it stood on, so that the rest keeps its form."""
    parent, before = element.getparent(), element.getprevious()
    if parent is None:
        return
    if element.getnext() is None:  # the last one: its tail is the indent of the closing tag
        if before is not None:
            before.tail = element.tail
        else:
            parent.text = element.tail
    parent.remove(element)


def _choose_pins(
    root: etree._Element, mark: PinMark, pins: Mapping[int, CpuSet], emulator: CpuSet | None
) -> list[MarkedPin]:
    """What is to be put where nothing of the operator's is left standing."""
    taken = {_read_pin(pin)[0] for name in _PINS for pin in root.findall(f"cputune/{name}")}
    replaced = {pin.vcpu: pin.instead for pin in mark.pins if pin.instead}
    chosen = []
    for vcpu in sorted({*pins, *(v for v in replaced if v is not None)}):
        instead = replaced.get(vcpu, CpuSet())
        cpus = pins.get(vcpu) or instead
        cpus = CpuSet(cpus & instead) or cpus
        if cpus and vcpu < _read_maximum(root) and vcpu not in taken:
            chosen.append(MarkedPin(vcpu, cpus, instead))
    if emulator and None not in taken:
        chosen.append(MarkedPin(None, emulator))
    return chosen


def _read_maximum(root: etree._Element) -> int:
    text = root.findtext("vcpu") or ""
    return int(text) if text.isdecimal() else 1


def _put_pins(root: etree._Element, pins: list[MarkedPin]) -> None:
    if not pins:
        return
    cputune = root.find("cputune")
    if cputune is None:
        vcpu = root.find("vcpu")
        cputune = etree.Element("cputune")
        cputune.tail = "\n  "
        place = 0 if vcpu is None else root.index(vcpu) + 1
        root.insert(place, cputune)
    for pin in pins:
        name = "emulatorpin" if pin.vcpu is None else "vcpupin"
        attributes = {} if pin.vcpu is None else {"vcpu": str(pin.vcpu)}
        etree.SubElement(cputune, name, attributes | {"cpuset": str(pin.cpus)})
    etree.indent(cputune, space="  ", level=1)
