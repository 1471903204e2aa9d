"""Devices that a guest gets whole, as libvirt's XML: written for an attach, read from a domain.

Pure. Source: https://libvirt.org/formatdomain.html#host-device-assignment and
https://libvirt.org/formatnetwork.html#connectivity (forward mode `hostdev`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.domxml.templates import render
from virtfabric.model.device import GuestDevice, PciAddress, alias_of
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lxml import etree

    from virtfabric.model.device import VfSettings

_HOSTDEVS: Final = ("devices/hostdev[@type='pci']", "devices/interface[@type='hostdev']")


def format_function(address: PciAddress, port: int | None = None) -> str:
    """A `<hostdev>` for a function that vfio-pci holds already: libvirt is to bind nothing.

    Args:
        address: where it is on the host.
        port: index of the guest's port to put it behind; None leaves that to libvirt.
    """
    values = {"address": address.parts, "alias": alias_of(address), "port": port}
    return render("hostdev.xml.j2", type="pci", **values)


def format_mdev(uuid: str, alias: str) -> str:
    """A `<hostdev>` for a mediated device that exists already."""
    return render("hostdev.xml.j2", type="mdev", uuid=uuid, alias=alias, port=None)


def format_vf_network(name: str, vfs: Iterable[PciAddress]) -> str:
    """A network whose interfaces are these VFs, one for each guest; each bound to vfio-pci."""
    return render("network.xml.j2", name=name, addresses=[vf.parts for vf in vfs])


def format_vf_interface(network: str, alias: str, settings: VfSettings) -> str:
    """An interface of such a network; libvirt sets MAC and VLAN on the VF that it takes."""
    return render(
        "interface.xml.j2", network=network, alias=alias, mac=settings.mac, vlan=settings.vlan
    )


def read_hostdevs(root: etree._Element) -> tuple[GuestDevice, ...]:
    """The PCI functions of the host that a domain names, in its order.

    Raises:
        InvalidValueError: one has no address, or not one of PCI.
    """
    return tuple(_read_hostdev(d) for path in _HOSTDEVS for d in root.findall(path))


def _read_hostdev(element: etree._Element) -> GuestDevice:
    source = element.find("source/address")
    if source is None:
        raise InvalidValueError("hostdev.source.address", None, "is missing")
    alias = element.find("alias")
    guest = element.find("address[@type='pci']")
    return GuestDevice(
        address=_read_address(source, "hostdev.source.address"),
        alias="" if alias is None else alias.get("name", ""),
        managed=element.get("managed") == "yes",
        guest_address=None if guest is None else _read_address(guest, "hostdev.address"),
    )


def _read_address(element: etree._Element, field: str) -> PciAddress:
    """libvirt prints hexadecimal with `0x`; people may write decimal or leave the domain out."""
    values = []
    for name in ("domain", "bus", "slot", "function"):
        text = element.get(name, "0" if name == "domain" else None)
        try:
            values.append(int(text or "", 0))
        except ValueError:
            raise InvalidValueError(f"{field}.{name}", text, "is not a number") from None
    domain, bus, slot, function = values
    return PciAddress.parse(f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}", field=field)
