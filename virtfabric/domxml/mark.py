"""The mark of the agent's pins as libvirt metadata: text <-> `PinMark`.

It stands in the live definition only, so it travels with a migration and into a save file and is
gone when the guest stops. `hooks/qemu` reads it too, without an XML parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lxml import etree

from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.mark import MARK_NAMESPACE, NO_MARK, MarkedPin, PinMark
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK_TAG: Final = f"{{{MARK_NAMESPACE}}}pins"


def parse_mark(source: etree._Element | str) -> PinMark:
    """Read a mark; entries that make no sense mark nothing: the pin counts as the operator's."""
    element = parse_xml(source, what="mark") if isinstance(source, str) else source
    return PinMark(tuple(_read(element)))


def _read(element: etree._Element) -> Iterator[MarkedPin]:
    for pin in element.iterchildren(etree.Element):
        # as we wrote them; libvirt's live XML has the namespace on children too (measured, 9.0)
        name = etree.QName(pin).localname
        if name not in ("pin", "emulator"):
            continue
        try:
            vcpu = None if name == "emulator" else int(pin.get("vcpu", ""))
            cpus = CpuSet.parse(pin.get("cpuset", ""), field="mark.cpuset")
            instead = CpuSet.parse(pin.get("instead", ""), field="mark.instead")
        except (ValueError, InvalidValueError):
            continue
        if cpus:
            yield MarkedPin(vcpu, cpus, instead)


def read_mark(domain: etree._Element) -> PinMark:
    """The mark in a domain's metadata; empty where there is none."""
    element = domain.find(f"metadata/{MARK_TAG}")
    return NO_MARK if element is None else parse_mark(element)


def format_bare_mark(mark: PinMark) -> str:
    """As `virDomainSetMetadata` wants it: libvirt adds the namespace to the element itself."""
    return etree.tostring(_build(mark), encoding="unicode")


def put_mark(domain: etree._Element, mark: PinMark) -> None:
    """Make this the mark of a domain that has metadata, in place of what it has."""
    metadata = domain.find("metadata")
    if metadata is None:
        return
    if read_mark(domain) == mark:
        return
    for found in metadata.findall(MARK_TAG):
        metadata.remove(found)
    if mark:
        metadata.append(_build(mark, MARK_NAMESPACE))
    etree.indent(metadata, space="  ", level=1)


def _build(mark: PinMark, namespace: str | None = None) -> etree._Element:
    root = etree.Element(
        etree.QName(namespace, "pins"), nsmap={"placement": namespace} if namespace else None
    )
    for pin in mark.pins:
        name = "emulator" if pin.vcpu is None else "pin"
        child = etree.SubElement(root, etree.QName(namespace, name))
        if pin.vcpu is not None:
            child.set("vcpu", str(pin.vcpu))
        child.set("cpuset", str(pin.cpus))
        if pin.instead:
            child.set("instead", str(pin.instead))
    return root
