"""A lab's domain XML is what libvirt takes: its schema, its parser, and its addresses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest
from examples import examples
from hypothesis import given, settings
from lxml import etree
from topologies import topologies

from virtfabric.shim.topology.kernel import kernel_arguments
from virtfabric.shim.topology.labxml import LabDomain, format_lab_xml
from virtfabric.shim.topology.shipped import read_shipped_topology, shipped_topologies

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology

DOMAIN = LabDomain(
    name="lab",
    state=Path("/state,dir"),
    kernel=Path("/k"),
    initrd=Path("/i"),
    cmdline="console=ttyS0 a=<&>",
    disk=Path("/d.raw"),
    console_log=Path("/c.log"),
)
MAXIMUM = libvirt.VIR_DOMAIN_AFFECT_CONFIG | libvirt.VIR_DOMAIN_VCPU_MAXIMUM
QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"


@pytest.fixture(scope="module")
def connection() -> libvirt.virConnect:
    return libvirt.open("test:///default")


@pytest.mark.parametrize("name", shipped_topologies())
def test_libvirt_takes_what_is_shipped(name: str, connection: libvirt.virConnect) -> None:
    text = format_lab_xml(read_shipped_topology(name), DOMAIN)
    domain = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    try:
        topology = read_shipped_topology(name)
        assert domain.maxMemory() * 1024 == topology.total_memory
        assert domain.vcpusFlags(MAXIMUM) == topology.cpu.max_vcpus
    finally:
        domain.undefine()


@settings(max_examples=examples(30), deadline=None)
@given(topologies())
def test_libvirt_takes_any_other(topology: Topology) -> None:
    connection = libvirt.open("test:///default")
    text = format_lab_xml(topology, DOMAIN)
    connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE).undefine()
    root = etree.fromstring(text)
    assert root.findtext("os/cmdline") == " ".join((DOMAIN.cmdline, *kernel_arguments(topology)))
    controllers = root.findall("devices/controller[@type='pci']")
    indexes = [int(one.get("index", "-1")) for one in controllers]
    assert indexes == list(range(len(indexes)))
    ports = [one for one in controllers if one.get("model") == "pcie-root-port"]
    assert len(ports) == len(topology.spare_ports())
    _check_places(root, controllers)


def _check_places(root: etree._Element, controllers: list[etree._Element]) -> None:
    """No address and no chassis is given twice, by libvirt's part and the command line together."""
    places: Counter[tuple[str, int, int]] = Counter()
    chassis: Counter[str] = Counter(
        target.get("chassis", "")
        for one in controllers
        if (target := one.find("target[@chassis]")) is not None
    )
    for address in root.iterfind("devices/*/address[@type='pci']"):
        index = int(address.get("bus", ""), 16)
        bus = f"pci.{index}" if index else "pcie.0"
        places[bus, int(address.get("slot", ""), 16), int(address.get("function", ""), 16)] += 1
    for argument in root.iter(f"{QEMU}arg"):
        parts = dict(p.split("=", 1) for p in argument.get("value", "").split(",") if "=" in p)
        if "addr" in parts:
            slot, _, function = parts["addr"].partition(".")
            places[parts["bus"], int(slot, 16), int(function or "0", 16)] += 1
        if "chassis" in parts:
            chassis[parts["chassis"]] += 1
    assert max(places.values()) == 1
    assert not chassis or max(chassis.values()) == 1
