"""The PCIe ports of a domain: what is behind each, which are free, and a definition with more.

Pure: text -> model, text -> text. A function can be attached to a running guest only where a port
was free when it started, as no port can be added live.

Source: https://libvirt.org/pci-hotplug.html, https://libvirt.org/formatdomain.html#controllers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lxml import etree

from virtfabric.domxml.parse import parse_xml
from virtfabric.domxml.templates import render
from virtfabric.model.device import PciAddress
from virtfabric.model.errors import InvalidValueError, Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT_PORT: Final = "pcie-root-port"
PORT_MODELS: Final = frozenset({ROOT_PORT, "pcie-switch-downstream-port"})
"""What takes one PCIe function each, plugged at any time."""
_QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_FUNCTIONS: Final = range(8)
# Slot 0 is the host bridge and 0x1f the chipset's own (LPC, SATA, SMBus); libvirt wants the first
# video device in slot 1, also when it is added later.
_SLOTS: Final = range(2, 0x1F)
_HIGHEST: Final = 255
"""Of controller indexes, as of PCI bus numbers."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port that takes a PCIe function.

    Attributes:
        index: of its controller; what is plugged into it is on this bus.
        model: libvirt's word for it.
        address: where the guest sees the port itself; None where libvirt did not say.
        hotplug: whether something can be plugged while the guest runs.
        users: what is behind it, for people: `interface vnet0`, `hostdev 0000:3b:10.1`.
    """

    index: int
    model: str
    address: PciAddress | None = None
    hotplug: bool = True
    users: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        """Whether a function can be attached to it while the guest runs."""
        return self.hotplug and not self.users


@dataclass(frozen=True, slots=True)
class Extension:
    """A definition with more root ports.

    Attributes:
        xml: the whole definition.
        indexes: of the new ports' controllers.
    """

    xml: str
    indexes: tuple[int, ...]


# -- reading ----------------------------------------------------------------------------------


def read_ports(domain_xml: str) -> tuple[Port, ...]:
    """Every port of a live or persistent definition, by index.

    Raises:
        InvalidValueError: not a domain, or an address in it makes no sense.
    """
    return find_ports(_parse(domain_xml))


def free_ports(domain_xml: str) -> int:
    """How many functions can be attached to a machine made by this definition.

    Raises:
        InvalidValueError: as for `read_ports`.
    """
    return count_free_ports(_parse(domain_xml))


def count_free_ports(domain: etree._Element) -> int:
    """As `free_ports`, of a domain that is parsed already."""
    return sum(port.free for port in find_ports(domain))


def find_ports(domain: etree._Element) -> tuple[Port, ...]:
    """As `read_ports`, of a domain that is parsed already."""
    users: dict[int, list[str]] = {}
    for device, address in _located(domain):
        users.setdefault(address.parts[1], []).append(_describe(device))
    for bus, text in _foreign(domain):
        users.setdefault(bus, []).append(text)
    found = [
        _read_port(controller, users)
        for controller in _controllers(domain)
        if controller.get("model") in PORT_MODELS and controller.get("index") is not None
    ]
    return tuple(sorted(found, key=lambda port: port.index))


def _parse(text: str) -> etree._Element:
    root = parse_xml(text, what="domain XML")
    if root.tag != "domain":
        raise InvalidValueError("domain XML", f"<{root.tag!s}>", "is not a domain")
    return root


def _read_port(controller: etree._Element, users: dict[int, list[str]]) -> Port:
    index = _number(controller.get("index", ""), "controller.index")
    target = controller.find("target")
    return Port(
        index,
        controller.get("model", ""),
        _read_address(controller),
        hotplug=target is None or target.get("hotplug") != "off",
        users=tuple(users.get(index, ())),
    )


def _controllers(domain: etree._Element) -> list[etree._Element]:
    return domain.findall("devices/controller[@type='pci']")


def _located(domain: etree._Element) -> Iterator[tuple[etree._Element, PciAddress]]:
    """Every device with a place on a PCI bus of the guest."""
    for device in domain.iterfind("devices/*"):
        address = _read_address(device)
        if address is not None:
            yield device, address


def _read_address(device: etree._Element) -> PciAddress | None:
    """Where the guest sees a device; a hostdev's `<source>` has another one, the host's."""
    element = device.find("address[@type='pci']")
    if element is None or element.get("bus") is None:
        return None
    return _address(element)


def _address(element: etree._Element) -> PciAddress:
    domain, bus, slot, function = (
        _number(element.get(name, "0"), f"address.{name}")
        for name in ("domain", "bus", "slot", "function")
    )
    return PciAddress(f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")


def _number(text: str, field: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise InvalidValueError(field, text, "is not a number") from None


def _describe(device: etree._Element) -> str:
    """What a person knows a device by."""
    words = [str(device.tag)]
    if device.tag == "controller":
        words += [device.get("type", ""), device.get("model", "")]
    source = device.find("source/address[@domain]")
    target = device.find("target[@dev]")
    mac = device.find("mac")
    if source is not None:
        words.append(_address(source))
    elif target is not None:
        words.append(target.get("dev", ""))
    elif mac is not None:
        words.append(mac.get("address", ""))
    elif device.tag != "controller":
        words.append(device.get("model", ""))
    return " ".join(filter(None, words))


def _foreign(domain: etree._Element) -> Iterator[tuple[int, str]]:
    """Bus of what somebody plugged into a port of libvirt's by `<qemu:commandline>`."""
    for argument in _commandline(domain):
        for match in re.finditer(r"\bbus[\"']?[=:]\s*[\"']?pci\.(\d+)", argument):
            yield int(match[1]), f"qemu:arg {argument.split(',', 1)[0]}"


def _commandline(domain: etree._Element) -> list[str]:
    found = domain.findall(f"{_QEMU}commandline/{_QEMU}arg")
    return [argument.get("value", "") for argument in found]


# -- adding -----------------------------------------------------------------------------------


def add_ports(definition_xml: str, count: int) -> Extension | Refusal:
    """A persistent definition with `count` more root ports, and everything else as it is.

    They go where no address that is there changes: into the functions left in slots of root ports,
    then into free slots, eight each.

    Raises:
        InvalidValueError: `count` is below 1, or the text is not a domain.
    """
    if count < 1:
        raise InvalidValueError("count", count, "is not at least 1")
    domain = _parse(definition_xml)
    refusal = _check_extensible(domain)
    if refusal is not None:
        return refusal
    controllers = _controllers(domain)
    taken = {_number(c.get("index", "0"), "controller.index") for c in controllers}
    indexes = [index for index in range(1, _HIGHEST + 1) if index not in taken]
    seats = list(_seats(domain))
    room = min(len(indexes), len(seats))
    if count > room:
        return Refusal(
            Reason.NO_CAPACITY,
            f"{_name(domain)}: {count} more root ports do not fit on its root bus, {room} would",
        )
    chassis = {int(t.get("chassis", "0"), 0) for c in controllers for t in c.findall("target")}
    free_chassis = (n for n in range(1, _HIGHEST + 1) if n not in chassis)
    last = controllers[-1]
    for index, (slot, function) in zip(indexes[:count], seats, strict=False):
        number = index if index not in chassis else next(free_chassis, index)
        chassis.add(number)
        port = _new_port(index, slot, function, number)
        port.tail = last.tail
        last.addnext(port)
        last = port
    return Extension(etree.tostring(domain, encoding="unicode"), tuple(indexes[:count]))


def _check_extensible(domain: etree._Element) -> Refusal | None:
    name = _name(domain)
    if domain.find("devices/controller[@type='pci'][@model='pcie-root']") is None:
        machine = domain.find("os/type")
        kind = "" if machine is None else machine.get("machine", "")
        return Refusal(
            Reason.NO_MECHANISM,
            f"{name}: machine {kind or 'of this type'} has no PCIe root bus; root ports take q35",
        )
    if any(argument.lstrip("-") == "device" for argument in _commandline(domain)):
        # QEMU puts a device without an address into the first slot that is free at start
        return Refusal(
            Reason.NO_MECHANISM,
            f"{name}: it has devices in <qemu:commandline>, whose addresses could shift; "
            "add the ports with virsh edit",
        )
    return None


def _name(domain: etree._Element) -> str:
    return domain.findtext("name") or ""


def _seats(domain: etree._Element) -> Iterator[tuple[int, int]]:
    """Free slots and functions for root ports on the root bus, in the order to fill them."""
    slots: dict[int, dict[int, etree._Element]] = {}
    for device, address in _located(domain):
        pci_domain, bus, slot, function = address.parts
        if (pci_domain, bus) == (0, 0):
            slots.setdefault(slot, {})[function] = device
    for slot, functions in sorted(slots.items()):
        if _shares(functions):
            yield from ((slot, f) for f in _FUNCTIONS if f not in functions)
    for slot in _SLOTS:
        if slot not in slots:
            yield from ((slot, function) for function in _FUNCTIONS)


def _shares(functions: dict[int, etree._Element]) -> bool:
    """Whether a slot holds root ports only, and is made for more than one function."""
    first = functions.get(0)
    if first is None or any(device.get("model") != ROOT_PORT for device in functions.values()):
        return False
    address = first.find("address[@type='pci']")
    return address is not None and address.get("multifunction") == "on"


def _new_port(index: int, slot: int, function: int, chassis: int) -> etree._Element:
    address = {"bus": 0, "slot": slot, "function": function, "multifunction": function == 0}
    text = render(
        "controller.xml.j2", model=ROOT_PORT, index=index, address=address, bus_nr=None,
        node=None, chassis=chassis,
    )  # fmt: skip
    return parse_xml(text, what="controller")


# -- checking ---------------------------------------------------------------------------------


def check_extension(before: str, after: str, indexes: tuple[int, ...]) -> str:
    """Whether a definition, as libvirt has it now, is the former one and these ports.

    Returns:
        What is wrong, "" when nothing is: every port is there, and without them nothing differs,
        so no device has another address.

    Raises:
        InvalidValueError: one of them is not a domain.
    """
    domain, wanted = _parse(after), set(indexes)
    for controller in _controllers(domain):
        if controller.get("model") != ROOT_PORT or not controller.get("index", "").isdecimal():
            continue
        index = int(controller.get("index", ""))
        if index in wanted:
            wanted.discard(index)
            controller.getparent().remove(controller)  # type: ignore[union-attr]
    if wanted:
        return f"port {min(wanted)} is not there"
    old = _parse(before)
    if _canonical(old) == _canonical(domain):
        return ""
    moved = _moved(old, domain)
    return f"{moved} has another address" if moved else "more than the ports changed"


def _moved(before: etree._Element, after: etree._Element) -> str:
    """The first device whose address is not what it was."""
    former = [(_describe(d), a) for d, a in _located(before)]
    latter = [(_describe(d), a) for d, a in _located(after)]
    return next((text for text, address in former if (text, address) not in latter), "")


def _canonical(domain: etree._Element) -> bytes:
    """What it says, without indentation."""
    for element in domain.iter(etree.Element):
        if len(element) and not (element.text or "").strip():
            element.text = None
        if not (element.tail or "").strip():
            element.tail = None
    return etree.tostring(domain, method="c14n")
