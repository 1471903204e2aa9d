"""Executes a transaction's steps: journal, apply, verify; undo newest first on failure.

A loop that knows no step type: each has one handler in an adapter. The executor decides nothing
about amounts; who conducts it (`daemon.conductor`) answers a shortfall with further steps or a
rollback.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfabric.daemon.custody import Undone, is_prepared_for, is_withheld, residues_of
from virtfabric.model.errors import (
    JournalError,
    ShortfallError,
    StepCancelledError,
    VirtfabricError,
)
from virtfabric.ports import StepState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtfabric.model.ids import GuestId, TransactionId
    from virtfabric.model.ledger import Residue
    from virtfabric.model.step import Step
    from virtfabric.ports import Clock, Handlers, Journal

log = logging.getLogger(__name__)


class Progress:
    """What a handler sees of the job it works for; maps a step's progress to the whole plan's.

    Attributes:
        step: the step that is being applied; None before, after, and while it is undone.
        doing: what the job does or waits for now, in words.
    """

    def __init__(
        self, report: Callable[[float, str], None], cancelled: threading.Event | None = None
    ) -> None:
        self._report = report
        self._cancelled = cancelled or threading.Event()
        self._base = 0.0
        self._span = 1.0
        self.step: Step | None = None
        self.doing = "deciding"

    @property
    def cancelled(self) -> threading.Event:
        """Set when the caller gave up."""
        return self._cancelled

    def enter(self, done: int, total: int, step: Step) -> None:
        """Step number `done` of `total` begins."""
        self._base, self._span = done / max(total, 1), 1 / max(total, 1)
        self.step, self.doing = step, str(step)
        self._report(self._base, str(step))

    def leave(self, doing: str) -> None:
        """No step is being applied any more."""
        self.step, self.doing = None, doing

    def progress(self, fraction: float, text: str) -> None:
        """A handler reports 0..1 of its step."""
        self.doing = text
        self._report(self._base + self._span * min(max(fraction, 0.0), 1.0), text)


class Stopwatch:
    """Adds up the seconds of the `with` blocks it is given; not re-entrant."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._since = self._clock.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._clock.monotonic() - self._since


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A guest stopped short in a step that the plan depends on."""

    step: Step
    reached: int
    detail: str


class Execution:
    """One transaction under way. Not thread-safe: it belongs to the thread that runs it.

    Attributes:
        residues: what undos could not bring about.
        skipped: optional steps that did not come about, with why.
        undone: steps that were undone, newest first.
        outside: times what is not ours (the handlers' `apply`: libvirt, and waiting for guests).
    """

    def __init__(
        self,
        txn: TransactionId,
        journal: Journal,
        handlers: Handlers,
        clock: Clock,
        progress: Progress,
        outside: Stopwatch,
    ) -> None:
        self._txn = txn
        self._journal = journal
        self._handlers = handlers
        self._clock = clock
        self._progress = progress
        self._waiting: list[tuple[int, Step]] = []
        self._done: list[tuple[int, Step]] = []
        self._total = 0
        self.residues: list[Residue] = []
        self.skipped: list[tuple[Step, str]] = []
        self._half_done: set[int] = set()
        self.undone: list[Undone] = []
        self.outside = outside

    @property
    def applied(self) -> tuple[Step, ...]:
        """Steps that came about, in order."""
        return tuple(step for index, step in self._done if index not in self._half_done)

    @property
    def touched(self) -> frozenset[GuestId]:
        """Guests for whom something was changed, or may have been."""
        return frozenset(step.guest for _, step in self._done)

    def extend(self, steps: Sequence[Step]) -> None:
        """Journal further steps; what was waiting before is dropped (it was planned anew).

        Raises:
            JournalError: nothing was added.
        """
        for index, _ in self._waiting:
            self._journal.mark(self._txn, index, StepState.SKIPPED)
        first = self._journal.extend(self._txn, steps)
        self._waiting = [(first + i, step) for i, step in enumerate(steps)]
        self._total = len(self._done) + len(self._waiting)

    def run(self) -> Shortfall | None:
        """Run what waits. A shortfall of a guest is an answer; anything else that fails raises.

        Raises:
            VirtfabricError: the step that failed may be half done; call `rollback`.
        """
        while self._waiting:
            index, step = self._waiting.pop(0)
            self._progress.enter(len(self._done), self._total, step)
            if self._progress.cancelled.is_set():
                raise StepCancelledError("cancelled by the caller")
            self._journal.mark(self._txn, index, StepState.APPLYING)
            self._done.append((index, step))
            try:
                self._carry_out(index, step)
            except ShortfallError as error:
                if not step.optional:
                    self._journal.mark(self._txn, index, StepState.APPLIED)
                    return Shortfall(step, error.reached, str(error))
                self._skip(index, step, error)
            except StepCancelledError:
                raise
            except VirtfabricError as error:
                if not step.optional or isinstance(error, JournalError):
                    raise
                self._skip(index, step, error)
        self._progress.leave("writing the journal")
        return None

    def _carry_out(self, index: int, step: Step) -> None:
        handler = self._handlers.for_step(step)
        with self.outside:
            handler.apply(step, self._progress)
        # no mark in between: recovery undoes an APPLYING step as it does an APPLIED one
        handler.verify(step)
        self._journal.mark(self._txn, index, StepState.VERIFIED)

    def _skip(self, index: int, step: Step, error: VirtfabricError) -> None:
        """An optional step did not come about: what it leaves shows when the guest is read.

        It may be half done: should the plan be undone after all, so is this.
        """
        log.warning("%s: %s; the rest is a residue", step, error)
        self._journal.mark(self._txn, index, StepState.APPLIED)
        self._half_done.add(index)
        self.skipped.append((step, str(error)))

    def rollback(self) -> list[str]:
        """Undo everything applied, newest first; keeps going whatever fails.

        Returns:
            What could not be undone (text for the outcome); the journal entry of such a step
            stays as it is, so that the next start of the agent tries again.
        """
        failed: list[tuple[Step, str]] = []
        self._progress.leave("undoing")
        while self._done:
            index, step = self._done.pop()
            self._progress.progress(0.0, f"undoing: {step.inverse()}")
            waits_for = next((one for one, _ in failed if is_prepared_for(step, one)), None)
            if waits_for is not None:
                # the guest may have it still, and must not find itself in another network
                failed.append((step, f"not before {waits_for.inverse()}"))
                continue
            try:
                undone = self._undo(step)
            except VirtfabricError as error:
                why = f"{error}; {error.advice}" if error.advice else str(error)
                log.error("cannot undo %s: %s", step, why)
                failed.append((step, str(error)))
            except Exception as error:
                # a defect in one handler must not keep the others from undoing theirs
                why = f"internal error ({type(error).__name__}: {error})"
                log.error("cannot undo %s: %s", step, why)
                log.debug("cannot undo %s", step, exc_info=True)
                failed.append((step, why))
            else:
                self._note(index, undone)
        return [f"{step.inverse()}: {why}" for step, why in failed]

    def _undo(self, step: Step) -> Undone:
        if is_withheld(step, self.undone):
            return Undone(step, withheld=True)
        return Undone(step, self._handlers.for_step(step).undo(step))

    def _note(self, index: int, undone: Undone) -> None:
        self.undone.append(undone)
        now = self._clock.now()
        self.residues += residues_of(undone.step, undone.left, now, "left by an undo")
        if not undone.complete:
            return  # should it be undone anew, later or after a crash, the books still need to know
        with contextlib.suppress(JournalError):
            # the disk may be full: the undo is what counts, and repeating it is safe
            self._journal.mark(self._txn, index, StepState.UNDONE)
