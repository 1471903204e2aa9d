"""`CxlRegions`: makes and ends regions of this machine, and brings their memory on- and offline.

A region that somebody made by hand is never changed: ours have a mark. Nothing here believes a
tool's exit code: what came of it is read from sysfs.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from virtfabric.model.cxl import MemoryState
from virtfabric.model.cxlsteps import MemoryUse
from virtfabric.model.errors import CxlError, StepCancelledError
from virtfabric.policy.regions import check_region

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Set

    from virtfabric.adapters.cxl.marks import RegionMarks
    from virtfabric.adapters.cxl.tools import Tool
    from virtfabric.model.cxl import CxlInventory, DaxDevice, Region
    from virtfabric.model.cxlsteps import CreateRegion, OnlineMemory

    Place = CreateRegion | OnlineMemory
    """Either says which region it is about."""

log = logging.getLogger(__name__)
_POLL_S: Final = 0.05
_RESTORE_S: Final = 60.0


class Deadline:
    """How long a change may take, and whether anybody still wants it."""

    def __init__(self, deadline_s: float, cancelled: threading.Event | None = None) -> None:
        """From now on."""
        self._until = time.monotonic() + deadline_s
        self.cancelled = cancelled

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; at least a little, so that a tool can say why it fails."""
        return max(1.0, self._until - time.monotonic())

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        """Look again and again, as sysfs tells nobody.

        Raises:
            CxlError: it did not come about in time.
            StepCancelledError: the caller gave up.
        """
        while not reached():
            if self.cancelled is not None and self.cancelled.is_set():
                raise StepCancelledError(f"cancelled while waiting for {what}")
            if time.monotonic() > self._until:
                raise CxlError(f"{what} did not come about in time")
            time.sleep(_POLL_S)


class CxlRegions:
    """The regions of one machine."""

    def __init__(self, read: Callable[[], CxlInventory], marks: RegionMarks, run: Tool) -> None:
        """`read` is a fresh look at the inventory, with what is ours."""
        self._read = read
        self._marks = marks
        self._run = run

    def find(self, place: Place) -> Region | None:
        """The region that a step is about, whoever made it."""
        return self._read().region_of(place.window, place.members)

    def create(self, step: CreateRegion, deadline: Deadline) -> None:
        """Make a region and wait for its dax device; one of ours that is there already will do.

        Raises:
            CxlError: it cannot be made, or somebody made it by hand; nothing is left of it.
        """
        there = self.find(step)
        if there is not None and not there.ours:
            raise CxlError(_by_hand(step, there))
        if there is not None and not there.committed:  # what a crash left
            self._destroy(there, deadline)
            there = None
        if there is None:
            self.clear_half_made(step)
            self._make(step, deadline)
        elif not there.dax:
            self._tool(deadline, "cxl", "enable-region", there.name)

        def has_memory() -> bool:
            region = self.find(step)
            return region is not None and region.committed and bool(region.dax)

        deadline.wait_for(f"the memory of {step.region}", has_memory)

    def _make(self, step: CreateRegion, deadline: Deadline) -> None:
        inventory = self._read()
        refusal = check_region(inventory, step.window, step.members, step.size, step.granularity)
        window = inventory.window_at(step.window)
        if refusal is not None or window is None:
            raise CxlError(refusal.detail if refusal else f"{step.region}: no such window")
        names = [inventory.usable[serial].name for serial in step.members]
        before = {region.name for region in inventory.regions}
        self._marks.put(step.window, step.members, before)
        try:
            self._tool(
                deadline, "cxl", "create-region", "--memdevs", "--type=ram",
                f"--decoder={window.name}", f"--ways={len(names)}",
                f"--granularity={step.granularity}", f"--size={step.size}", *names,
            )  # fmt: skip
        except (CxlError, StepCancelledError):
            self._clear_away(window.name, before)
            self._forget_if_gone(step)
            raise

    def clear_half_made(self, place: Place) -> None:
        """What a killed agent left half made, as its mark tells; nothing where it was not begun."""
        before = self._marks.others(place.window, place.members)
        window = self._read().window_at(place.window)
        if before is not None and window is not None and self.find(place) is None:
            self._clear_away(window.name, before)

    def _clear_away(self, window: str, before: Set[str]) -> None:
        """What an ended tool left half made: it has no members yet by which it could be known."""
        for region in self._read().regions:
            half_made = region.window == window and not region.committed
            if half_made and region.name not in before:
                with suppress(CxlError):
                    self._tool(Deadline(_RESTORE_S), "cxl", "destroy-region", region.name)

    def destroy(self, place: Place, deadline: Deadline) -> None:
        """End a region of which no memory is online; one that is gone already will do.

        Raises:
            CxlError: it is not ours, its memory is online, or the kernel holds on to it.
        """
        there = self.find(place)
        if there is not None:
            if not there.ours:
                raise CxlError(_by_hand(place, there))
            online = [dax.name for dax in there.dax if is_online(dax)]
            if online:
                raise CxlError(
                    f"{place.region}: its memory is online ({', '.join(online)})",
                    advice="take it offline first",
                )
            self._destroy(there, deadline)
        else:
            self.clear_half_made(place)
        self._forget_if_gone(place)

    def _destroy(self, region: Region, deadline: Deadline) -> None:
        # Without --force, which would take away what is in use.
        if region.committed:
            self._tool(deadline, "cxl", "disable-region", region.name)
        self._tool(deadline, "cxl", "destroy-region", region.name)

    def _forget_if_gone(self, place: Place) -> None:
        if self.find(place) is None:
            self._marks.remove(place.window, place.members)

    def bring(self, place: Place, use: MemoryUse, deadline: Deadline) -> None:
        """Have a region's memory used so; where it fails, it is used as before again.

        Raises:
            CxlError: it is gone or not ours, or its memory stays online.
        """
        region = self.find(place)
        if region is None:
            raise CxlError(f"{place.region} is not there")
        if not region.ours:
            raise CxlError(_by_hand(place, region))
        was = use_of(region)
        try:
            for dax in region.dax:
                self._bring_device(dax, use, deadline)
        except (CxlError, StepCancelledError):
            self._restore(place, was)
            raise

    def _bring_device(self, dax: DaxDevice, use: MemoryUse, deadline: Deadline) -> None:
        if device_use(dax) is use:
            return
        if is_online(dax):
            # Blocks that are online cannot change their zone.
            self._tool(deadline, "daxctl", "offline-memory", dax.name)
        if use is MemoryUse.OFFLINE:
            return
        zone = () if use is MemoryUse.MOVABLE else ("--no-movable",)
        if dax.state is MemoryState.DEVICE:
            self._tool(
                deadline, "daxctl", "reconfigure-device", "--mode=system-ram", *zone, dax.name
            )
        else:
            self._tool(deadline, "daxctl", "online-memory", *zone, dax.name)

    def _restore(self, place: Place, was: MemoryUse | None) -> None:
        """Blocks that went offline before one stayed are brought back."""
        region = self.find(place)
        if region is None or was is None or was is MemoryUse.OFFLINE:
            return
        for dax in region.dax:
            try:
                self._bring_online_again(dax, was)
            except CxlError as error:
                log.error("%s: memory is offline and stays so: %s", place.region, error)

    def _bring_online_again(self, dax: DaxDevice, was: MemoryUse) -> None:
        if dax.state in (MemoryState.PARTLY, MemoryState.OFFLINE):
            zone = () if was is MemoryUse.MOVABLE else ("--no-movable",)
            self._tool(Deadline(_RESTORE_S), "daxctl", "online-memory", *zone, dax.name)

    def _tool(self, deadline: Deadline, *command: str) -> None:
        self._run(command, deadline_s=deadline.left_s, cancelled=deadline.cancelled)


def is_online(dax: DaxDevice) -> bool:
    """Whether any of its memory is in use by the kernel."""
    return dax.state in (MemoryState.ONLINE, MemoryState.PARTLY)


def device_use(dax: DaxDevice) -> MemoryUse | None:
    """What a dax device's memory is used for; None where it is not the same for all of it."""
    match dax.state:
        case MemoryState.ONLINE:
            return MemoryUse.MOVABLE if dax.movable else MemoryUse.NORMAL
        case MemoryState.PARTLY:
            return None
        case MemoryState.OFFLINE | MemoryState.DEVICE:
            return MemoryUse.OFFLINE


def use_of(region: Region) -> MemoryUse | None:
    """What a region's memory is used for; None where it is not the same for all of it."""
    uses = {device_use(dax) for dax in region.dax}
    return uses.pop() if len(uses) == 1 else None


def _by_hand(place: Place, region: Region) -> str:
    return f"{place.region}: {region.name} was made by hand, and is never changed"
