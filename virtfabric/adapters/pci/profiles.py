"""`SetProfile`: what a vendor's driver is to make of a function, by a file in a directory of it.

It writes only where the file says what the plan expects or what it is to say (a third value is
somebody else's, who may have a guest on it), and never while somebody has the function open.

Source: the vendor's driver; the first was NVIDIA's, `nvidia/current_vgpu_type` of a VF.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.handler import PciHandler
from virtfabric.model.devicesteps import SetProfile
from virtfabric.model.errors import DeviceError, VerificationError

if TYPE_CHECKING:
    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.adapters.pci.holders import VfioHolders
    from virtfabric.ports import StepContext

_MISSING: Final = "is not there"


class SetProfileHandler(PciHandler[SetProfile]):
    """Carries out `SetProfile`."""

    step_type = SetProfile

    def __init__(self, files: FunctionFiles, holders: VfioHolders) -> None:
        """Write through these files."""
        super().__init__()
        self._files = files
        self._holders = holders

    def bring_about(self, step: SetProfile, context: StepContext) -> None:
        """Set `after`."""
        now = self._read(step)
        if now == step.after:
            return
        if now != step.before:
            raise DeviceError(
                f"PCI function {step.address}: {step.file} is {now!r}, neither {step.before!r} nor "
                f"{step.after!r}: somebody else set it",
                advice=f"see who uses it, and write {step.before} there when nobody does",
            )
        self._write(step, step.after)

    def give_back(self, step: SetProfile) -> None:
        """Set `before`, where it says `after`: anything else is not of this step.

        Nor is a file that cannot be used: nothing was written there.
        """
        if not self._find_obstacle(step) and self._find(step) == step.after:
            self._write(step, step.before)

    def check(self, step: SetProfile) -> None:
        """The kernel says `after`."""
        found = self._read(step)
        if found != step.after:
            raise VerificationError(
                f"PCI function {step.address}: {step.file} {step.after!r} expected, {found!r} found"
            )

    def _read(self, step: SetProfile) -> str:
        obstacle = self._find_obstacle(step)
        found = None if obstacle else self._find(step)
        if found is None:
            driver = self._files.driver(step.address)
            raise DeviceError(
                f"PCI function {step.address}: {step.file} {obstacle or _MISSING}; "
                f"{driver or 'no driver'} is bound",
                advice="is profile.file right, and vfio_driver the driver that makes it?",
            )
        return found

    def _write(self, step: SetProfile, text: str) -> None:
        if self._holders.is_open(step.address):
            who = ", ".join(map(str, self._holders.processes(step.address)))
            raise DeviceError(
                f"PCI function {step.address} is still open (process {who}): {step.file} is not "
                "changed under it",
                advice="the guest's QEMU has not let go of it; see its log",
            )
        self._files.write(step.address, step.file, text)

    def _find(self, step: SetProfile) -> str | None:
        """None where it has just gone."""
        found = self._files.read(step.address, step.file)
        return None if found is None else found.strip()

    def _find_obstacle(self, step: SetProfile) -> str:
        """Why nothing is written there: what a link leads to is not of this function."""
        path = self._files.path(step.address) / step.file
        if path.parent.is_symlink() or path.is_symlink():
            return "leads elsewhere by a link"
        try:
            mode = path.stat().st_mode
        except OSError:
            return _MISSING
        if not stat.S_ISREG(mode):
            return "is no file"
        readable = mode & (stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        return "" if readable else "cannot be read: nobody could tell who set it"
