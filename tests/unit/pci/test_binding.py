"""Drivers, bound and given back on a tree that answers like the kernel."""

from __future__ import annotations

import errno
import threading

import pytest
from kernel import a

from virtfabric.adapters.pci.binding import BindDriverHandler, DriverBinder
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.model.devicesteps import BindDriver
from virtfabric.model.errors import (
    DeviceError,
    DeviceGoneError,
    InvalidValueError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import SetQuota

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
NIC = a("0000:01:00.0")
TAKE = BindDriver(guest=GUEST, address=NIC, before="igb", after="vfio-pci")


class Bench:
    """A NIC bound to igb, and the handler."""

    def __init__(self, machine):
        self.machine = machine
        machine.add(NIC, group=5, driver="igb")
        machine.add_driver("vfio-pci")
        (machine.files.root / "module" / "vfio_iommu_type1").mkdir(parents=True)
        machine.matches[NIC] = "igb"
        self.uses: tuple[str, ...] = ()
        self.loaded: list[str] = []
        holders = VfioHolders(machine.files, machine.proc)
        binder = DriverBinder(machine.files, holders, lambda _a: self.uses, self.loaded.append)
        self.handler = BindDriverHandler(machine.files, binder)

    def override(self):
        return (self.machine.path(NIC) / "driver_override").read_text().strip()


@pytest.fixture
def bench(machine):
    return Bench(machine)


def test_there_and_back(bench, context):
    for _ in range(2):  # repeating is safe
        bench.handler.apply(TAKE, context)
        bench.handler.verify(TAKE)
        assert (bench.machine.driver(NIC), bench.override()) == ("vfio-pci", "vfio-pci")
    for _ in range(2):
        assert bench.handler.undo(TAKE) == 0
        assert (bench.machine.driver(NIC), bench.override()) == ("igb", "(null)")
    bench.handler.verify(TAKE.inverse())
    assert bench.machine.files.log == [
        "unbind=0000:01:00.0", "driver_override=vfio-pci", "drivers_probe=0000:01:00.0",
        "unbind=0000:01:00.0", "driver_override=igb", "drivers_probe=0000:01:00.0",
        "driver_override=",
    ]  # fmt: skip
    assert bench.loaded == []


def test_undo_of_what_was_never_applied_touches_nothing(bench):
    assert bench.handler.undo(TAKE) == 0
    assert bench.machine.files.log == []


def test_undo_takes_away_an_override_that_a_crash_left(bench, context):
    bench.machine.files.put(bench.machine.path(NIC) / "driver_override", "vfio-pci")
    assert bench.handler.undo(TAKE) == 0
    assert (bench.machine.driver(NIC), bench.override()) == ("igb", "(null)")


def test_none_only_unbinds_and_stays_so(bench, context):
    step = BindDriver(guest=GUEST, address=NIC, before="igb", after="")
    bench.handler.apply(step, context)
    bench.handler.verify(step)
    assert bench.machine.driver(NIC) == ""
    assert bench.machine.files.log == ["unbind=0000:01:00.0"]
    bench.handler.undo(step)
    assert bench.machine.driver(NIC) == "igb"


def test_a_probe_that_binds_nothing_is_found_out(bench, context):
    bench.machine.declines.add("vfio-pci")
    with pytest.raises(DeviceError, match="did not take it, none is bound"):
        bench.handler.apply(TAKE, context)
    assert bench.handler.undo(TAKE) == 0
    assert (bench.machine.driver(NIC), bench.override()) == ("igb", "(null)")


def test_a_probe_that_fails_is_told(bench, context):
    bench.machine.files.fails["drivers_probe"] = errno.EINVAL
    with pytest.raises(DeviceError, match="vfio-pci does not take it: Invalid argument"):
        bench.handler.apply(TAKE, context)


def test_a_driver_that_is_not_there_is_loaded_first(machine, bench, context):
    (machine.bus / "drivers" / "vfio-pci" / "unbind").unlink()
    (machine.bus / "drivers" / "vfio-pci").rmdir()
    with pytest.raises(DeviceError, match="did not take"):
        bench.handler.apply(TAKE, context)
    assert bench.loaded == ["vfio-pci"]


def test_what_qemu_needs_beside_vfio_pci_is_loaded_for_guests_only(machine, bench, context):
    (machine.files.root / "module" / "vfio_iommu_type1").rmdir()
    bench.handler.apply(TAKE, context)
    assert bench.loaded == ["vfio_iommu_type1"]
    bench.handler.undo(TAKE)
    assert bench.loaded == ["vfio_iommu_type1"]


def test_verify_names_what_is_wrong(bench, context):
    with pytest.raises(VerificationError, match="vfio-pci expected, igb found"):
        bench.handler.verify(TAKE)
    bench.handler.apply(TAKE, context)
    (bench.machine.path(NIC) / "driver_override").write_text("(null)\n")
    with pytest.raises(VerificationError, match="driver_override vfio-pci expected"):
        bench.handler.verify(TAKE)


def test_what_the_host_uses_is_not_unbound(bench, context):
    bench.uses = ("eth1 is up",)
    with pytest.raises(DeviceError, match="in use by the host: eth1 is up") as caught:
        bench.handler.apply(TAKE, context)
    assert caught.value.advice
    assert bench.machine.files.log == []
    assert bench.machine.driver(NIC) == "igb"


def test_what_a_guest_has_open_is_not_unbound(bench, context, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.pci.binding._CLOSED_S", 0.02)
    bench.handler.apply(TAKE, context)
    (bench.machine.path(NIC) / "enable").write_text("1\n")
    bench.machine.add_process(77, "/dev/vfio/vfio", "/dev/vfio/5")
    with pytest.raises(DeviceError, match=r"still open after .* \(process 77\)"):
        bench.handler.undo(TAKE)
    assert bench.machine.driver(NIC) == "vfio-pci"


def test_unbinding_waits_until_it_is_closed(bench, context):
    bench.handler.apply(TAKE, context)
    enable = bench.machine.path(NIC) / "enable"
    enable.write_text("1\n")
    timer = threading.Timer(0.05, lambda: enable.write_text("0\n"))
    timer.start()
    assert bench.handler.undo(TAKE) == 0
    timer.join()
    assert bench.machine.driver(NIC) == "igb"


VENDOR = BindDriver(guest=GUEST, address=NIC, before="igb", after="vendor-vfio")


@pytest.fixture
def vendor(bench):
    """A vendor's vfio driver, as the kernel shows one while it has the NIC."""
    bench.machine.add_driver("vendor-vfio")
    shown = bench.machine.path(NIC) / "vfio-dev" / "vfio0"
    shown.mkdir(parents=True)
    return bench


def test_a_vendors_vfio_driver_leaves_no_override(vendor, context):
    vendor.handler.apply(VENDOR, context)
    vendor.handler.verify(VENDOR)
    assert (vendor.machine.driver(NIC), vendor.override()) == ("vendor-vfio", "(null)")


def test_what_a_guest_has_open_under_a_vendors_driver_is_not_unbound(vendor, context, monkeypatch):
    """That driver may enable it whenever it likes: who has its files open is all there is."""
    monkeypatch.setattr("virtfabric.adapters.pci.binding._CLOSED_S", 0.02)
    (vendor.machine.path(NIC) / "driver").unlink()
    vendor.machine.link_driver(NIC, "vendor-vfio")
    for file in ("/dev/vfio/5", "/dev/vfio/devices/vfio0"):
        descriptors = vendor.machine.add_process(77, file)
        with pytest.raises(DeviceError, match=r"still open after .* \(process 77\)"):
            vendor.handler.undo(VENDOR)
        assert vendor.machine.driver(NIC) == "vendor-vfio"
        (descriptors / "0").unlink()
        descriptors.rmdir()
        descriptors.parent.rmdir()
    monkeypatch.setattr("virtfabric.adapters.pci.binding._CLOSED_S", 10)
    monkeypatch.setattr("virtfabric.adapters.pci.holders._CLOSING_S", 0.01)
    assert vendor.handler.undo(VENDOR) == 0
    assert vendor.machine.driver(NIC) == "igb"


def test_waiting_ends_when_the_caller_gives_up(bench, context):
    bench.handler.apply(TAKE, context)
    (bench.machine.path(NIC) / "enable").write_text("1\n")
    context.cancelled.set()
    with pytest.raises(StepCancelledError):
        bench.handler.apply(TAKE.inverse(), context)


def test_a_function_that_vanished(bench, context):
    bench.handler.apply(TAKE, context)
    bench.machine.remove(NIC)
    assert bench.handler.undo(TAKE) == 0
    with pytest.raises(DeviceGoneError, match=r"0000:01:00.0 is not there"):
        bench.handler.apply(TAKE, context)
    with pytest.raises(DeviceGoneError):
        bench.handler.verify(TAKE)


def test_other_steps_are_refused(bench, context):
    with pytest.raises(InvalidValueError, match="bind-driver"):
        bench.handler.apply(SetQuota(guest=GUEST, before=-1, after=1000), context)
