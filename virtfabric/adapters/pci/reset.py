"""`ResetFunction`: a function that left a guest is reset, so that the next finds nothing of it.

What is true of a reset (drivers/pci/pci.c, drivers/vfio/pci/vfio_pci_core.c, Linux 6.12):
- `reset` is there when the kernel has a method for this function alone (`reset_method` names them:
  FLR, power state, or the bus, where it is the only one there).
- Without one, vfio-pci resets the slot or bus when its last function there is closed, if all of
  them are bound to vfio-pci. Nothing tells whether it succeeded.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.handler import PciHandler
from virtfabric.model.device import VFIO_PCI
from virtfabric.model.devicesteps import ResetFunction
from virtfabric.model.errors import DeviceError, DeviceGoneError, VerificationError

if TYPE_CHECKING:
    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.adapters.pci.holders import VfioHolders
    from virtfabric.model.device import PciAddress
    from virtfabric.ports import StepContext

_CLOSED_S: Final = 10.0
_COMMAND_AND_STATUS: Final = 4
_NO_ANSWER: Final = b"\xff" * 4


class ResetHandler(PciHandler[ResetFunction]):
    """Carries out `ResetFunction`; there is nothing to undo."""

    step_type = ResetFunction

    def __init__(self, files: FunctionFiles, holders: VfioHolders) -> None:
        """Reset through these files."""
        super().__init__()
        self._files = files
        self._holders = holders

    def bring_about(self, step: ResetFunction, context: StepContext) -> None:
        """Reset it once nobody has it open any more."""
        self._holders.wait_closed(step.address, _CLOSED_S, context.cancelled)
        if self._files.has(step.address, "reset") and self._reset(step.address):
            return
        self._check_reset_on_close(step.address)
        context.progress(
            0.5, f"{step.address} has no reset of its own; vfio-pci reset its bus on closing"
        )

    def _reset(self, address: PciAddress) -> bool:
        """Whether the kernel had a method; a method that fails raises.

        The file may be there without one: of two functions in a slot each answers ENOTTY
        (measured with Linux 6.12).
        """
        try:
            self._files.write(address, "reset", "1")
        except DeviceError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENOTTY:
                raise
            return False
        return True

    def _check_reset_on_close(self, address: PciAddress) -> None:
        """Raise DeviceError unless vfio-pci had to try the bus when the function was closed."""
        problem = self._find_obstacle(address)
        if problem:
            raise DeviceError(
                f"PCI function {address} cannot be reset: the kernel has no method for it alone, "
                f"and {problem}",
                advice="power-cycle it, or release it if you trust who had it",
            )

    def _find_obstacle(self, address: PciAddress) -> str:
        if self._files.driver(address) != VFIO_PCI:
            return "it is not bound to vfio-pci, which would reset its bus"
        if self._files.is_on_root_bus(address):
            return "there is no bridge above it whose bus could be reset"
        for other in self._files.beside(address):
            driver = self._files.driver(other)
            if driver != VFIO_PCI:
                return f"{other} on its bus is bound to {driver or 'no driver'}, not to vfio-pci"
            if self._holders.is_open(other):
                return f"{other} on its bus is in use"
        return ""

    def check(self, step: ResetFunction) -> None:
        """It answers: after a failed reset a function reads all ones.

        Command and status are read, as a VF has no vendor id of its own (SR-IOV 1.1, 3.4.1.1).
        """
        try:
            with (self._files.path(step.address) / "config").open("rb") as config:
                config.seek(_COMMAND_AND_STATUS)
                found = config.read(len(_NO_ANSWER))
        except FileNotFoundError:
            raise DeviceGoneError(f"PCI function {step.address} is not there any more") from None
        if found == _NO_ANSWER:
            raise VerificationError(f"PCI function {step.address} does not answer after its reset")

    def give_back(self, step: ResetFunction) -> None:
        """Nothing."""
