"""`MakeHugePages`, for real: pages are made for a guest on one node, and given back.

Given back is only what is free: the kernel would take somebody else's free pages otherwise, until
the guest lets go of its own.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.hugepages.pools import PoolFiles
from virtfabric.adapters.hugepages.tally import Tallies
from virtfabric.model.errors import (
    HugePagesError,
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.hugepages import HugePools, MakeHugePages, Pool
from virtfabric.model.units import GIB, MIB, Bytes

if TYPE_CHECKING:
    from virtfabric.adapters.hugepages.pools import Write
    from virtfabric.adapters.hugepages.tally import Tally
    from virtfabric.model.host import HugePages
    from virtfabric.model.step import Step
    from virtfabric.ports import StepContext, StepHandler

log = logging.getLogger(__name__)

TALLIES: Final = Path("/run/virtfabric/hugepages")
_CHUNK: Final = 512 * MIB
"""Bytes of pages that are made before cancellation and deadline are looked at again."""
_COMPACTIONS: Final = 2
"""What two in a row did not free, a third one will not (each goes over the whole node)."""


class SysfsHugePages:
    """Implements `ports.PageTree`."""

    def __init__(
        self,
        root: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        *,
        tallies: Path = TALLIES,
        write: Write = Path.write_text,
    ) -> None:
        """Read below these; `tallies` says which pages are ours. Nothing is read before a call."""
        self.files = PoolFiles(root, proc, write)
        self.tallies = Tallies(tallies)

    def read_pools(self) -> HugePools:
        """Every pool, and what is ours of it."""
        found = {
            key: Pool(pages, self.tallies.read(key, pages.persistent).made)
            for key, pages in self.files.read_all().items()
        }
        nodes = sorted({key.node for key in found})
        return HugePools(found, {node: self.files.free_memory(node) for node in nodes})


class HugePagesHandler:
    """Implements `ports.StepHandler`. Neither guest nor libvirt has a say."""

    kind = MakeHugePages.kind

    def __init__(self, pools: SysfsHugePages) -> None:
        """Change these."""
        self._files, self._tallies = pools.files, pools.tallies

    def apply(self, step: Step, context: StepContext) -> None:
        """Have `after` pages made for the guest, and enough of them free."""
        own = _own(step)
        with self._tallies.alone(own.pool):
            tally = self._read(own)
            have = tally.made.get(own.guest, 0)
            if own.after > have:
                self._grow(own, tally, context)
            elif own.after < have and (left := self._shrink(own, tally, own.after)):
                raise ShortfallError(
                    f"{own.name}: {left} {own.pool} that were made for it are in use still",
                    reached=own.after + left,
                )
            self._check_free(own)
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """What is ours of the pool is what it should be, and the pool has it."""
        own = _own(step)
        tally = self._read(own)
        made = tally.made.get(own.guest, 0)
        if made != own.after:
            raise VerificationError(
                f"{own.name}: {own.after} {own.pool} made for it expected, {made} found"
            )
        if sum(tally.made.values()) > tally.left:
            raise VerificationError(f"{own.pool}: there are {tally.left}, fewer than were made")

    def undo(self, step: Step) -> int:
        """As it was, as far as it goes: pages are no guest's to keep, and nobody waits for them.

        What is in use still is given back later, by whoever looks for it. What cannot be made again
        the guest has let go before.
        """
        own = _own(step)
        if not self._files.exists(own.pool):
            return 0  # the node is gone, and its pages with it
        with self._tallies.alone(own.pool):
            tally = self._read(own)
            have = tally.made.get(own.guest, 0)
            if own.before > have:
                self._grow_again(own.inverse(), tally)
            elif own.before < have and (left := self._shrink(own, tally, own.before)):
                log.warning("%s: %d %s are in use still", own.name, left, own.pool)
        return 0

    def _grow_again(self, step: MakeHugePages, tally: Tally) -> None:
        try:
            self._grow(step, tally, None)
        except RefusedError as error:
            log.warning("%s", error.refusal.detail)

    def _read(self, step: MakeHugePages) -> Tally:
        return self._tallies.read(step.pool, self._files.read(step.pool).persistent)

    # -- more -------------------------------------------------------------------------------

    def _grow(self, step: MakeHugePages, tally: Tally, context: StepContext | None) -> None:
        want = step.after - tally.made.get(step.guest, 0)
        end = tally.left + want
        self._tallies.write(step.pool, tally.begun(step.guest, end))
        try:
            tried = self._fill(step, tally.left, end, context)
        finally:
            size = self._files.read(step.pool).persistent
            self._tallies.write(step.pool, tally.begun(step.guest, end).settled(size))
        if size < end:
            raise RefusedError(self._shortage(step, size - tally.left, want, tried))

    def _fill(self, step: MakeHugePages, size: int, end: int, context: StepContext | None) -> str:
        """Make what the kernel can, a part at a time; more after it has moved pages together.

        Returns:
            What it took to fail, for people.
        """
        until, chances = time.monotonic() + step.deadline_s, _COMPACTIONS
        start, chunk = size, max(1, _CHUNK // step.page)
        while size < end and time.monotonic() < until:
            if context is not None and context.cancelled.is_set():
                raise StepCancelledError(f"{step.describe()}: cancelled")
            if self._files.read(step.pool).persistent != size:
                raise HugePagesError(f"{step.pool}: somebody else changes that pool; try again")
            goal = min(end, size + chunk)
            size = self._files.resize(step.pool, goal)
            if context is not None:
                text = f"{step.name}: {size - start} of {end - start} {step.pool} made"
                context.progress((size - start) / (end - start), text)
            if size < goal:
                if not chances:
                    return ", after compaction as well"
                chances -= 1
                self._files.compact(step.node)
        return f" in {step.deadline_s:g} s"

    def _shortage(self, step: MakeHugePages, got: int, want: int, tried: str) -> Refusal:
        pages = self._files.read(step.pool)
        detail = (
            f"{step.name}: {got} of {want} more {step.pool} could be made{tried} "
            f"({_describe(pages)}; {self._files.free_memory(step.node).rounded()} of the node's "
            f"memory is free, but scattered); they are given back. {_advise(step)}"
        )
        return Refusal(Reason.NO_HUGE_PAGES, detail, {str(step.pool.amount_key): got})

    def _check_free(self, step: MakeHugePages) -> None:
        pages = self._files.read(step.pool)
        if pages.available < step.free:
            raise RefusedError(
                Refusal(
                    Reason.NO_HUGE_PAGES,
                    f"{step.name}: needs {step.free} free {step.pool}, but {_describe(pages)}: "
                    "somebody else took some just now; try again",
                    {str(step.pool.amount_key): pages.available},
                )
            )

    # -- less -------------------------------------------------------------------------------

    def _shrink(self, step: MakeHugePages, tally: Tally, to: int) -> int:
        """Give back what is free; how many have to wait."""
        due = tally.made.get(step.guest, 0) - to
        give = min(due, self._files.read(step.pool).available)
        if give:
            end = tally.left - give
            self._tallies.write(step.pool, tally.begun(step.guest, end))
            size = self._files.resize(step.pool, end)
            self._tallies.write(step.pool, tally.begun(step.guest, end).settled(size))
        return due - give


def _own(step: Step) -> MakeHugePages:
    if not isinstance(step, MakeHugePages):
        raise InvalidValueError("step.kind", step.kind, "is not for the huge pages handler")
    return step


def _describe(pages: HugePages) -> str:
    promised = f", {pages.reserved} of these promised" if pages.reserved else ""
    return f"the pool has {pages.total}, {pages.free} free{promised}"


def _advise(step: MakeHugePages) -> str:
    size = Bytes(step.page)
    boot = f"reserve them at boot (hugepagesz={step.page >> 20}M hugepages=N)"
    if step.page >= GIB:
        return f"Pages of {size} are seldom to be had once a host has run: {boot}, or use 2MiB ones"
    return f"Free memory on node {step.node} (stop or shrink what is there), or {boot}"


def huge_page_handlers(
    sys: Path = Path("/sys"), proc: Path = Path("/proc")
) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    return (HugePagesHandler(SysfsHugePages(sys, proc)),)
