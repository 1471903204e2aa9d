"""libvirt itself, with its schemas, takes what the templates of devices and networks give."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtfabric.domxml.domain import parse_domain
from virtfabric.model.guest import FixedMemory, VirtioMem
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet

libvirt = pytest.importorskip("libvirt")

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
DEVICES = (
    "hostdev-pci",
    "hostdev-pci-behind-a-port",
    "hostdev-mdev",
    "interface-vf",
    "interface-vf-default",
)


@pytest.fixture(scope="module")
def connection():
    opened = libvirt.open("test:///default")
    yield opened
    opened.close()


def domain(device: str) -> str:
    return f"""<domain type='test'><name>t</name><memory>8192</memory>
        <os><type>hvm</type></os><devices>{device}</devices></domain>"""


@pytest.mark.parametrize("name", DEVICES)
def test_device(connection, name):
    """Defined with validation; what libvirt makes of it still names the device."""
    device = (GOLDEN / f"{name}.xml").read_text()
    defined = connection.defineXMLFlags(domain(device), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    shown = defined.XMLDesc(0)
    defined.undefine()
    element = name.split("-")[0]
    assert f"<{element} " in shown
    if name == "hostdev-pci":
        assert "bus='0x01' slot='0x10' function='0x2'" in shown
        assert "managed='no'" in shown
        assert "ua-virtfabric-0000-01-10-2" in shown
    if name == "interface-vf":
        assert "52:54:00:00:00:01" in shown


@pytest.mark.parametrize("name", ["memory", "memory-behind-a-port", "memory-huge-pages"])
def test_memory_device(connection, name):
    """As above; a memory device wants cells and slots, and libvirt keeps the host's node."""
    device = (GOLDEN / f"{name}.xml").read_text()
    text = f"""<domain type='test'><name>t</name><maxMemory slots='2' unit='GiB'>8</maxMemory>
        <memory unit='GiB'>5</memory><os><type>hvm</type></os><vcpu>1</vcpu>
        <cpu><numa><cell id='0' cpus='0' memory='512' unit='MiB'/>
        <cell id='1' memory='512' unit='MiB'/></numa></cpu><devices>{device}</devices></domain>"""
    defined = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    shown = defined.XMLDesc(0)
    defined.undefine()
    state = parse_domain(shown, None)
    (found,) = state.virtio_mem
    block, page = (GIB, GIB) if "huge" in name else (2 * MIB, 0)
    assert found == VirtioMem(
        "ua-virtfabric-cxl2",
        1,
        Bytes(4 * GIB),
        Bytes(block),
        Bytes(0),
        Bytes(0),
        CpuSet([2]),
        Bytes(page),
    )
    assert (state.memory_room.slots, state.memory_room.cell) == (1, 1)
    wrong = text.replace(f"<block unit='KiB'>{block >> 10}", "<block unit='KiB'>2047")
    with pytest.raises(libvirt.libvirtError):
        connection.defineXMLFlags(wrong, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def test_schema_refuses_what_is_wrong(connection):
    """The validation above is one that can fail."""
    device = (GOLDEN / "hostdev-pci.xml").read_text().replace("function='0x2'", "function='0x9'")
    with pytest.raises(libvirt.libvirtError):
        connection.defineXMLFlags(domain(device), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def test_network_of_vfs(connection):
    text = (GOLDEN / "network-vfs.xml").read_text()
    network = connection.networkDefineXMLFlags(text, libvirt.VIR_NETWORK_DEFINE_VALIDATE)
    shown = network.XMLDesc(0)
    network.undefine()
    assert "<forward mode='hostdev' managed='no'>" in shown or "<forward mode='hostdev'>" in shown
    assert shown.count("<address type='pci'") == 2


@pytest.mark.parametrize("name", ["memory-dimm", "memory-dimm-huge-pages"])
def test_dimm(connection, name):
    device = (GOLDEN / f"{name}.xml").read_text()
    text = f"""<domain type='test'><name>t</name><maxMemory slots='2' unit='GiB'>8</maxMemory>
        <memory unit='GiB'>2</memory><os><type>hvm</type></os><vcpu>1</vcpu>
        <cpu><numa><cell id='0' cpus='0' memory='512' unit='MiB'/>
        <cell id='1' memory='512' unit='MiB'/></numa></cpu><devices>{device}</devices></domain>"""
    defined = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    shown = defined.XMLDesc(0)
    defined.undefine()
    dimm = parse_domain(shown, None).fixed_memory[-1]
    page = 2 * MIB if "huge" in name else 0
    assert dimm == FixedMemory(
        "dimm ua-virtfabric-cxl2-dimm0", Bytes(GIB), CpuSet([2]), Bytes(page)
    )
