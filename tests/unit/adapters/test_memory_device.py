"""`AttachMemory` for real: what libvirt is asked, in which order, and what must show afterwards."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import libvirt
import pytest
from lxml import etree

from virtfabric.adapters.cgroups import Cgroups
from virtfabric.adapters.libvirt.dimm import DimmHandler
from virtfabric.adapters.libvirt.handler import Surroundings
from virtfabric.adapters.libvirt.memlock import LockedMemory
from virtfabric.adapters.libvirt.memory import VirtioMemHandler
from virtfabric.adapters.libvirt.memorydevice import DetachMemoryHandler, MemoryDeviceHandler
from virtfabric.adapters.libvirt.processes import QemuProcesses
from virtfabric.adapters.libvirt.residence import bound_size, is_bound
from virtfabric.adapters.libvirt.waiting import Pulse
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.sysfs import Sysfs
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    RefusedError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.ids import GuestId
from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.units import GIB, MIB, CpuSet

if TYPE_CHECKING:
    from pathlib import Path

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
PID = 4242
STEP = AttachMemory(
    guest=GUEST, name="db", alias="ua-virtfabric-cxl2", node=2, cell=0, size=GIB, block=2 * MIB,
    before=0, after=64 * MIB, deadline_s=0.3,
)  # fmt: skip
DETACH = DetachMemory(
    guest=GUEST, name="db", alias=STEP.alias, node=2, cell=0, size=GIB, block=2 * MIB,
    deadline_s=0.3,
)  # fmt: skip
DOMAIN = """<domain type='kvm'{id}><name>db</name><uuid>{uuid}</uuid>
  <maxMemory slots='2' unit='GiB'>4</maxMemory><memory unit='MiB'>512</memory><vcpu>1</vcpu>
  <cpu><numa><cell id='0' cpus='0' memory='512' unit='MiB'/></numa></cpu><devices>
  <controller type='pci' index='0' model='pcie-root'/>
  <controller type='pci' index='3' model='pcie-root-port'/>
  <memballoon model='none'/>{device}</devices></domain>"""


class Host:
    """A guest whose libvirt and QEMU do what they are told.

    Attributes:
        calls: what libvirt was asked.
        keeps: MiB that the guest keeps of what it is asked to give.
        obeys: whether it lets the device go.
        binds: QEMU's memory policy for the device.
        lingers: whether QEMU's memory stays when the device has gone.
    """

    def __init__(self, root: Path) -> None:
        self.calls: list[str] = []
        self.device = ""
        self.keeps = 0
        self.running = self.obeys = True
        self.binds = "bind:2"
        self.lingers = False
        self.proc = root / "proc"
        (self.proc / str(PID) / "task" / str(PID)).mkdir(parents=True)
        (self.proc / str(PID) / "cmdline").write_bytes(b"qemu\0-uuid\0" + GUEST.encode() + b"\0")
        self.write_maps()
        files = FunctionFiles(root / "sys")
        around = Surroundings(
            self, QemuProcesses(root / "run", self.proc), Cgroups(root / "cg", self.proc),
            Sysfs(root / "sys", self.proc), Pulse(), files, VfioHolders(files, self.proc),
            LockedMemory(root / "run", self.proc), self.proc,
        )  # fmt: skip
        self.handler = MemoryDeviceHandler(around)
        self.growing = VirtioMemHandler(around)
        self.detaching = DetachMemoryHandler(around)
        self.dimms = DimmHandler(around)

    def write_maps(self) -> None:
        lines = ["7f00 default heap anon=8 N0=8 kernelpagesize_kB=4"]
        if self.device or self.lingers:
            lines.append(f"7f01 {self.binds} anon=8 N2=8 kernelpagesize_kB=4")
        (self.proc / str(PID) / "numa_maps").write_text("\n".join(lines) + "\n")
        areas = ["7f00-8f00 rw-p 0 00:00 0 [heap]", "7f01-100007f01 rw-p 0 00:00 0"]
        (self.proc / str(PID) / "maps").write_text("\n".join(areas) + "\n")

    @contextmanager
    def domain(self, guest: GuestId):
        try:
            yield self
        except libvirt.libvirtError as error:
            raise HypervisorError(error.get_error_message()) from error

    def name(self) -> str:
        return "db"

    def XMLDesc(self, flags: int) -> str:  # noqa: N802 - libvirt's
        state = " id='1'" if self.running else ""
        return DOMAIN.format(id=state, uuid=GUEST, device=self.device)

    def attachDeviceFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        element = etree.fromstring(xml)
        address = element.find("address")
        port = int(address.get("bus"), 16) if address is not None else None
        requested = element.findtext("target/requested")
        self.calls.append(f"attach at port {port} with {requested} KiB, flags {flags}")
        self.set(element, 0)

    def updateDeviceFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        element = etree.fromstring(xml)
        requested = int(element.findtext("target/requested"))
        self.calls.append(f"request {requested >> 10} MiB")
        self.set(element, max(requested, self.keeps << 10))

    def set(self, element: etree._Element, current_kib: int) -> None:
        found = element.find("target/current")
        if found is None:
            found = etree.SubElement(element.find("target"), "current", unit="KiB")
        found.text = str(current_kib)
        self.device = etree.tostring(element, encoding="unicode")
        self.write_maps()

    def detachDeviceAlias(self, alias: str, flags: int) -> None:  # noqa: N802
        self.calls.append(f"detach {alias}, flags {flags}")
        if self.obeys:
            self.device = ""
            self.write_maps()


class Context:
    """A `StepContext`."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def progress(self, fraction: float, text: str) -> None:
        pass


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def apply(host, step=STEP):
    host.handler.apply(step, Context())


ATTACHED = ["attach at port 3 with 0 KiB, flags 1", "request 64 MiB"]
GONE = ["request 0 MiB", "detach ua-virtfabric-cxl2, flags 1"]


def test_there_and_back(host):
    with pytest.raises(VerificationError, match="not in the live XML"):
        host.handler.verify(STEP)
    apply(host)
    host.handler.verify(STEP)
    assert host.calls == ATTACHED
    apply(host)  # once more attaches nothing
    assert host.calls == [*ATTACHED, "request 64 MiB"]
    assert host.handler.undo(STEP) == 0
    host.handler.verify(STEP.inverse())
    assert host.calls[3:] == GONE
    assert host.handler.undo(STEP) == 0
    assert host.calls[3:] == GONE


def test_large_growth_is_taken_in_steps(host):
    apply(host, replace(STEP, after=GIB))
    assert host.calls[1:] == ["request 512 MiB", "request 1024 MiB"]


def test_detach_as_a_step_and_its_way_back(host):
    apply(host)
    host.calls.clear()
    back = STEP.inverse()
    apply(host, back)
    host.handler.verify(back)
    assert host.calls == GONE
    assert host.handler.undo(back) == 0
    host.handler.verify(STEP)
    assert host.calls == [*GONE, *ATTACHED]


def test_guest_that_keeps_some_keeps_the_device(host):
    apply(host)
    host.calls.clear()
    host.keeps = 6
    assert host.handler.undo(STEP) == 6 * MIB
    assert host.calls == ["request 0 MiB"]
    with pytest.raises(VerificationError, match="still in the live XML"):
        host.handler.verify(STEP.inverse())


def test_device_that_the_guest_does_not_let_go_is_asked_for_once(host):
    apply(host)
    host.calls.clear()
    host.obeys = False
    with pytest.raises(ShortfallError, match="is empty, but still attached"):
        apply(host, STEP.inverse())
    assert host.calls == GONE


def test_empty_device_leaves_and_comes_back_empty(host):
    apply(host)
    apply(host, replace(STEP, before=64 * MIB, after=64 * MIB))
    with pytest.raises(ShortfallError, match="still holds 64MiB"):
        host.detaching.apply(DETACH, Context())
    host.updateDeviceFlags(host.device.replace(">65536</requested>", ">0</requested>"), 1)
    host.calls.clear()
    with pytest.raises(VerificationError, match="still in the live XML"):
        host.detaching.verify(DETACH)
    host.detaching.apply(DETACH, Context())
    host.detaching.verify(DETACH)
    host.detaching.apply(DETACH, Context())  # once more asks nobody
    assert host.calls == GONE[1:]
    assert host.detaching.undo(DETACH) == 0
    assert host.calls[1:] == ATTACHED[:1]
    host.detaching.verify(DETACH.inverse())
    assert host.detaching.undo(DETACH) == 0
    assert host.calls[1:] == ATTACHED[:1]


def test_empty_device_on_huge_pages_comes_back_on_huge_pages(host):
    assert host.detaching.undo(replace(DETACH, page=2 * MIB)) == 0
    assert [e.get("unit") + e.text for e in etree.fromstring(host.device).iter("pagesize")] == [
        "KiB2048"
    ]


def test_empty_device_that_the_guest_does_not_let_go_is_asked_for_once(host):
    apply(host, replace(STEP, after=2 * MIB))
    host.updateDeviceFlags(host.device.replace(">2048</requested>", ">0</requested>"), 1)
    host.calls.clear()
    host.obeys = False
    with pytest.raises(ShortfallError, match="is empty, but still attached"):
        host.detaching.apply(DETACH, Context())
    assert host.calls == GONE[1:]
    assert host.detaching.undo(DETACH) == 0
    assert host.calls == GONE[1:]


def test_device_has_left_but_qemu_keeps_its_memory(host):
    host.lingers = True
    host.write_maps()
    with pytest.raises(VerificationError, match="still has memory bound to node 2"):
        host.detaching.verify(DETACH)


@pytest.mark.parametrize("policy", ["bind:0", "bind:0-2", "prefer:2", "default"])
def test_memory_that_qemu_did_not_bind_to_the_node(host, policy):
    host.binds = policy
    apply(host)
    with pytest.raises(VerificationError, match="has no memory bound to node 2"):
        host.handler.verify(STEP)


def test_nodemask_that_libvirt_dropped(host):
    apply(host)
    host.device = host.device.replace("<nodemask>2</nodemask>", "")
    with pytest.raises(VerificationError, match="node 2 expected, no node in the live XML"):
        host.handler.verify(STEP)


def test_without_a_free_port_libvirt_is_left_to_say_so(host):
    behind = "<address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>"
    host.device = f"<interface type='user'>{behind}</interface>"
    apply(host)
    assert host.calls[0] == "attach at port None with 0 KiB, flags 1"


def test_guest_that_stopped(host):
    host.running = False
    with pytest.raises(GuestGoneError):
        apply(host)
    assert host.handler.undo(STEP) == 0


def test_bound(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "numa_maps").write_text("7f00 default\n7f01 bind=static:3 N3=1\n")
    assert is_bound(tmp_path, 1, 3)
    assert not is_bound(tmp_path, 1, 2)
    with pytest.raises(GuestGoneError):
        is_bound(tmp_path, 2, 3)


def test_growth_after_the_node_was_away_is_refused(host):
    """What QEMU mapped for the device is bound to another node since then."""
    apply(host)
    grow = ResizeVirtioMem(
        guest=GUEST, name="db", alias=STEP.alias, before=64 * MIB, after=128 * MIB,
        tolerance=0, deadline_s=5, tier="cxl",
    )  # fmt: skip
    growing = host.growing
    growing.apply(grow, Context())
    host.binds = "bind:0"
    host.write_maps()
    growing.apply(grow.inverse(), Context())  # what is there goes back
    host.calls.clear()
    with pytest.raises(RefusedError, match="memory reclaim 2 --detach"):
        growing.apply(grow, Context())
    assert host.calls == []
    host.binds = "bind:2"
    host.write_maps()
    growing.apply(grow, Context())
    growing.verify(grow)


def test_bound_size(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "numa_maps").write_text("7f00 bind:3\n8000 bind:3-4\na000 bind:3 N3=1\n")
    (tmp_path / "1" / "maps").write_text("7f00-8000 rw-p\n8000-9000 rw-p\na000-c000 rw-p\n")
    assert bound_size(tmp_path, 1, CpuSet([3])) == 0x2100
    assert bound_size(tmp_path, 1, CpuSet([3, 4])) == 0x1000
    with pytest.raises(GuestGoneError):
        bound_size(tmp_path, 2, CpuSet([3]))


# -- DIMMs ------------------------------------------------------------------------------------

DIMM = AttachDimm(
    guest=GUEST, name="db", alias="ua-virtfabric-cxl2-dimm0", node=2, cell=0, before=0,
    after=256 * MIB, deadline_s=0.3,
)  # fmt: skip


def test_dimm_there_and_back(host):
    with pytest.raises(VerificationError, match="256MiB expected, 0B in the live XML"):
        host.dimms.verify(DIMM)
    host.dimms.apply(DIMM, Context())
    host.dimms.verify(DIMM)
    host.dimms.apply(DIMM, Context())  # once more attaches nothing
    assert host.calls == ["attach at port None with None KiB, flags 1"]
    assert host.dimms.undo(DIMM) == 0
    assert host.dimms.undo(DIMM) == 0
    assert host.calls[1:] == ["detach ua-virtfabric-cxl2-dimm0, flags 1"]
    host.dimms.verify(DIMM.inverse())


def test_dimm_that_the_guest_keeps_is_a_residue(host, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.libvirt.dimm._UNDO_WAIT_S", 0.1)
    host.dimms.apply(DIMM, Context())
    host.obeys = False
    assert host.dimms.undo(DIMM) == 256 * MIB
    with pytest.raises(ShortfallError, match="it has pages on it that cannot move") as caught:
        host.dimms.apply(DIMM.inverse(), Context())
    assert caught.value.reached == 256 * MIB


@pytest.mark.parametrize("policy", ["bind:0", "default"])
def test_dimm_that_qemu_did_not_bind_to_the_node(host, policy):
    host.binds = policy
    host.dimms.apply(DIMM, Context())
    with pytest.raises(VerificationError, match="has no memory bound to node 2"):
        host.dimms.verify(DIMM)


def test_dimm_of_a_guest_that_stopped(host):
    host.running = False
    with pytest.raises(GuestGoneError):
        host.dimms.apply(DIMM, Context())
    assert host.dimms.undo(DIMM) == 0
