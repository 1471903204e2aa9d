"""One handler for each step type that changes a PCI function on the host, for real."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.binding import BindDriverHandler, DriverBinder
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.inventory import CurrentUses
from virtfabric.adapters.pci.linkspeed import LimitLinkHandler, LinkSpeeds
from virtfabric.adapters.pci.profiles import SetProfileHandler
from virtfabric.adapters.pci.reset import ResetHandler
from virtfabric.adapters.pci.vfsettings import SetUpVfHandler, VfSettingsFiles

if TYPE_CHECKING:
    from virtfabric.ports import StepHandler


def pci_handlers(sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    files = FunctionFiles(sys)
    holders = VfioHolders(files, proc)
    binder = DriverBinder(files, holders, CurrentUses(sys, proc))
    return (
        BindDriverHandler(files, binder), ResetHandler(files, holders),
        SetUpVfHandler(VfSettingsFiles(files)), SetProfileHandler(files, holders),
        LimitLinkHandler(LinkSpeeds(files)),
    )  # fmt: skip
