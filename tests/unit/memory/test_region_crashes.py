"""kill -9 between any two things that a step does to the kernel, and again while it is undone.

The real handlers on a recorded machine. The agent dies before a tool runs, in the middle of what it
does, or after it; a new one, with nothing but the journal's steps and the marks, undoes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from machine import Machine
from ndctl import FakeNdctl

from tests.contract.handler_contract import Context
from virtfabric.adapters.cxl.handlers import cxl_handlers
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.errors import CxlError
from virtfabric.model.plan import parse_step
from virtfabric.model.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from virtfabric.model.step import Step

CREATE = CreateRegion(
    window=0x250000000, members=(Serial(0x104), Serial(0x101)), size=512 * MIB, deadline_s=0.2,
    before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
)  # fmt: skip
MOVABLE = OnlineMemory(
    window=CREATE.window, members=CREATE.members, deadline_s=0.2,
    before=MemoryUse.OFFLINE, after=MemoryUse.MOVABLE,
)  # fmt: skip
NORMAL = OnlineMemory(
    window=CREATE.window, members=CREATE.members, deadline_s=0.2,
    before=MemoryUse.OFFLINE, after=MemoryUse.NORMAL,
)  # fmt: skip
PLANS = {
    "made": (CREATE, MOVABLE),
    "made-normal": (CREATE, NORMAL),
    "ended": (MOVABLE.inverse(), CREATE.inverse()),
}
WHEN = ("before", "amid", "after")


class Killed(BaseException):
    """SIGKILL: nothing catches it, nothing is tidied up."""


class Mortal:
    """A `Tool` whose caller dies at the `at`th command (from 0)."""

    def __init__(self, inner: FakeNdctl, at: int, when: str) -> None:
        self.inner, self.at, self.when = inner, at, when
        self.count = 0

    def __call__(self, command: Sequence[str], **options: Any) -> str:
        here, self.count = self.count == self.at, self.count + 1
        if not here:
            return self.inner(command, **options)
        if self.when == "amid":
            # only this one does several things that can be told apart
            self.inner.broken = "create-region"
            try:
                self.inner(command, **options)
            except CxlError:
                raise Killed from None
            finally:
                self.inner.broken = "nothing"
        elif self.when == "after":
            self.inner(command, **options)
        raise Killed


class Host:
    """One machine, and agents that come and go."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine("lab-cxl", directory)
        self.tool = FakeNdctl(self.machine)
        self.touched: list[Step] = []

    def handlers(self, tool: Any = None) -> HandlerRegistry:
        """Those of a new process."""
        machine = self.machine
        run = tool or self.tool
        return HandlerRegistry(
            cxl_handlers(machine.sys, machine.proc, marks=machine.marks, run=run)
        )

    def carry_out(self, plan: Sequence[Step], tool: Any = None) -> bool:
        """As the executor: noted, applied, verified; False when the agent was killed."""
        handlers, self.touched = self.handlers(tool), []
        try:
            for step in plan:
                self.touched.append(parse_step(step.to_json()))
                handlers.for_step(step).apply(step, Context())
                handlers.for_step(step).verify(step)
        except Killed:
            return False
        return True

    def recover(self, tool: Any = None) -> bool:
        """As a start of the agent; False when it was killed as well."""
        handlers = self.handlers(tool)
        try:
            for step in reversed(self.touched):
                assert handlers.for_step(step).undo(step) == 0
        except Killed:
            return False
        return True

    def state(self) -> Any:
        inventory = self.machine.memory().read_cxl()
        marks = self.machine.marks
        return (
            [(r.members, r.size, r.committed, r.ours, r.dax) for r in inventory.regions],
            sorted(mark.name for mark in marks.iterdir()) if marks.exists() else [],
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def prepare(host: Host, name: str) -> Any:
    if name == "ended":
        assert host.carry_out(PLANS["made"])
    return host.state()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("at", range(3))
def test_a_killed_plan_is_undone(host: Host, name: str, when: str, at: int) -> None:
    before = prepare(host, name)
    if host.carry_out(PLANS[name], Mortal(host.tool, at, when)):
        assert name == "made", "the kernel brings memory online movable by itself"
        assert at > 0
        return
    assert host.recover()
    assert host.state() == before
    assert host.recover()  # the journal could not be closed: once more
    assert host.state() == before
    assert host.carry_out(PLANS[name])


@pytest.mark.parametrize("name", ["made", "ended"])
@pytest.mark.parametrize(
    ("at", "when"), [(0, "amid"), *((at, when) for at in range(3) for when in ("before", "after"))]
)
def test_a_killed_undo_is_undone_by_the_next(host: Host, name: str, when: str, at: int) -> None:
    """The whole plan was done, but its end is not in the journal; so is its undo then."""
    before = prepare(host, name)
    assert host.carry_out(PLANS[name])
    host.recover(Mortal(host.tool, at, when))
    assert host.recover()
    assert host.state() == before


def test_a_half_made_region_of_somebody_else_is_left_alone(host: Host) -> None:
    """The mark tells which regions there were before ours was begun."""
    host.tool.broken = "create-region"
    with pytest.raises(CxlError):
        host.tool(
            ["cxl", "create-region", "--decoder=decoder0.2", "--ways=2", "--granularity=256",
             f"--size={512 * MIB}", "mem1", "mem0"], deadline_s=1,
        )  # fmt: skip
    host.tool.broken = "nothing"
    by_hand = host.state()
    assert len(by_hand[0]) == 1
    assert not host.carry_out((CREATE,), Mortal(host.tool, 0, "before"))
    assert host.recover()
    assert host.state() == by_hand


def test_killed_between_mark_and_tool_is_nobodys(host: Host) -> None:
    """A mark alone: nothing is there, and the mark goes, so that a region by hand is by hand."""
    assert not host.carry_out((CREATE,), Mortal(host.tool, 0, "before"))
    assert host.state()[1] != []
    assert host.recover()
    assert host.state() == ([], [])
