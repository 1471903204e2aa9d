"""Attach and detach: what libvirt is asked, once, and what its answers lead to."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import libvirt
import pytest
from kernel import Machine, a

from virtfabric.adapters.cgroups import Cgroups
from virtfabric.adapters.libvirt.handler import Surroundings
from virtfabric.adapters.libvirt.hostdev import FunctionHandler
from virtfabric.adapters.libvirt.memlock import LockedMemory
from virtfabric.adapters.libvirt.processes import QemuProcesses
from virtfabric.adapters.libvirt.residence import Residence, format_strays, read_residence
from virtfabric.adapters.libvirt.waiting import Pulse
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.sysfs import Sysfs
from virtfabric.domxml.hostdev import format_function
from virtfabric.model.devicesteps import AttachFunction, Presence
from virtfabric.model.errors import (
    DeviceError,
    DeviceGoneError,
    GuestGoneError,
    HypervisorError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.ids import GuestId
from virtfabric.model.units import GIB, MIB, CpuSet
from virtfabric.ports import Event, EventKind

if TYPE_CHECKING:
    from pathlib import Path

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
CARD = a("0000:03:00.0")
PID = 4242
ATTACH = AttachFunction(
    guest=GUEST, name="guest", address=CARD, before=Presence.ABSENT, after=Presence.ATTACHED,
    deadline_s=0.3,
)  # fmt: skip
LIMITS = "Limit  Soft Limit  Hard Limit  Units\nMax locked memory  {soft}  {hard}  bytes\n"
DOMAIN = (
    "<domain type='kvm'{id}><name>guest</name><uuid>" + GUEST + "</uuid><memory>163840</memory>"
    "<vcpu>1</vcpu><devices>{devices}</devices></domain>"
)


class Host:
    """A guest whose libvirt and QEMU do what they are told, one function with vfio-pci.

    Attributes:
        calls: what libvirt was asked.
        obeys: whether the guest lets go when it is asked.
        refusal: libvirt's words to the next call, with its code.
        strays: a line of numa_maps that an attach brings about.
    """

    def __init__(self, root: Path) -> None:
        self.machine = Machine(root)
        self.machine.add(CARD, group=7, driver="vfio-pci")
        self.calls: list[str] = []
        self.running = self.obeys = True
        self.refusal: tuple[str, int] | None = None
        self.devices = ""
        self.strays = ""
        self.qemu = self.machine.add_process(PID)
        self.write_proc()
        self.pulse = Pulse()
        files, proc = self.machine.files, self.machine.proc
        holders = VfioHolders(files, proc)
        around = Surroundings(
            self, QemuProcesses(root / "run", proc), Cgroups(root / "cg", proc),
            Sysfs(self.machine.sys, proc), self.pulse, files, holders,
            LockedMemory(root / "run", proc), proc,
        )  # fmt: skip
        self.handler = FunctionHandler(around)

    def write_proc(self, limit: str = "unlimited") -> None:
        process = self.qemu.parent
        (process / "cmdline").write_bytes(b"qemu\0-uuid\0" + GUEST.encode() + b"\0")
        (process / "limits").write_text(LIMITS.format(soft=limit, hard=limit))
        (process / "status").write_text("CapEff:\t0000000000000000\n")
        (process / "numa_maps").write_text("7f00 bind:1 anon=4 N1=4 kernelpagesize_kB=4\n")
        (process / "task" / str(PID)).mkdir(parents=True, exist_ok=True)
        (process / "task" / str(PID) / "status").write_text("Mems_allowed_list:\t0-1\n")

    # -- the connection and the domain that the handler sees --------------------------------------

    @contextmanager
    def domain(self, guest: GuestId):
        try:
            yield self
        except libvirt.libvirtError as error:
            raise HypervisorError(error.get_error_message()) from error

    def name(self) -> str:
        return "guest"

    def XMLDesc(self, flags: int) -> str:  # noqa: N802 - libvirt's
        return DOMAIN.format(id=" id='1'" if self.running else "", devices=self.devices)

    def attachDeviceFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        self.calls.append(f"attach {flags}")
        self.refuse()
        self.devices = xml
        (self.qemu / "9").symlink_to("/dev/vfio/7")
        (self.machine.path(CARD) / "enable").write_text("1\n")
        with (self.qemu.parent / "numa_maps").open("a") as maps:
            maps.write(self.strays)

    def detachDeviceAlias(self, alias: str, flags: int) -> None:  # noqa: N802
        self.calls.append(f"detach {alias} {flags}")
        self.refuse()
        if self.obeys:
            self.let_go()

    def let_go(self) -> None:
        self.devices = ""
        (self.qemu / "9").unlink(missing_ok=True)
        (self.machine.path(CARD) / "enable").write_text("0\n")

    def refuse(self) -> None:
        if self.refusal is None:
            return
        text, code = self.refusal
        error = libvirt.libvirtError(text)
        error.err = (code, 10, text, 2, "", "", "", 0, 0)
        raise error


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


class Context:
    """A `StepContext`."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def progress(self, fraction: float, text: str) -> None:
        pass


def attach(host, step=ATTACH):
    host.handler.apply(step, Context())


DETACH_CALL = "detach ua-virtfabric-0000-03-00-0 1"


def test_there_and_back_asking_once_each(host):
    with pytest.raises(VerificationError, match="not in the live XML"):
        host.handler.verify(ATTACH)
    for _ in range(2):
        attach(host)
        host.handler.verify(ATTACH)
    assert host.calls == ["attach 1"]
    assert host.devices == format_function(CARD)
    for _ in range(2):
        assert host.handler.undo(ATTACH) == 0
    host.handler.verify(ATTACH.inverse())
    assert host.calls == ["attach 1", DETACH_CALL]


def test_undo_of_what_was_never_attached(host):
    assert host.handler.undo(ATTACH) == 0
    assert host.calls == []


def test_detach_and_its_undo(host):
    attach(host)
    attach(host, ATTACH.inverse())
    with pytest.raises(VerificationError, match="not in the live XML"):
        host.handler.verify(ATTACH)
    assert host.handler.undo(ATTACH.inverse()) == 0
    host.handler.verify(ATTACH)


def test_function_of_another_driver_is_not_attached(host):
    (host.machine.path(CARD) / "driver").unlink()
    with pytest.raises(HypervisorError, match="bound to no driver, not to vfio-pci"):
        attach(host)
    assert host.calls == []


def give_to_vendor(host, *, vfio: bool) -> None:
    (host.machine.path(CARD) / "driver").unlink()
    host.machine.link_driver(CARD, "nvidia")
    if vfio:
        (host.machine.path(CARD) / "vfio-dev" / "vfio3").mkdir(parents=True)


def test_function_of_a_vendors_vfio_driver(host, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.pci.holders._CLOSING_S", 0.01)
    give_to_vendor(host, vfio=True)
    attach(host)
    host.handler.verify(ATTACH)
    assert host.handler.undo(ATTACH) == 0
    host.handler.verify(ATTACH.inverse())
    assert host.calls == ["attach 1", DETACH_CALL]


def test_function_of_a_driver_that_is_none_of_vfio(host):
    give_to_vendor(host, vfio=False)
    with pytest.raises(HypervisorError, match=r"to nvidia, not to vfio-pci nor .* no vfio-dev"):
        attach(host)
    assert host.calls == []


def test_event_that_came_before_qemu_let_go_of_a_vendors_function(host, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.libvirt.hostdev._CLOSED_S", 0.02)
    give_to_vendor(host, vfio=True)
    attach(host)
    host.devices = ""
    with pytest.raises(VerificationError, match="still open"):
        host.handler.verify(ATTACH.inverse())
    with pytest.raises(DeviceError, match=f"process {PID}"):
        attach(host, ATTACH.inverse())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda h: (h.qemu / "9").unlink(), "does not hold it"),
        (lambda h: (h.machine.path(CARD) / "driver").unlink(), "driver vfio-pci expected, none"),
    ],
)
def test_verify_asks_the_kernel_too(host, spoil, said):
    attach(host)
    spoil(host)
    with pytest.raises(VerificationError, match=said):
        host.handler.verify(ATTACH)


def test_memory_that_moved_is_found_out(host):
    host.strays = "7f10 bind:1 anon=512 N0=512 kernelpagesize_kB=4\n"
    attach(host)
    with pytest.raises(VerificationError, match="bound elsewhere: 2MiB on node 0"):
        host.handler.verify(ATTACH)
    assert host.handler.undo(ATTACH) == 0


def test_guest_that_ignores_the_request(host):
    """It is asked once; a later try hears that the first is pending, and does not press it."""
    attach(host)
    host.obeys = False
    with pytest.raises(ShortfallError, match=r"0000:03:00.0 is still attached 0.3 s") as caught:
        attach(host, ATTACH.inverse())
    assert caught.value.reached == 1
    host.refusal = (
        "internal error: unable to execute QEMU command 'device_del': Device "
        "ua-virtfabric-0000-03-00-0 is already in the process of unplug",
        libvirt.VIR_ERR_INTERNAL_ERROR,
    )
    with pytest.raises(ShortfallError):
        attach(host, ATTACH.inverse())
    assert host.calls == ["attach 1", DETACH_CALL, DETACH_CALL]
    assert host.handler.undo(ATTACH.inverse()) == 0  # it has it, as before


def test_undo_that_the_guest_ignores_leaves_one(host, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.libvirt.hostdev._UNDO_WAIT_S", 0.02)
    attach(host)
    host.obeys = False
    assert host.handler.undo(ATTACH) == 1


def test_guest_that_lets_go_late_is_waited_for(host):
    attach(host)
    host.obeys = False
    step = AttachFunction(
        guest=GUEST, address=CARD, before=Presence.ATTACHED, after=Presence.ABSENT, deadline_s=30
    )
    worker = threading.Thread(target=attach, args=(host, step))
    worker.start()
    while DETACH_CALL not in host.calls:
        pass
    host.let_go()
    host.pulse.hear(Event(EventKind.DEVICE_REMOVED, GUEST, "guest", "ua-virtfabric-0000-03-00-0"))
    worker.join(5)
    assert not worker.is_alive()
    host.handler.verify(step)


def test_device_that_left_before_it_was_asked(host):
    attach(host)
    text = host.devices
    host.refusal = ("device not found", libvirt.VIR_ERR_DEVICE_MISSING)
    threading.Timer(0.02, host.let_go).start()
    attach(host, ATTACH.inverse())
    assert text
    assert host.devices == ""


def test_event_that_came_before_qemu_let_go(host, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.libvirt.hostdev._CLOSED_S", 0.02)
    attach(host)
    host.devices = ""
    with pytest.raises(VerificationError, match="still open"):
        host.handler.verify(ATTACH.inverse())
    with pytest.raises(DeviceError, match=f"process {PID}"):
        attach(host, ATTACH.inverse())


def test_other_refusals_are_told(host):
    host.refusal = ("No more available PCI slots", libvirt.VIR_ERR_INTERNAL_ERROR)
    with pytest.raises(HypervisorError, match="PCI slots"):
        attach(host)
    assert host.handler.undo(ATTACH) == 0


def test_caller_who_gives_up(host):
    attach(host)
    host.obeys = False
    context = Context()
    context.cancelled.set()
    with pytest.raises(StepCancelledError):
        host.handler.apply(ATTACH.inverse(), context)


def test_guest_that_stopped(host):
    attach(host)
    host.running = False
    assert host.handler.undo(ATTACH) == 0
    with pytest.raises(GuestGoneError):
        attach(host)


def test_function_that_was_taken_out(host):
    host.machine.remove(CARD)
    with pytest.raises(DeviceGoneError):
        attach(host)
    assert host.handler.undo(ATTACH) == 0
    assert host.handler.undo(ATTACH.inverse()) == 0


class TestLockedMemory:
    """160 MiB and 1 GiB are needed."""

    def daemon(self, tmp_path, host, capabilities: str) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "libvirtd.pid").write_text("55\n")
        host.machine.add_process(55)
        (host.machine.proc / "55" / "status").write_text(f"CapEff:\t{capabilities}\n")

    def test_libvirt_may_raise_it(self, host, tmp_path):
        host.write_proc(limit="65536")
        self.daemon(tmp_path, host, "000001ffffffffff")
        attach(host)

    def test_libvirt_may_not(self, host, tmp_path):
        host.write_proc(limit="65536")
        self.daemon(tmp_path, host, f"{0x1FFFFFFFFFF & ~(1 << 24):016x}")
        with pytest.raises(HypervisorError, match=r"must lock 1184MiB .* may lock 64KiB") as caught:
            attach(host)
        assert "LimitMEMLOCK" in caught.value.advice
        assert host.calls == []
        host.write_proc(limit=str(160 * MIB + GIB))
        attach(host)

    def test_libvirts_own_refusal_has_the_advice(self, host):
        host.refusal = (
            "cannot limit locked memory of process 96 to 5368709120: Operation not permitted",
            libvirt.VIR_ERR_SYSTEM_ERROR,
        )
        with pytest.raises(HypervisorError, match="cannot limit") as caught:
            attach(host)
        assert "LimitMEMLOCK" in caught.value.advice

    def test_daemon_that_is_not_found_is_left_to_try(self, host):
        host.write_proc(limit="65536")
        attach(host)
        assert host.calls == ["attach 1"]


class TestResidence:
    """What of numa_maps counts."""

    def read(self, tmp_path, text, allowed="0-1"):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "numa_maps").write_text(text)
        return read_residence(tmp_path, 1, CpuSet.parse(allowed, field="x")).outside

    @pytest.mark.parametrize(
        ("line", "outside"),
        [
            ("7f00 bind:1 anon=8 N0=3 N1=5 kernelpagesize_kB=4", {0: 12 << 10}),
            ("7f00 bind=static:1 anon=8 N0=3 kernelpagesize_kB=4", {0: 12 << 10}),
            ("7f00 bind:0-1 anon=8 N0=3 N1=5 kernelpagesize_kB=4", {}),
            ("7f00 bind:1 file=/memfd:ram dirty=1 N2=1 kernelpagesize_kB=2048", {2: 2 << 20}),
            ("7f00 bind:1 file=/usr/lib/libc.so.6 N0=3 kernelpagesize_kB=4", {}),
            ("7f00 default heap anon=8 N2=1 kernelpagesize_kB=4", {2: 4096}),
            ("7f00 prefer:1 anon=8 N0=1 kernelpagesize_kB=4", {}),
            ("7f00 bind:1", {}),
        ],
    )
    def test_lines(self, tmp_path, line, outside):
        assert self.read(tmp_path, f"{line}\n") == outside

    def test_only_what_is_more_than_before_strayed(self):
        before, after = Residence({0: 4096, 2: 8192}), Residence({0: 8192, 2: 8192, 3: 1 << 20})
        assert after.strayed_since(before) == {0: 4096, 3: 1 << 20}
        assert format_strays(after.strayed_since(before)) == "4KiB on node 0, 1MiB on node 3"
        assert before.strayed_since(after) == {}

    def test_process_that_ended(self, tmp_path):
        with pytest.raises(GuestGoneError):
            read_residence(tmp_path, 1, CpuSet())


def test_conventional_function_is_put_behind_a_port(host):
    """libvirt would look for a slot that a PCIe guest has not; a PCIe function it places itself."""
    host.devices = "<controller type='pci' index='4' model='pcie-root-port'/>"
    attach(host)
    assert host.devices == format_function(CARD, 4)
    host.let_go()
    host.devices = "<controller type='pci' index='4' model='pcie-root-port'/>"
    (host.machine.path(CARD) / "max_link_speed").write_text("8.0 GT/s PCIe\n")
    attach(host)
    assert host.devices == format_function(CARD)
