"""The handler contract for CXL memory, on a recorded machine whose tools change its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "memory"))

from machine import Machine
from ndctl import FakeNdctl

from tests.contract.handler_contract import Context, HandlerContract
from virtfabric.adapters.cxl.handlers import cxl_handlers
from virtfabric.adapters.cxl.marks import RegionMarks
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.errors import CxlError
from virtfabric.model.units import MIB

if TYPE_CHECKING:
    from virtfabric.model.step import Step

ONE, OTHER, BOTH = 0x150000000, 0x1D0000000, 0x250000000


def create(window: int, *serials: int, size: int = 0, granularity: int = 256) -> CreateRegion:
    return CreateRegion(
        window=window, members=tuple(map(Serial, serials)), granularity=granularity,
        size=size or 256 * MIB * len(serials), deadline_s=0.2,
        before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
    )  # fmt: skip


def use(of: CreateRegion, before: MemoryUse, after: MemoryUse) -> OnlineMemory:
    return OnlineMemory(
        window=of.window, members=of.members, before=before, after=after, deadline_s=0.2
    )


SINGLE = create(ONE, 0x100)
SWITCHED = create(OTHER, 0x102, 0x103, granularity=1024)
SPREAD = create(BOTH, 0x104, 0x101)


class RecordedWorld:
    """The lab; the region behind the switch is there already, and is ours."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine("lab-cxl", directory)
        self.tool = FakeNdctl(self.machine)
        self.handlers = HandlerRegistry(
            cxl_handlers(
                self.machine.sys, self.machine.proc, marks=self.machine.marks, run=self.tool
            )
        )
        self.apply(SWITCHED)

    def steps(self) -> list[Step]:
        return [
            use(SWITCHED, MemoryUse.MOVABLE, MemoryUse.OFFLINE),
            SPREAD,
        ]

    def observe(self, step: Step) -> Any:
        return self.machine.read().regions

    def vanish(self, step: Step) -> None:
        """No guest has anything to do with it."""

    def apply(self, step: Step) -> None:
        self.handlers.for_step(step).apply(step, Context())

    def undo(self, step: Step) -> int:
        return self.handlers.for_step(step).undo(step)

    def states(self, of: CreateRegion) -> list[tuple[str, bool]]:
        region = self.machine.read().region_of(of.window, of.members)
        return [(d.state.value, d.movable) for d in region.dax] if region else []


@pytest.fixture
def world(tmp_path: Path) -> RecordedWorld:
    return RecordedWorld(tmp_path)


class TestRecorded(HandlerContract):
    def test_a_whole_life(self, world: RecordedWorld) -> None:
        offline = use(SPREAD, MemoryUse.MOVABLE, MemoryUse.OFFLINE)
        world.apply(SPREAD)
        assert world.states(SPREAD) == [("online", True)]
        world.apply(use(SPREAD, MemoryUse.MOVABLE, MemoryUse.NORMAL))
        assert world.states(SPREAD) == [("online", False)]
        world.apply(offline)
        assert world.states(SPREAD) == [("offline", False)]
        world.apply(SPREAD.inverse())
        assert world.machine.read().region_of(SPREAD.window, SPREAD.members) is None
        assert not any("region2" in mark.name for mark in world.machine.marks.iterdir())
        assert len(list(world.machine.marks.iterdir())) == 1

    def test_memory_that_is_online_is_not_destroyed(self, world: RecordedWorld) -> None:
        with pytest.raises(CxlError, match="its memory is online"):
            world.apply(SWITCHED.inverse())
        assert world.states(SWITCHED) == [("online", True)]
        assert not any("destroy" in command for command in world.tool.ran)

    def test_an_undo_takes_offline_what_the_kernel_brought_online(
        self, world: RecordedWorld
    ) -> None:
        world.tool.ran.clear()
        assert world.undo(SWITCHED) == 0
        assert [" ".join(command.split()[:2]) for command in world.tool.ran] == [
            "daxctl offline-memory", "cxl disable-region", "cxl destroy-region",
        ]  # fmt: skip

    def test_a_block_that_stays_leaves_all_as_it_was(self, world: RecordedWorld) -> None:
        world.tool.stuck = {OTHER // (128 * MIB) + 2}
        offline = use(SWITCHED, MemoryUse.MOVABLE, MemoryUse.OFFLINE)
        with pytest.raises(CxlError, match="EBUSY"):
            world.apply(offline)
        assert world.states(SWITCHED) == [("online", True)]
        with pytest.raises(CxlError, match="EBUSY"):
            world.undo(SWITCHED)
        assert world.states(SWITCHED) == [("online", True)]

    @pytest.mark.parametrize("broken", ["create-region"])
    def test_a_tool_that_fails_half_way_leaves_nothing(
        self, world: RecordedWorld, broken: str
    ) -> None:
        before = world.machine.read().regions
        world.tool.broken = broken
        with pytest.raises(CxlError, match="busy"):
            world.apply(SPREAD)
        assert world.machine.read().regions == before
        assert len(list(world.machine.marks.iterdir())) == 1

    def test_a_region_that_stays_is_told(self, world: RecordedWorld) -> None:
        world.apply(use(SWITCHED, MemoryUse.MOVABLE, MemoryUse.OFFLINE))
        world.tool.broken = "disable-region"
        with pytest.raises(CxlError, match="busy"):
            world.apply(SWITCHED.inverse())
        assert world.states(SWITCHED) == [("offline", False)]
        assert len(list(world.machine.marks.iterdir())) == 1  # still ours

    def test_a_region_made_by_hand_is_never_touched(self, world: RecordedWorld) -> None:
        RegionMarks(world.machine.marks).remove(SWITCHED.window, SWITCHED.members)
        before = world.machine.read().regions
        world.tool.ran.clear()
        offline = use(SWITCHED, MemoryUse.MOVABLE, MemoryUse.OFFLINE)
        for step in (SWITCHED, SWITCHED.inverse(), offline, offline.inverse()):
            with pytest.raises(CxlError, match="was made by hand, and is never changed"):
                world.apply(step)
            assert world.undo(step) == 0
        assert world.tool.ran == []
        assert world.machine.read().regions == before

    @pytest.mark.parametrize(
        ("step", "problem"),
        [
            (create(ONE, 0x999), "there is no memdev with the serial 0x999"),
            (create(0x1000, 0x100), "there is no window at 0x1000; there are 0x150000000"),
            (create(ONE, 0x101), "is not behind"),
            (create(ONE, 0x100, size=512 * MIB), "0x100 has 256MiB of volatile memory"),
            (create(ONE, 0x200), "0x200 has 0B of volatile memory"),
            (create(BOTH, 0x100), "is interleaved over 2 host bridges, and 1 memdevs"),
            (create(BOTH, 0x101, 0x100), "memdev 0x101 is not behind"),
            (create(ONE, 0x100, size=100 * MIB), "is a multiple of 256MiB"),
            (create(ONE, 0x100, granularity=300), "granularity 300"),
            (create(ONE, 0x100, 0x100), "named twice"),
            (create(OTHER, 0x102), "0x102 is part of region0, which this agent made"),
        ],
    )
    def test_what_is_refused(self, world: RecordedWorld, step: CreateRegion, problem: str) -> None:
        before = world.machine.read().regions
        world.tool.ran.clear()
        with pytest.raises(CxlError, match=problem):
            world.apply(step)
        assert world.tool.ran == []
        assert world.machine.read().regions == before
        assert world.undo(step) == 0
        assert world.machine.read().regions == before

    def test_a_window_that_is_too_small(self, world: RecordedWorld) -> None:
        (world.machine.device("decoder0.0") / "size").write_text(f"{256 * MIB:#x}\n")
        (world.machine.memdev("0x100") / "ram" / "size").write_text(f"{512 * MIB:#x}\n")
        with pytest.raises(CxlError, match="has 256MiB left of 256MiB, 512MiB are asked for"):
            world.apply(create(ONE, 0x100, size=512 * MIB))

    def test_a_lower_window_behind_the_same_bridge(self, world: RecordedWorld) -> None:
        world.apply(SPREAD)
        with pytest.raises(CxlError, match="region1 is at a higher address behind the same host"):
            world.apply(SINGLE)
