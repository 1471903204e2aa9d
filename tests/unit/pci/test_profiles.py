"""Profiles: written where the file is the function's own and says what is expected, else not."""

from __future__ import annotations

import errno

import pytest
from kernel import a

from virtfabric.adapters.pci.handlers import pci_handlers
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.profiles import SetProfileHandler
from virtfabric.model.devicesteps import SetProfile
from virtfabric.model.errors import DeviceError, DeviceGoneError, VerificationError
from virtfabric.model.ids import GuestId
from virtfabric.model.profile import ProfileFile

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
VF = a("0000:01:00.4")
TYPE = ProfileFile("nvidia/current_vgpu_type")
STEP = SetProfile(guest=GUEST, name="web", address=VF, file=TYPE, before="0", after="1155")


@pytest.fixture
def file(machine):
    path = machine.add(VF, group=4, driver="nvidia")
    (path / "nvidia").mkdir()
    (path / TYPE).write_text("0\n")
    return path / TYPE


@pytest.fixture
def handler(machine):
    return SetProfileHandler(machine.files, VfioHolders(machine.files, machine.proc))


def is_refused(machine, handler, context, said):
    """Apply is refused and nothing written; so is the undo that follows, without a complaint."""
    with pytest.raises(DeviceError, match=said) as caught:
        handler.apply(STEP, context)
    assert caught.value.advice
    assert handler.undo(STEP) == 0
    assert machine.files.log == []
    return str(caught.value)


def test_it_is_one_of_the_handlers_of_a_machine(machine):
    assert "set-profile" in {h.kind for h in pci_handlers(machine.sys, machine.proc)}


def test_there_and_back(machine, file, handler, context):
    for _ in range(2):  # repeating is safe
        handler.apply(STEP, context)
        handler.verify(STEP)
        assert file.read_text() == "1155\n"
    assert context.notes == ["web: 0000:01:00.4 profile nvidia/current_vgpu_type 0 -> 1155"] * 2
    for _ in range(2):
        assert handler.undo(STEP) == 0
        assert file.read_text() == "0\n"
    handler.verify(STEP.inverse())
    assert machine.files.log == ["current_vgpu_type=1155", "current_vgpu_type=0"]


def test_a_value_of_somebody_else_is_not_replaced(machine, file, handler, context):
    file.write_text("42\n")
    text = is_refused(machine, handler, context, "'42', neither '0' nor '1155': somebody else")
    assert "0000:01:00.4" in text
    assert file.read_text() == "42\n"
    with pytest.raises(VerificationError, match="'1155' expected, '42' found"):
        handler.verify(STEP)


def test_a_file_that_is_not_there_is_told_with_the_driver(machine, file, handler, context):
    file.unlink()
    said = "nvidia/current_vgpu_type is not there; nvidia is bound"
    is_refused(machine, handler, context, said)
    with pytest.raises(DeviceError, match=said):
        handler.verify(STEP)
    file.parent.rmdir()
    is_refused(machine, handler, context, said)
    (machine.path(VF) / "driver").unlink()
    is_refused(machine, handler, context, "is not there; no driver is bound")


def test_a_link_is_not_followed(machine, file, handler, context):
    elsewhere = machine.sys / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)
    is_refused(machine, handler, context, "leads elsewhere by a link")
    file.parent.unlink()
    file.parent.mkdir()
    file.symlink_to(elsewhere / file.name)
    is_refused(machine, handler, context, "leads elsewhere by a link")
    assert (elsewhere / file.name).read_text() == "0\n"


def test_what_is_no_file_and_what_nobody_can_read(machine, file, handler, context):
    file.chmod(0o200)
    is_refused(machine, handler, context, "cannot be read")
    file.unlink()
    file.mkdir()
    is_refused(machine, handler, context, "is no file")
    file.rmdir()
    file.parent.rmdir()
    file.parent.touch()  # a file in place of the directory
    is_refused(machine, handler, context, "is not there")


@pytest.mark.parametrize("undo", [False, True])
def test_a_driver_that_does_not_take_the_value(machine, file, handler, context, undo):
    if undo:
        file.write_text("1155\n")
    machine.files.fails[file.name] = errno.EINVAL
    with pytest.raises(DeviceError, match="to nvidia/current_vgpu_type: Invalid argument"):
        handler.undo(STEP) if undo else handler.apply(STEP, context)


def test_a_driver_that_takes_it_and_does_otherwise_is_found_out(machine, file, handler, context):
    machine.files._current_vgpu_type = lambda path, text: None
    handler.apply(STEP, context)
    with pytest.raises(VerificationError, match="'1155' expected, '0' found"):
        handler.verify(STEP)


def test_what_somebody_has_open_is_not_changed(machine, file, handler, context):
    (machine.path(VF) / "vfio-dev" / "vfio0").mkdir(parents=True)
    descriptors = machine.add_process(70, "/dev/vfio/devices/vfio0")
    with pytest.raises(DeviceError, match=r"still open \(process 70\): nvidia/current_vgpu_type"):
        handler.apply(STEP, context)
    assert handler.undo(STEP) == 0  # nothing to be done, so nobody needs to let go
    file.write_text("1155\n")
    handler.apply(STEP, context)
    with pytest.raises(DeviceError, match="still open"):
        handler.undo(STEP)
    assert machine.files.log == []
    (descriptors / "0").unlink()
    assert handler.undo(STEP) == 0
    assert file.read_text() == "0\n"


def test_a_function_that_vanished(machine, file, handler, context):
    machine.remove(VF)
    assert handler.undo(STEP) == 0
    for call in (lambda: handler.apply(STEP, context), lambda: handler.verify(STEP)):
        with pytest.raises(DeviceGoneError):
            call()
