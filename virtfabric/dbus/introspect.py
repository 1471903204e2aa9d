"""Introspection XML, made of the tables in `names`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from virtfabric.dbus.names import (
    JOB_INTERFACE,
    JOBS,
    MANAGER_INTERFACE,
    ROOT,
    STANDARD,
    Interface,
    job_of_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.dbus.names import Argument

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"


def interfaces_at(path: str) -> tuple[Interface, ...] | None:
    """Interfaces of an object, standard ones included; None where there is no object."""
    if path == ROOT:
        return (MANAGER_INTERFACE, *STANDARD)
    if job_of_path(path) is not None:
        return (JOB_INTERFACE, *STANDARD)
    if path == JOBS or is_ancestor(path):
        return STANDARD
    return None


def is_ancestor(path: str) -> bool:
    """Whether the root object lies below this path."""
    return path == "/" or ROOT.startswith(f"{path}/")


def child_of(path: str) -> str:
    """The next name on the way from an ancestor down to the root object."""
    return ROOT[len(path.rstrip("/")) + 1 :].split("/", 1)[0]


def _arguments(parent: ElementTree.Element, given: Iterable[Argument], direction: str) -> None:
    for argument in given:
        element = ElementTree.SubElement(parent, "arg", name=argument.name, type=argument.signature)
        if direction:
            element.set("direction", direction)


def _describe(node: ElementTree.Element, interface: Interface) -> None:
    element = ElementTree.SubElement(node, "interface", name=interface.name)
    for method in interface.methods:
        child = ElementTree.SubElement(element, "method", name=method.name)
        _arguments(child, method.takes, "in")
        _arguments(child, (method.gives,) if method.gives else (), "out")
    for signal in interface.signals:
        _arguments(ElementTree.SubElement(element, "signal", name=signal.name), signal.carries, "")
    for prop in interface.properties:
        child = ElementTree.SubElement(
            element, "property", name=prop.name, type=prop.signature, access="read"
        )
        ElementTree.SubElement(child, "annotation", name=_EMITS, value=prop.emits)


def introspection_xml(interfaces: Iterable[Interface], children: Iterable[str]) -> str:
    """The XML of one object with the names of its children."""
    node = ElementTree.Element("node")
    for interface in interfaces:
        _describe(node, interface)
    for child in children:
        ElementTree.SubElement(node, "node", name=child)
    ElementTree.indent(node)
    return _DOCTYPE + ElementTree.tostring(node, encoding="unicode")
