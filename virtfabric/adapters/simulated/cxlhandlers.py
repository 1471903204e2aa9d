"""Step handlers for the CXL memory of a simulated host: what the real ones refuse, they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from virtfabric.adapters.simulated.handlers import SimulatedHandler
from virtfabric.model.cxl import MemoryState
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.errors import CxlError
from virtfabric.policy.regions import check_region

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.guest import SimulatedGuest
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.adapters.simulated.memory import SimulatedMemory
    from virtfabric.model.cxl import Region
    from virtfabric.ports import StepHandler

S = TypeVar("S", CreateRegion, OnlineMemory)


class _OfMemory(SimulatedHandler[S], Generic[S]):
    """A change of the host's alone; libvirt tells nobody of it."""

    event = None
    of_host = True

    @property
    def memory(self) -> SimulatedMemory:
        return self.host.memory

    def region_of(self, step: S) -> Region | None:
        """The region that a step is about."""
        return self.memory.cxl.region_of(step.window, step.members)

    def change(self, step: S, *, lost: bool) -> None:
        region = self.region_of(step)
        if region is not None and not region.ours:
            raise CxlError(f"{step.region}: {region.name} was made by hand, and is never changed")
        if not lost:
            self.put(step, region)

    def bring(self, guest: SimulatedGuest, step: S, *, lost: bool) -> None:
        self.change(step, lost=lost)

    def compare(self, step: S) -> str:
        found = self.shown(self.region_of(step))
        return "" if found == step.after else f"{found} found"

    def put(self, step: S, region: Region | None) -> None:
        """Bring about `after` of a region that is ours or is not there."""
        raise NotImplementedError

    def shown(self, region: Region | None) -> str:
        """What there is, in the words of `before` and `after`."""
        raise NotImplementedError


class _CreateRegion(_OfMemory[CreateRegion]):
    step_type = CreateRegion

    def put(self, step: CreateRegion, region: Region | None) -> None:
        if step.after is RegionPresence.ABSENT:
            if region is not None:
                self._end(step, region)
        elif region is None:
            self._make(step)

    def _make(self, step: CreateRegion) -> None:
        refusal = check_region(
            self.memory.cxl, step.window, step.members, step.size, step.granularity
        )
        if refusal is not None:
            raise CxlError(refusal.detail)
        self.memory.make_region(step.window, step.members, step.size, step.granularity)

    def _end(self, step: CreateRegion, region: Region) -> None:
        if any(dax.state is MemoryState.ONLINE for dax in region.dax):
            raise CxlError(f"{step.region}: its memory is online")
        self.memory.drop_region(region)

    def restore(self, step: CreateRegion) -> int:
        region = self.region_of(step)
        if step.before is RegionPresence.PRESENT:
            if region is None:
                self._make(step)
        elif region is not None and region.ours:
            self.memory.set_state(region, MemoryState.OFFLINE, movable=False)
            self.memory.drop_region(region)
        return 0

    def shown(self, region: Region | None) -> str:
        return RegionPresence.ABSENT if region is None else RegionPresence.PRESENT


class _OnlineMemory(_OfMemory[OnlineMemory]):
    step_type = OnlineMemory

    def put(self, step: OnlineMemory, region: Region | None) -> None:
        if region is None:
            raise CxlError(f"{step.region} is not there")
        self._bring(region, step.after)

    def _bring(self, region: Region, use: MemoryUse) -> None:
        if self.shown(region) == use:
            return
        if any(dax.state is MemoryState.ONLINE for dax in region.dax):
            self.memory.set_state(region, MemoryState.OFFLINE, movable=False)
        if use is not MemoryUse.OFFLINE:
            self.memory.set_state(region, MemoryState.ONLINE, movable=use is MemoryUse.MOVABLE)

    def restore(self, step: OnlineMemory) -> int:
        region = self.region_of(step)
        if region is not None and region.ours:
            self._bring(region, step.before)
        return 0

    def shown(self, region: Region | None) -> str:
        if region is None:
            return "no region"
        (dax,) = region.dax
        if dax.state is not MemoryState.ONLINE:
            return MemoryUse.OFFLINE
        return MemoryUse.MOVABLE if dax.movable else MemoryUse.NORMAL


def cxl_handlers(host: SimulatedHost) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    return _CreateRegion(host), _OnlineMemory(host)
