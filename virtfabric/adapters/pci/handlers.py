"""One handler for each step type that changes a PCI function on the host, for real."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.binding import BindDriverHandler, DriverBinder
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.holders import VfioHolders
from virtfabric.adapters.pci.inuse import HostUses
from virtfabric.adapters.pci.linkspeed import LimitLinkHandler, LinkSpeeds
from virtfabric.adapters.pci.reset import ResetHandler
from virtfabric.adapters.pci.vfsettings import SetUpVfHandler, VfSettingsFiles

if TYPE_CHECKING:
    from virtfabric.adapters.pci.binding import Uses
    from virtfabric.ports import StepHandler


def pci_handlers(
    sys: Path = Path("/sys"), proc: Path = Path("/proc"), uses: Uses | None = None
) -> tuple[StepHandler, ...]:
    """All of them, for a registry; `uses` tells how the host uses a function right now."""
    files = FunctionFiles(sys)
    holders = VfioHolders(files, proc)
    binder = DriverBinder(files, holders, uses or HostUses(files, proc))
    return (
        BindDriverHandler(files, binder), ResetHandler(files, holders),
        SetUpVfHandler(VfSettingsFiles(files)), LimitLinkHandler(LinkSpeeds(files)),
    )  # fmt: skip
