"""Conducts one request from decision to committed books: decide, place, reserve, execute, settle.

Deciding is repeated when the ledger moved meanwhile; a victim that stops short makes the decision
anew with what it did give, inside the same transaction. All of it happens or none of it.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.daemon.executor import Execution, Progress, Shortfall, Stopwatch
from virtfabric.daemon.residues import Residues
from virtfabric.daemon.settlement import Settlement, refusal_body, subjects_of
from virtfabric.daemon.shortfalls import Shortfalls
from virtfabric.daemon.unfinished import Unfinished
from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Course
from virtfabric.model.errors import (
    Reason,
    Refusal,
    RefusedError,
    StepCancelledError,
    VirtfabricError,
)
from virtfabric.model.ids import TransactionId
from virtfabric.policy.placement import plan_convergence, plan_decision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from virtfabric.daemon.ledger import Ledger, LedgerView
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.reclaimer import Reclaimer
    from virtfabric.daemon.undertaking import Caps, Outcome, Place, Prelude, Undertaking
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.model.step import Step
    from virtfabric.ports import AuditLog, Clock, Handlers, Journal


log = logging.getLogger(__name__)

WAIT_SLICE_S: Final = 1.0
"""Longest wait for another plan before cancellation and deadline are looked at again."""
_TRIES: Final = 8
"""Decisions inside a transaction, while the ledger moves."""
RETRY: Final = frozenset(
    {
        Reason.BUSY,
        Reason.NO_CAPACITY,
        Reason.NO_PLACEMENT,
        Reason.DEVICE_IN_USE,
        Reason.GROUP_NOT_VIABLE,
    }
)
"""Refusals that a running plan may turn into a yes when it ends."""


class Conductor:
    """Runs undertakings, each in the thread that calls `conduct`."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        observatory: Observatory,
        journal: Journal,
        audit: AuditLog,
        handlers: Handlers,
        clock: Clock,
        reclaimer: Reclaimer,
    ) -> None:
        self._reclaimer = reclaimer
        self._ledger = ledger
        self._observatory = observatory
        self._journal = journal
        self._audit = audit
        self._handlers = handlers
        self._clock = clock
        self._told: Callable[[RequestId, Course, str], None] = lambda *_: None
        self.unfinished = Unfinished(
            ledger=ledger, journal=journal, audit=audit, handlers=handlers, clock=clock
        )
        self.residues = Residues(
            ledger=ledger, observatory=observatory, journal=journal, audit=audit, clock=clock
        )
        self._settlement = Settlement(
            ledger=ledger, observatory=observatory, journal=journal, audit=audit, clock=clock,
            unfinished=self.unfinished, residues=self.residues,
        )  # fmt: skip

    def tell_moves(self, moved: Callable[[], None]) -> None:
        """Whom to tell when functions may have become free; it must not block."""
        self._settlement.tell_moves(moved)
        self.unfinished.tell_moves(moved)

    def tell_ends(self, told: Callable[[RequestId, Course, str], None]) -> None:
        """Whom to tell how each undertaking ended, in the thread that conducted it."""
        self._told = told

    def place_decision(self, deadline_s: float) -> Place:
        """A placer of decisions, with this deadline for each step that needs a guest."""

        def place(snapshot: HostSnapshot, decision: Decision | None) -> Plan | Refusal:
            assert decision is not None
            return plan_decision(snapshot, decision, deadline_s=deadline_s)

        return place

    def place_convergence(self, request: RequestId, guests: Collection[GuestId] | None) -> Place:
        """A placer that brings what is found to what the books say.

        A guest that a job detains is left as it is: it is for the caller to place it later.
        """

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
            return _spare_detained(snapshot, plan_convergence(snapshot, guests, request))

        return place

    def place_departure(self, deadline_s: float) -> Place:
        """As `place_decision`, for what can only free something: no detained guest is waited for.

        What comes home to one is in the books at once, and on it when the caller places it.
        """
        inner = self.place_decision(deadline_s)
        return lambda snapshot, decision: _spare_detained(snapshot, inner(snapshot, decision))

    def consider(
        self,
        work: Undertaking,
        *,
        without: TransactionId | None = None,
        caps: Caps | None = None,
        stuck: Mapping[tuple[GuestId, str], int] | None = None,
        done: tuple[Step, ...] = (),
    ) -> tuple[HostSnapshot, Decision | None, Plan] | Refusal:
        """Decide and place on the present snapshot; nothing is reserved (`--dry-run`).

        Args:
            work: what is to be done.
            without: the transaction that is decided anew.
            caps: as `Shortfalls.caps`.
            stuck: as `Shortfalls.stuck`.
            done: as `HostSnapshot.done`.
        """
        snapshot = self._observatory.snapshot(without)
        recall = replace(work.recall, stuck={**work.recall.stuck, **(stuck or {})})
        snapshot = replace(snapshot, recall=recall, done=done)
        if work.incoming is not None:
            guests = {**snapshot.guests, work.incoming.uuid: work.incoming}
            snapshot = replace(snapshot, guests=guests)
        snapshot = self._observatory.look_at_pages(snapshot)
        prelude = work.prelude if without is None else None
        if prelude is not None:
            snapshot = prelude.foresee(snapshot)
        answer = self._decide(work, snapshot, caps or {})
        if prelude is None:
            return answer
        if isinstance(answer, Refusal):
            return prelude.explain(answer)
        snapshot, decision, plan = answer
        return snapshot, decision, prelude.before(plan)

    def _decide(
        self, work: Undertaking, snapshot: HostSnapshot, caps: Caps
    ) -> tuple[HostSnapshot, Decision | None, Plan] | Refusal:
        decision: Decision | None = None
        if work.decide is not None:
            answer = self._reclaimer.decide(work.decide, snapshot, caps, deadline_s=work.deadline_s)
            if isinstance(answer, Refusal):
                return answer
            decision = answer
        plan = work.place(snapshot, decision)
        if isinstance(plan, Refusal):
            return plan
        return snapshot, decision, plan

    def conduct(self, work: Undertaking, progress: Progress) -> Outcome:
        """Carry it out.

        Raises:
            RefusedError: nothing was changed.
            StepCancelledError, VirtfabricError: everything was undone.
        """
        try:
            outcome = self._conduct(work, progress)
        except VirtfabricError as error:
            self._told(work.request, Course.UNDONE, str(error))
            raise
        self._told(work.request, Course.DONE, "")
        return outcome

    def _conduct(self, work: Undertaking, progress: Progress) -> Outcome:
        self.unfinished.finish()
        began, outside = self._clock.monotonic(), Stopwatch(self._clock)
        txn = TransactionId(f"txn-{uuid.uuid4().hex[:12]}")
        try:
            decision, plan = self._reserve(work, txn, progress, outside, began + work.deadline_s)
        except RefusedError as error:
            self._audit.append(
                "request.refused",
                [work.request],
                work.body | {"title": work.title, **refusal_body(error.refusal)},
            )
            raise
        try:
            return self._execute(work, txn, decision, plan, progress, outside, began)
        finally:
            if txn not in self.unfinished:
                self._ledger.abort(txn)

    # -- deciding ---------------------------------------------------------------------------

    def _reserve(
        self,
        work: Undertaking,
        txn: TransactionId,
        progress: Progress,
        outside: Stopwatch,
        until: float,
    ) -> tuple[Decision | None, Plan]:
        while True:
            if progress.cancelled.is_set():
                raise StepCancelledError("cancelled before anything was changed")
            with outside:
                self._observatory.refresh_jobs()
            view, waits = self._ledger.view(), "waiting for another plan"
            answer = self.consider(work)
            if isinstance(answer, Refusal):
                if not self._worth_waiting(answer, until):
                    raise RefusedError(answer)
                waits = f"waiting for another plan ({answer.detail})"
            else:
                snapshot, decision, plan = answer
                touched = _guests_of(work, decision, plan)
                obstacle = _obstacle(snapshot, view, touched, plan)
                if not obstacle:
                    if self._take_hold(work, txn, answer, touched, outside):
                        return decision, plan
                    continue
                if self._clock.monotonic() >= until:
                    raise RefusedError(Refusal(Reason.BUSY, f"{obstacle}; try again"))
                waits = f"waiting: {obstacle}"
            progress.progress(0.0, waits)
            self._ledger.wait_change(view.generation, WAIT_SLICE_S)

    def _take_hold(
        self,
        work: Undertaking,
        txn: TransactionId,
        answer: tuple[HostSnapshot, Decision | None, Plan],
        touched: frozenset[GuestId],
        outside: Stopwatch,
    ) -> bool:
        """Reserve what was planned, unless guests or ledger are no longer as they were then."""
        snapshot, decision, plan = answer
        with outside:
            confirmed = self._observatory.confirm(snapshot, touched - work.absent)
            if plan.addresses:
                # one that came, went or is used by the host now voids the generation
                self._observatory.refresh_devices_of(plan)
        if not confirmed:
            return False
        free_part = _taken(decision, plan)
        return self._ledger.reserve(
            txn, snapshot.generation, free_part, touched, plan.layout_use, plan.addresses
        )

    def _worth_waiting(self, refusal: Refusal, until: float) -> bool:
        return (
            refusal.reason in RETRY
            and bool(self._ledger.view().busy)
            and self._clock.monotonic() < until
        )

    # -- executing --------------------------------------------------------------------------

    def _execute(
        self,
        work: Undertaking,
        txn: TransactionId,
        decision: Decision | None,
        plan: Plan,
        progress: Progress,
        outside: Stopwatch,
        began: float,
    ) -> Outcome:
        body = {
            "request": work.request, "title": work.title, "txn": txn,
            "decision": decision.to_json() if decision else None,
            "names": self._names(work, decision, plan), "generation": plan.generation,
            "offers": [o.to_json() for o in plan.offers],
            "steps": [str(s) for s in plan.steps],
        } | work.body  # fmt: skip
        self._journal.begin(txn, body, self._clock.now())
        execution = Execution(txn, self._journal, self._handlers, self._clock, progress, outside)
        shortfalls = Shortfalls(yields=work.yields)
        try:
            subjects = [*subjects_of(work, txn, decision), *sorted(plan.addresses)]
            self._audit.append("plan.begun", subjects, body)
            if work.prelude is not None and work.prelude.steps:
                decision, plan = self._prepare(work, work.prelude, txn, execution, progress)
            execution.extend(plan.steps)
            decision, plan = self._run(work, txn, decision, plan, execution, shortfalls)
            return self._settlement.commit(
                work, txn, decision, plan, execution, began, shortfalls.stopped
            )
        except Exception as error:
            # also for a defect of ours: what was applied must not stay
            self._settlement.undo(work, txn, decision, execution, error)
            raise

    def _prepare(
        self, work: Undertaking, prelude: Prelude, txn: TransactionId, execution: Execution,
        progress: Progress,
    ) -> tuple[Decision | None, Plan]:  # fmt: skip
        """Do what comes before, then decide on the host that is there now."""
        execution.extend(prelude.steps)
        short = execution.run()
        if short is not None:
            raise RefusedError(_uncooperative(short))
        prelude.finish(progress)
        for _ in range(_TRIES):
            answer = self.consider(work, without=txn)
            if isinstance(answer, Refusal):
                raise RefusedError(answer)
            _, decision, plan = answer
            touched = _guests_of(work, decision, plan) | execution.touched
            if self._take_hold(work, txn, answer, touched, execution.outside):
                self._audit.append(
                    "plan.replanned", subjects_of(work, txn, decision),
                    {
                        "title": work.title, "names": self._names(work, decision, plan),
                        "decision": decision.to_json() if decision else None,
                        "steps": [str(step) for step in plan.steps],
                    },
                )  # fmt: skip
                return decision, plan
        raise RefusedError(Refusal(Reason.BUSY, "the host changes all the time; try again"))

    def _names(
        self, work: Undertaking, decision: Decision | None, plan: Plan
    ) -> dict[GuestId, str]:
        """Guests' names as they are now: a story is told long after."""
        guests = self._observatory.guests
        return {g: guests[g].name for g in _guests_of(work, decision, plan) if g in guests}

    def _run(
        self,
        work: Undertaking,
        txn: TransactionId,
        decision: Decision | None,
        plan: Plan,
        execution: Execution,
        shortfalls: Shortfalls,
    ) -> tuple[Decision | None, Plan]:
        while (short := execution.run()) is not None:
            if decision is None or not shortfalls.can_answer(short, decision):
                raise RefusedError(_uncooperative(short))
            self._observatory.refresh([short.step.guest])
            snapshot = self._observatory.snapshot(txn)
            shortfalls.note(short, decision, execution.applied, snapshot)
            log.warning("%s; asking the next one", short.detail)
            self._audit.append(
                "plan.topped-up", subjects_of(work, txn, decision), {"why": short.detail}
            )
            decision, plan = self._replan(work, txn, shortfalls, short, execution)
            self._audit.append(
                "plan.replanned", subjects_of(work, txn, decision),
                {
                    "title": work.title, "names": self._names(work, decision, plan),
                    "decision": decision.to_json() if decision else None,
                    "steps": [str(step) for step in plan.steps],
                },
            )  # fmt: skip
            execution.extend(plan.steps)
        return decision, plan

    def _replan(
        self,
        work: Undertaking,
        txn: TransactionId,
        shortfalls: Shortfalls,
        short: Shortfall,
        execution: Execution,
    ) -> tuple[Decision | None, Plan]:
        """Decide again with what the guest did give; the same transaction goes on."""
        for _ in range(_TRIES):
            self._observatory.refresh(execution.touched - work.absent)
            answer = self.consider(
                work, without=txn, caps=shortfalls.caps, stuck=shortfalls.stuck,
                done=shortfalls.came_about(execution.applied),
            )  # fmt: skip
            if isinstance(answer, Refusal):
                raise RefusedError(_uncooperative(short)._replace(considered=answer.considered))
            snapshot, decision, plan = answer
            touched = _guests_of(work, decision, plan) | {short.step.guest}
            free_part = _taken(decision, plan)
            if self._ledger.reserve(
                txn, snapshot.generation, free_part, touched, plan.layout_use, plan.addresses
            ):
                return decision, plan
        raise RefusedError(_uncooperative(short))


def _taken(decision: Decision | None, plan: Plan) -> Amounts:
    """What a plan takes of free capacity, in all and of single nodes."""
    free_part = decision.from_free.positive() if decision else Amounts()
    return free_part + plan.node_needs


def _guests_of(work: Undertaking, decision: Decision | None, plan: Plan) -> frozenset[GuestId]:
    held = (decision.holdings or {}) if decision else {}
    own = {decision.guest} if decision else set()
    return plan.guests | frozenset(held) | own


def _obstacle(
    snapshot: HostSnapshot, view: LedgerView, touched: frozenset[GuestId], plan: Plan
) -> str:
    """Why the plan cannot be carried out yet; "" when it can."""
    if touched & snapshot.busy:
        return "another plan works on the same guests"
    if plan.addresses & view.functions:
        return "another plan works on the same PCIe functions"
    if view.keeps_layout_from(plan.layout_use):
        return "another plan decides which pCPUs are whose"
    for guest in sorted(plan.guests & _detained(snapshot)):
        state = snapshot.guests[guest]
        return f"{state.name} has a job running: {state.job}"
    return ""


def _detained(snapshot: HostSnapshot) -> frozenset[GuestId]:
    return frozenset(g for g, state in snapshot.guests.items() if state.detained)


def _spare_detained(snapshot: HostSnapshot, plan: Plan | Refusal) -> Plan | Refusal:
    return plan if isinstance(plan, Refusal) else plan.without(_detained(snapshot))


def _uncooperative(short: Shortfall) -> Refusal:
    return Refusal(
        Reason.GUEST_UNCOOPERATIVE,
        f"{short.step}: {short.detail}; nobody else could make up for it, everything was undone",
    )
