"""Each template renders to its golden file; `VIRTFABRIC_GOLDEN=write` writes them anew."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from lxml import etree

from virtfabric.domxml import templates
from virtfabric.domxml.hostdev import (
    format_function,
    format_mdev,
    format_vf_interface,
    format_vf_network,
)
from virtfabric.domxml.memory import format_dimm, format_memory_device
from virtfabric.domxml.policy import format_policy, parse_policy
from virtfabric.model.device import PciAddress, VfSettings
from virtfabric.model.ids import GuestId
from virtfabric.model.memorysteps import AttachDimm, AttachMemory
from virtfabric.model.policy import (
    Admission,
    CpuPolicy,
    DevicePolicy,
    DriftAction,
    Escalation,
    Growth,
    GuestPolicy,
    MemoryPolicy,
    Placement,
    Smt,
)
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu
from virtfabric.resources import xml_template_dir
from virtfabric.shim.guestxml import GuestSpec, format_guest_xml
from virtfabric.shim.topology.labxml import (
    LabDomain,
    format_cell,
    format_commandline,
    format_host_bridge,
    format_lab_xml,
    format_root_port,
)
from virtfabric.shim.topology.model import HostBridge, Node
from virtfabric.shim.topology.seats import choose_seats
from virtfabric.shim.topology.shipped import read_shipped_topology, shipped_topologies

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
POLICY = GuestPolicy(
    priority=80,
    admission=Admission.STRICT,
    drift=DriftAction.REPAIR,
    cpu=CpuPolicy(MilliCpu(1000), MilliCpu(4000), 200, Placement.DEDICATED, Smt.ISOLATE),
    memory=MemoryPolicy(Bytes(512 * MIB), Bytes(4 * GIB), 100, ("dram", "cxl")),
    devices=(DevicePolicy("net.vf", 1),),
)

MEMORY = AttachMemory(
    guest=GuestId("00000000-0000-4000-8000-000000000001"), alias="ua-virtfabric-cxl2", node=2,
    cell=1, size=4 * GIB, block=2 * MIB, before=0, after=GIB,
)  # fmt: skip
DIMM = AttachDimm(
    guest=MEMORY.guest, alias="ua-virtfabric-cxl2-dimm0", node=2, cell=1, before=0, after=GIB
)
MDEV = "00000000-0000-4000-8000-00000000aaaa"
VFS = (PciAddress("0000:01:10.0"), PciAddress("10000:01:10.2"))


def _domain(*, virtio_mem: int | None) -> str:
    return format_guest_xml(
        GuestSpec(
            name="golden",
            uuid="00000000-0000-4000-8000-000000000001",
            kernel=Path("/boot/vmlinux"),
            initrd=Path("/boot/initrd"),
            console_log="/var/log/libvirt/golden.log",
            vcpus=1,
            max_vcpus=4,
            memory_mib=160,
            virtio_mem_mib=virtio_mem,
            metadata_xml=format_policy(POLICY),
        )
    )


def _lab(name: str) -> str:
    return format_lab_xml(
        read_shipped_topology(name),
        LabDomain(
            name=f"lab-{name}",
            uuid="00000000-0000-4000-8000-000000000002",
            state=Path("/var/lib/lab"),
            kernel=Path("/boot/vmlinuz"),
            initrd=Path("/boot/initrd"),
            cmdline="root=/dev/vda rw console=ttyS0 intel_iommu=on",
            disk=Path("/var/lib/lab/disk.raw"),
            console_log=Path("/var/log/libvirt/lab.log"),
        ),
    )


def _root_port() -> str:
    seat = choose_seats(read_shipped_topology("passthrough"))["node1-rp0"]
    return format_root_port(seat, index=4, bus=1)


CASES = {
    **{f"lab-{name}.xml": partial(_lab, name) for name in shipped_topologies()},
    "cell-memory-only.xml": lambda: format_cell(Node(id=2, memory=Bytes(GIB))),
    "cell-distances.xml": lambda: format_cell(
        Node(id=1, memory=Bytes(GIB), cpus=CpuSet({4, 5})), shared=True, distances={0: 21, 1: 10}
    ),
    "controller-host-bridge.xml": lambda: format_host_bridge(
        HostBridge(id="pxb1", bus=80, node=1), index=1, slot=0x18
    ),
    "controller-host-bridge-of-no-node.xml": lambda: format_host_bridge(
        HostBridge(id="pxb1", bus=80), index=1, slot=0x18
    ),
    "controller-root-port.xml": _root_port,
    "commandline.xml": lambda: format_commandline(("-device", "edu,id=<&'>")),
    "policy.xml": lambda: format_policy(POLICY),
    "policy-default.xml": lambda: format_policy(GuestPolicy()),
    "memory.xml": lambda: format_memory_device(MEMORY, None),
    "memory-huge-pages.xml": lambda: format_memory_device(
        replace(MEMORY, block=GIB, page=GIB), None
    ),
    "memory-dimm.xml": lambda: format_dimm(DIMM),
    "memory-dimm-huge-pages.xml": lambda: format_dimm(replace(DIMM, page=2 * MIB)),
    "policy-no-escalation.xml": lambda: format_policy(
        GuestPolicy(memory=MemoryPolicy(escalate=Escalation.NO, growth=Growth.DIMM))
    ),
    "policy-dimm.xml": lambda: format_policy(GuestPolicy(memory=MemoryPolicy(growth=Growth.DIMM))),
    "memory-behind-a-port.xml": lambda: format_memory_device(MEMORY, 5),
    "hostdev-pci.xml": lambda: format_function(PciAddress("0000:01:10.2")),
    "hostdev-pci-behind-a-port.xml": lambda: format_function(PciAddress("0000:02:00.0"), 4),
    "hostdev-mdev.xml": lambda: format_mdev(MDEV, "ua-virtfabric-mdev0"),
    "network-vfs.xml": lambda: format_vf_network("vfs", VFS),
    "interface-vf.xml": lambda: format_vf_interface(
        "vfs", "ua-virtfabric-net0", VfSettings(mac="52:54:00:00:00:01", vlan=7)
    ),
    "interface-vf-default.xml": lambda: format_vf_interface("vfs", "ua-net0", VfSettings()),
    "domain-virtio-mem.xml": lambda: _domain(virtio_mem=256),
    "domain-balloon.xml": lambda: _domain(virtio_mem=None),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    text = CASES[name]()
    etree.fromstring(text)
    path = GOLDEN / name
    if os.environ.get("VIRTFABRIC_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_the_policy_reads_back() -> None:
    assert parse_policy(format_policy(POLICY)) == POLICY


def test_every_template_has_a_golden_case() -> None:
    covered = {name.split("-")[0].removesuffix(".xml") for name in CASES}
    assert {p.name.removesuffix(".xml.j2") for p in xml_template_dir().glob("*.j2")} == covered


def test_loaded_templates_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Jinja nor a template costs the first guest time that wants something."""
    templates._environment.cache_clear()
    templates.load_templates()
    loader = templates._environment().loader
    assert loader is not None

    def refuse(*_: object) -> None:
        raise AssertionError("a template is read again")

    monkeypatch.setattr(loader, "get_source", refuse)
    for name in CASES:
        assert CASES[name]() == (GOLDEN / name).read_text()


def test_text_cannot_break_out_of_its_element() -> None:
    spec = GuestSpec(
        name="a</name><evil/>", kernel=Path("/k"), initrd=Path("/i"), console_log="/c.log"
    )
    root = etree.fromstring(format_guest_xml(spec))
    assert root.findtext("name") == "a</name><evil/>"
