"""Placement in a domain's XML, replaced or stripped: what `migrate` and `restore` hooks print.

Pure. Which CPUs is the caller's decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lxml import etree

from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.units import CpuSet

_PINS = ("vcpupin", "emulatorpin")


def replace_placement(
    xml: str, pins: Mapping[int, CpuSet] | None, emulator: CpuSet | None, nodeset: CpuSet | None
) -> str:
    """The same domain with these pins instead of its own.

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
    _strip_pins(root)
    _put_pins(root, pins or {}, emulator)
    memory = root.find("numatune/memory[@mode='restrictive']")
    if nodeset and memory is not None:
        memory.set("nodeset", str(nodeset))
    return etree.tostring(root, encoding="unicode") + "\n"


def _strip_pins(root: etree._Element) -> None:
    for cputune in root.findall("cputune"):
        for pin in [child for child in cputune if child.tag in _PINS]:
            _remove(pin)
        if len(cputune) == 0:
            _remove(cputune)


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


def _put_pins(root: etree._Element, pins: Mapping[int, CpuSet], emulator: CpuSet | None) -> None:
    vcpu = root.find("vcpu")
    maximum = int(vcpu.text or 1) if vcpu is not None and (vcpu.text or "").isdecimal() else 1
    wanted = [
        ("vcpupin", {"vcpu": str(number), "cpuset": str(cpus)})
        for number, cpus in sorted(pins.items())
        if cpus and number < maximum
    ]
    if emulator:
        wanted.append(("emulatorpin", {"cpuset": str(emulator)}))
    if not wanted:
        return
    cputune = root.find("cputune")
    if cputune is None:
        cputune = etree.Element("cputune")
        cputune.tail = "\n  "
        place = 0 if vcpu is None else root.index(vcpu) + 1
        root.insert(place, cputune)
    for name, attributes in wanted:
        etree.SubElement(cputune, name, attributes)
    etree.indent(cputune, space="  ", level=1)
