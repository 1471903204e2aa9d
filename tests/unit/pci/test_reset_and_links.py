"""Resets (and what is true without one), who has a function open, and link limits."""

from __future__ import annotations

import errno

import pytest
from kernel import a

from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.linkspeed import LimitLinkHandler, LinkSpeeds
from virtfabric.adapters.pci.reset import ResetHandler
from virtfabric.model.devicesteps import LimitLink, ResetFunction
from virtfabric.model.errors import DeviceError, DeviceGoneError, VerificationError
from virtfabric.model.ids import GuestId

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
PORT, ONE, TWO = a("0000:00:10.0"), a("0000:03:00.0"), a("0000:03:00.1")
RESET = ResetFunction(guest=GUEST, address=ONE)


def open_by_guest(machine, address):
    (machine.path(address) / "enable").write_text("1\n")
    machine.add_process(70, "/dev/vfio/9")


def give_to_vendor(machine, address):
    """Under a vfio driver of which nobody knows what it does on closing."""
    (machine.path(address) / "driver").unlink()
    machine.link_driver(address, "nvidia")
    (machine.path(address) / "vfio-dev" / "vfio3").mkdir(parents=True)


@pytest.fixture
def slot(machine):
    """Two functions of one slot behind a port, both with vfio-pci."""
    machine.add(PORT)
    for address in (ONE, TWO):
        machine.add(address, parent=PORT, group=9, driver="vfio-pci")
    return machine


@pytest.fixture
def reset(slot):
    return ResetHandler(slot.files, VfioHolders(slot.files, slot.proc))


def test_reset_by_the_kernel(slot, reset, context):
    (slot.path(ONE) / "reset").touch()
    reset.apply(RESET, context)
    reset.verify(RESET)
    assert slot.files.log == ["reset=1"]
    assert reset.undo(RESET) == 0


def test_reset_that_fails_is_told(slot, reset, context):
    (slot.path(ONE) / "reset").touch()
    slot.files.fails["reset"] = errno.ETIMEDOUT
    with pytest.raises(DeviceError, match=r"0000:03:00.0: writing '1' to reset: Connection timed"):
        reset.apply(RESET, context)


def test_file_without_a_method_behind_it(slot, reset, context):
    (slot.path(ONE) / "reset").touch()
    slot.files.fails["reset"] = errno.ENOTTY
    reset.apply(RESET, context)
    assert any("reset its bus on closing" in note for note in context.notes)
    open_by_guest(slot, TWO)
    slot.files.fails["reset"] = errno.ENOTTY
    with pytest.raises(DeviceError, match="cannot be reset"):
        reset.apply(RESET, context)


def test_function_that_reads_all_ones_is_found_out(slot, reset):
    (slot.path(ONE) / "config").write_bytes(b"\xff" * 64)
    with pytest.raises(VerificationError, match="does not answer"):
        reset.verify(RESET)


def test_without_a_method_vfio_reset_the_bus_when_all_of_it_was_closed(slot, reset, context):
    reset.apply(RESET, context)
    assert slot.files.log == []
    assert any("reset its bus on closing" in note for note in context.notes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: open_by_guest(m, TWO), "0000:03:00.1 on its bus is in use"),
        (lambda m: (m.path(TWO) / "driver").unlink(), "is bound to no driver, not to vfio-pci"),
        (lambda m: (m.path(ONE) / "driver").unlink(), "it is not bound to vfio-pci"),
        (lambda m: give_to_vendor(m, ONE), "it is not bound to vfio-pci"),
        (lambda m: give_to_vendor(m, TWO), "0000:03:00.1 on its bus is bound to nvidia"),
    ],
)
def test_without_a_method_it_fails_where_vfio_could_not_either(
    slot, reset, context, monkeypatch, spoil, said
):
    monkeypatch.setattr("virtfabric.adapters.pci.holders._CLOSING_S", 0.01)
    spoil(slot)
    with pytest.raises(DeviceError, match=said) as caught:
        reset.apply(RESET, context)
    assert "cannot be reset" in str(caught.value)
    assert caught.value.advice


def test_without_a_method_on_the_root_bus(slot, reset, context):
    alone = a("0000:00:03.0")
    slot.add(alone, driver="vfio-pci")
    with pytest.raises(DeviceError, match="no bridge above it"):
        reset.apply(ResetFunction(guest=GUEST, address=alone), context)


def test_reset_waits_until_nobody_has_it_open(slot, reset, context, monkeypatch):
    monkeypatch.setattr("virtfabric.adapters.pci.reset._CLOSED_S", 0.02)
    (slot.path(ONE) / "reset").touch()
    open_by_guest(slot, ONE)
    with pytest.raises(DeviceError, match="still open"):
        reset.apply(RESET, context)
    assert slot.files.log == []


def test_reset_of_what_vanished(slot, reset, context):
    slot.remove(ONE)
    for call in (lambda: reset.apply(RESET, context), lambda: reset.verify(RESET)):
        with pytest.raises(DeviceGoneError):
            call()
    assert reset.undo(RESET) == 0


class TestHolders:
    """Groups and, with iommufd, files of their own."""

    def test_by_group(self, slot):
        holders = VfioHolders(slot.files, slot.proc)
        slot.add_process(70, "/dev/null", "/dev/vfio/9")
        slot.add_process(71, "/dev/vfio/99")
        assert holders.processes(ONE) == (70,)
        assert holders.holds(70, TWO)
        assert not holders.holds(71, ONE)
        assert not holders.holds(72, ONE)

    def test_by_its_own_file(self, slot):
        holders = VfioHolders(slot.files, slot.proc)
        (slot.path(ONE) / "vfio-dev" / "vfio3").mkdir(parents=True)
        slot.add_process(70, "/dev/vfio/devices/vfio3")
        assert holders.holds(70, ONE)
        assert not holders.holds(70, TWO)

    def test_open_is_told_for_each_function_of_a_group(self, slot):
        holders = VfioHolders(slot.files, slot.proc)
        (slot.path(TWO) / "enable").write_text("1\n")
        assert not holders.is_open(TWO)  # left so by another driver: nobody holds it
        slot.add_process(70, "/dev/vfio/9")
        assert (holders.is_open(ONE), holders.is_open(TWO)) == (False, True)
        (slot.path(TWO) / "driver").unlink()  # enabled by a host driver: not through vfio
        assert not holders.is_open(TWO)

    def test_a_vendors_vfio_driver(self, slot, monkeypatch):
        """It shows itself by `vfio-dev`; when it enables a function, nobody knows."""
        monkeypatch.setattr("virtfabric.adapters.pci.holders._CLOSING_S", 0.01)
        holders = VfioHolders(slot.files, slot.proc)
        (slot.path(ONE) / "driver").unlink()
        assert not holders.is_openable(ONE)
        slot.link_driver(ONE, "nvidia")
        assert not holders.is_openable(ONE)
        (slot.path(ONE) / "vfio-dev" / "vfio3").mkdir(parents=True)
        assert holders.is_openable(ONE)
        assert holders.is_openable(TWO)  # vfio-pci itself, of a kernel that shows no vfio-dev
        assert not holders.is_open(ONE)
        holders.wait_closed(ONE, 60)
        slot.add_process(70, "/dev/vfio/9")
        assert holders.is_open(ONE)
        with pytest.raises(DeviceError, match="process 70"):
            holders.wait_closed(ONE, 0.02)

    def test_what_a_driver_left_enabled_is_closed_soon(self, slot, monkeypatch):
        monkeypatch.setattr("virtfabric.adapters.pci.holders._CLOSING_S", 0.01)
        (slot.path(ONE) / "enable").write_text("1\n")
        VfioHolders(slot.files, slot.proc).wait_closed(ONE, 60)

    def test_what_vanished_is_closed(self, slot):
        slot.remove(ONE)
        VfioHolders(slot.files, slot.proc).wait_closed(ONE, 0)


class TestLinks:
    """The bandwidth controller's cooling devices."""

    @pytest.fixture
    def port(self, machine):
        machine.add(PORT, max_link_speed="16.0 GT/s PCIe", current_link_speed="8.0 GT/s PCIe")
        machine.add(ONE, parent=PORT, max_link_speed="8.0 GT/s PCIe")
        return machine

    @pytest.fixture
    def links(self, port):
        return LinkSpeeds(port.files)

    def step(self, before, after):
        return LimitLink(guest=GUEST, address=PORT, before=before, after=after)

    def test_there_and_back(self, port, links, context):
        cooling = port.add_cooling(PORT, 16000)
        port.add_cooling(a("0000:00:10.1"), 32000, number=1)
        handler = LimitLinkHandler(links)
        assert links.offered(PORT) == (2500, 5000, 8000, 16000)
        for _ in range(2):
            handler.apply(self.step(0, 2500), context)
            handler.verify(self.step(0, 2500))
            assert (cooling / "cur_state").read_text() == "3\n"
            assert links.current(PORT) == 2500
        with pytest.raises(VerificationError, match=r"8 GT/s expected, 2.5 found"):
            handler.verify(self.step(2500, 0))
        # what is behind the port is slower than the port: EAGAIN, and all is well
        for _ in range(2):
            assert handler.undo(self.step(0, 2500)) == 0
            assert links.current(PORT) == 8000
        handler.verify(self.step(2500, 0))

    def test_a_limit_above_what_the_function_can_do_is_kept(self, port, links, context):
        port.add_cooling(PORT, 16000)
        handler = LimitLinkHandler(links)
        for limit in (16000, 8000):
            handler.apply(self.step(0, limit), context)
            handler.verify(self.step(0, limit))
            assert links.current(PORT) == 8000

    def test_older_kernels_and_other_functions_are_refused(self, port, links, context):
        handler = LimitLinkHandler(links)
        assert links.offered(PORT) == ()
        with pytest.raises(DeviceError, match="no bandwidth control") as caught:
            handler.apply(self.step(0, 2500), context)
        assert "6.13" in caught.value.advice
        assert handler.undo(self.step(0, 2500)) == 0
        assert port.files.log == []

    def test_a_speed_that_the_port_has_not(self, port, links, context):
        port.add_cooling(PORT, 8000)
        with pytest.raises(DeviceError, match=r"16 GT/s: it offers 2.5, 5, 8 GT/s"):
            LimitLinkHandler(links).apply(self.step(0, 16000), context)

    def test_a_port_that_vanished(self, port, links, context):
        port.remove(PORT)
        with pytest.raises(DeviceGoneError):
            LimitLinkHandler(links).apply(self.step(0, 2500), context)

    def test_a_write_that_fails(self, port, links, context):
        port.add_cooling(PORT, 16000)
        port.files.fails["cur_state"] = errno.ETIMEDOUT
        with pytest.raises(DeviceError, match=r"2.5 GT/s: Connection timed out"):
            LimitLinkHandler(links).apply(self.step(0, 2500), context)
