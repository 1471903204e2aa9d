"""One handler for each step type that changes CXL memory, for real."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from virtfabric.adapters.cxl.marks import RegionMarks
from virtfabric.adapters.cxl.memory import MARKS, SysfsMemory
from virtfabric.adapters.cxl.regions import CxlRegions, Deadline, is_online, use_of
from virtfabric.adapters.cxl.tools import run_tool
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.errors import InvalidValueError, VerificationError

if TYPE_CHECKING:
    from virtfabric.adapters.cxl.tools import Tool
    from virtfabric.model.cxl import Region
    from virtfabric.model.step import Step
    from virtfabric.ports import StepContext, StepHandler

S = TypeVar("S", CreateRegion, OnlineMemory)
log = logging.getLogger(__name__)


class RegionHandler(Generic[S]):
    """Implements `ports.StepHandler`. Guests change nothing here.

    What somebody made by hand is not undone: a step that found it there has changed nothing.
    """

    kind: str
    step_type: type[S]

    def __init__(self, regions: CxlRegions) -> None:
        """Change these regions."""
        self.kind = self.step_type.kind
        self.regions = regions

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = self._own(step)
        context.progress(0.0, own.describe())
        self.bring_about(own, Deadline(own.deadline_s, context.cancelled))
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """Check what the kernel shows."""
        own = self._own(step)
        found = self.describe(self.regions.find(own))
        if found != own.after.value:
            raise VerificationError(f"{own.region}: {own.after} expected, {found} found")

    def undo(self, step: Step) -> int:
        """Restore `step.before`; no guest has a say, so nothing is left over."""
        own = self._own(step)
        region = self.regions.find(own)
        if region is not None and not region.ours:
            log.warning("%s: made by hand, so there is nothing to undo", own.region)
        else:
            self.give_back(own, region, Deadline(own.deadline_s))
        return 0

    def bring_about(self, step: S, deadline: Deadline) -> None:
        """Reach `step.after`.

        Raises:
            CxlError, StepCancelledError
        """
        raise NotImplementedError

    def give_back(self, step: S, region: Region | None, deadline: Deadline) -> None:
        """Restore `step.before` of a region that is ours or is not there."""
        raise NotImplementedError

    def describe(self, region: Region | None) -> str:
        """What there is, in the words of `before` and `after`."""
        raise NotImplementedError

    def _own(self, step: Step) -> S:
        if not isinstance(step, self.step_type):
            raise InvalidValueError("step.kind", step.kind, f"is not for the {self.kind} handler")
        return step


class CreateRegionHandler(RegionHandler[CreateRegion]):
    """Carries out `CreateRegion`."""

    step_type = CreateRegion

    def bring_about(self, step: CreateRegion, deadline: Deadline) -> None:
        """Create or destroy. A region whose memory is online is not destroyed."""
        if step.after is RegionPresence.PRESENT:
            self.regions.create(step, deadline)
        else:
            self.regions.destroy(step, deadline)

    def give_back(self, step: CreateRegion, region: Region | None, deadline: Deadline) -> None:
        """The reverse. Memory that the kernel itself brought online goes offline first."""
        if step.before is RegionPresence.PRESENT:
            self.regions.create(step, deadline)
            return
        if region is not None and any(map(is_online, region.dax)):
            self.regions.bring(step, MemoryUse.OFFLINE, deadline)
        self.regions.destroy(step, deadline)

    def describe(self, region: Region | None) -> str:
        """Whether it is there, with its memory."""
        whole = region is not None and region.committed and bool(region.dax)
        if whole:
            return RegionPresence.PRESENT
        return RegionPresence.ABSENT if region is None else "half of it"


class OnlineMemoryHandler(RegionHandler[OnlineMemory]):
    """Carries out `OnlineMemory`."""

    step_type = OnlineMemory

    def bring_about(self, step: OnlineMemory, deadline: Deadline) -> None:
        """Online or offline."""
        self.regions.bring(step, step.after, deadline)

    def give_back(self, step: OnlineMemory, region: Region | None, deadline: Deadline) -> None:
        """As it was; of a region that is gone nothing is left to restore."""
        if region is not None:
            self.regions.bring(step, step.before, deadline)

    def describe(self, region: Region | None) -> str:
        """What its memory is used for."""
        if region is None:
            return "no region"
        use = use_of(region)
        return "partly online" if use is None else use.value


def cxl_handlers(
    sys: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    *,
    marks: Path = MARKS,
    run: Tool = run_tool,
) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    memory = SysfsMemory(sys, proc, marks=marks, run=run)
    regions = CxlRegions(memory.read_cxl, RegionMarks(marks), run)
    return CreateRegionHandler(regions), OnlineMemoryHandler(regions)
