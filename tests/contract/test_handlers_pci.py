"""The handler contract for PCI functions, on a tree that answers as the kernel does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "pci"))

from kernel import Machine, a

from tests.contract.handler_contract import Context, HandlerContract
from virtfabric.adapters.pci.binding import BindDriverHandler, DriverBinder
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.profiles import SetProfileHandler
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.model.devicesteps import BindDriver, SetProfile
from virtfabric.model.errors import DeviceError
from virtfabric.model.ids import GuestId
from virtfabric.model.profile import ProfileFile

if TYPE_CHECKING:
    from virtfabric.model.step import Step

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
VF, NIC = a("0000:01:00.4"), a("0000:02:00.0")
TYPE = ProfileFile("nvidia/current_vgpu_type")
PROFILE = SetProfile(guest=GUEST, address=VF, file=TYPE, before="0", after="1155")


class KernelWorld:
    """A VF of a vendor's driver that takes a profile, and a NIC."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory)
        path = self.machine.add(VF, group=4, driver="nvidia")
        (path / "nvidia").mkdir()
        self.file = path / TYPE
        self.file.write_text("0\n")
        self.machine.add(NIC, group=5, driver="igb")
        self.machine.add_driver("vfio-pci")
        files = self.machine.files
        holders = VfioHolders(files, self.machine.proc)
        binder = DriverBinder(files, holders, lambda _: (), lambda _: None)
        self.handlers = HandlerRegistry(
            (BindDriverHandler(files, binder), SetProfileHandler(files, holders))
        )

    def steps(self) -> list[Step]:
        bind = BindDriver(guest=GUEST, address=NIC, before="igb", after="vfio-pci")
        return [bind, PROFILE]

    def observe(self, step: Step) -> Any:
        if isinstance(step, SetProfile):
            return self.file.read_text().strip()
        override = self.machine.path(NIC) / "driver_override"
        return self.machine.driver(NIC), override.read_text()

    def vanish(self, step: Step) -> None:
        """No guest has anything to do with it."""


@pytest.fixture
def world(tmp_path: Path) -> KernelWorld:
    return KernelWorld(tmp_path)


class TestKernel(HandlerContract):
    def test_a_profile_of_somebody_else_is_left_alone(self, world: KernelWorld) -> None:
        world.file.write_text("42\n")
        handler = world.handlers.for_step(PROFILE)
        with pytest.raises(DeviceError, match="'42', neither '0' nor '1155'"):
            handler.apply(PROFILE, Context())
        assert handler.undo(PROFILE) == 0
        assert world.file.read_text() == "42\n"
