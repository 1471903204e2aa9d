"""How a transaction ends: in the books with what it changed, or undone; the audit log is told.

It decides nothing and applies nothing: the plan was carried out by then, or failed.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.custody import (
    after_plan,
    after_undo,
    condemned,
    slices_after,
    with_residues,
)
from virtfabric.daemon.undertaking import Outcome
from virtfabric.model.amounts import MEMORY_KEYS
from virtfabric.model.devicesteps import AttachFunction
from virtfabric.model.errors import JournalError, Refusal, RefusedError, VirtfabricError
from virtfabric.model.ids import GrantId, LoanId
from virtfabric.model.ledger import Books, Grant
from virtfabric.policy.loans import settle
from virtfabric.policy.reclaim import sum_up
from virtfabric.policy.returnability import held_memory
from virtfabric.ports import TransactionState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from virtfabric.daemon.executor import Execution
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.residues import Residues
    from virtfabric.daemon.undertaking import Undertaking
    from virtfabric.daemon.unfinished import Unfinished
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId, TransactionId
    from virtfabric.model.plan import Plan
    from virtfabric.model.reclaim import Yield
    from virtfabric.policy.reclaim import Stopped
    from virtfabric.ports import AuditLog, Clock, Journal

log = logging.getLogger(__name__)


class Settlement:
    """Ends transactions, each in the thread that conducted it."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        observatory: Observatory,
        journal: Journal,
        audit: AuditLog,
        clock: Clock,
        unfinished: Unfinished,
        residues: Residues,
    ) -> None:
        self._ledger = ledger
        self._observatory = observatory
        self._journal = journal
        self._audit = audit
        self._clock = clock
        self._unfinished = unfinished
        self._residues = residues
        self._moved: Callable[[], None] = lambda: None

    def tell_moves(self, moved: Callable[[], None]) -> None:
        """Whom to tell when functions may have become free; it must not block."""
        self._moved = moved

    # -- committed --------------------------------------------------------------------------

    def commit(
        self,
        work: Undertaking,
        txn: TransactionId,
        decision: Decision | None,
        plan: Plan,
        execution: Execution,
        began: float,
        stopped: Stopped,
    ) -> Outcome:
        """The books and the end of the transaction reach the disk together.

        `stopped` are guests that stopped short, with what they had been asked for, and why.

        Raises:
            VirtfabricError: they did not; the caller undoes what was applied.
        """
        touched = plan.guests - work.absent
        with execution.outside:
            self._read_back(touched, plan)
        now = self._clock.now()
        grant = self._new_grant(work, decision, now)
        loans = (
            [LoanId(f"loan-{uuid.uuid4().hex[:10]}") for _ in decision.takes] if decision else []
        )
        took = self._clock.monotonic() - began
        partly = work.ends is not None and any(g == work.ends.guest for g, _ in stopped)
        final: list[Books] = []

        def change(before: Books) -> Books:
            books = before = condemned(before, self._observatory.devices, now)
            if decision is not None:
                books = settle(
                    books, decision, grant=work.ends, new_grant=grant, loan_ids=loans, at=now,
                    orders=plan.orders, partly=partly,
                )  # fmt: skip
            elif plan.orders:
                books = _with_orders(books, plan.orders)
            if work.settle_books is not None:
                books = work.settle_books(books)
            books = after_plan(books, before, plan, execution.skipped, now)
            books = _with_slices(books, work, execution)
            residues = (*execution.residues, *self._residues.find(books, touched, now))
            return with_residues(books, plan.guests, residues)

        def store(books: Books) -> None:
            outcome = {"state": "committed", "grant": grant.to_json() if grant else None}
            self._journal.close(txn, TransactionState.COMMITTED, outcome, books)
            final.append(books)

        self._ledger.commit(txn, change, store)
        residues = tuple(r for r in final[0].residues if r.guest in plan.guests)
        own = max(0.0, took - execution.outside.seconds)
        outcome = Outcome(
            txn, decision, grant, tuple(str(s) for s in execution.applied), residues,
            tuple(o.to_json() for o in plan.offers), took, own,
            self._sum_up(decision, stopped),
            tuple(f"{step}: {why}" for step, why in execution.skipped),
        )  # fmt: skip
        try:
            self._audit_commit(work, outcome, loans)
        except JournalError as full:
            # it is done and in the books: only the record is missing, and that must be told
            log.error("%s: done, but the audit log cannot take it: %s", txn, full)
        if plan.addresses:
            self._moved()
        return outcome

    def _sum_up(self, decision: Decision | None, stopped: Stopped) -> tuple[Yield, ...]:
        if decision is None:
            return ()
        names = {uuid: state.name for uuid, state in self._observatory.guests.items()}
        return sum_up(decision, stopped, names)

    def _read_back(self, guests: Collection[GuestId], plan: Plan) -> None:
        self._observatory.refresh(guests)
        if plan.addresses:
            # a fatal error may be what made somebody give a function back
            self._observatory.refresh_devices_of(plan)

    def _new_grant(self, work: Undertaking, decision: Decision | None, now: float) -> Grant | None:
        if decision is None:
            return None
        gain = decision.delta.positive()
        if not work.grants or not gain:
            return None
        return Grant(
            GrantId(f"grant-{uuid.uuid4().hex[:10]}"), decision.guest, gain, work.request, now,
            now + work.lease_s if work.lease_s else None,
        )  # fmt: skip

    def _audit_commit(self, work: Undertaking, outcome: Outcome, loans: list[LoanId]) -> None:
        decision = outcome.decision
        subjects = [*subjects_of(work, outcome.txn, decision), *loans]
        if outcome.grant:
            subjects.append(outcome.grant.id)
        if work.ends:
            subjects.append(work.ends.id)
        self._audit.append(
            "plan.committed",
            subjects,
            {
                "title": work.title, "request": work.request, "txn": outcome.txn,
                "grant": outcome.grant.to_json() if outcome.grant else None, "loans": loans,
                "decision": decision.to_json() if decision else None,
                "steps": list(outcome.steps), "took_s": round(outcome.took_s, 3),
                "residues": [r.to_json() for r in outcome.residues],
                "memory": self._memory_afterwards(decision),
                "reclaimed": [one.to_json() | {"text": str(one)} for one in outcome.reclaimed],
                "skipped": list(outcome.skipped),
            },
        )  # fmt: skip

    def _memory_afterwards(self, decision: Decision | None) -> dict[str, list[str]]:
        """By name, what can be taken back of guests whose memory the decision changed, and why."""
        if decision is None:
            return {}
        moved = [(decision.guest, decision.delta), *((t.victim, t.amounts) for t in decision.takes)]
        moved += [(back.victim, back.amounts) for back in decision.returns]
        keys = set(MEMORY_KEYS.values())
        snapshot = self._observatory.snapshot()
        told = {}
        for guest in dict.fromkeys(g for g, amounts in moved if keys & amounts.keys()):
            state = snapshot.guests.get(guest)
            if state is not None and state.active:
                told[state.name] = [str(part) for part in held_memory(state, snapshot)]
        return told

    # -- undone -----------------------------------------------------------------------------

    def undo(
        self,
        work: Undertaking,
        txn: TransactionId,
        decision: Decision | None,
        execution: Execution,
        error: Exception,
    ) -> None:
        """Take back what was applied because of `error`; what cannot be is tried again later."""
        touched = execution.touched
        problems = execution.rollback()
        body: dict[str, Any] = {
            "title": work.title, "request": work.request, "txn": txn, "why": str(error),
            "not_undone": problems,
        }  # fmt: skip
        kind = "plan.undone"
        if isinstance(error, RefusedError):
            body |= refusal_body(error.refusal)
            kind = "request.refused"
        try:
            if problems:
                self._unfinished.add(txn)
            else:
                self._close_undone(txn, execution, touched, str(error))
            self._audit.append(kind, subjects_of(work, txn, decision), body)
        except JournalError as full:
            self._unfinished.add(txn)
            log.error("undone, but the journal cannot take it (%s); tried again later", full)
        if any(isinstance(one.step, AttachFunction) for one in execution.undone):
            self._moved()
        try:
            self._observatory.refresh(touched - work.absent)
        except VirtfabricError as again:
            log.warning("cannot read back after an undo: %s", again)

    def _close_undone(
        self, txn: TransactionId, execution: Execution, touched: frozenset[GuestId], why: str
    ) -> None:
        residues = tuple(execution.residues)
        outcome = {"state": "undone", "why": why, "residues": [r.to_json() for r in residues]}

        def change(books: Books) -> Books:
            if residues:
                books = with_residues(books, touched, residues)
            return after_undo(books, execution.undone, self._clock.now())

        self._ledger.commit(
            txn, change,
            lambda books: self._journal.close(txn, TransactionState.UNDONE, outcome, books),
        )  # fmt: skip


def subjects_of(work: Undertaking, txn: TransactionId, decision: Decision | None) -> list[str]:
    """Ids under which `explain` finds it."""
    subjects: list[str] = [work.request, txn]
    if decision is not None:
        subjects += [decision.guest, *(t.victim for t in decision.takes)]
        subjects += [*(r.victim for r in decision.returns), *(r.loan for r in decision.returns)]
    return list(dict.fromkeys(subjects))


def _with_slices(books: Books, work: Undertaking, execution: Execution) -> Books:
    if work.prelude is not None:
        books = work.prelude.settle(books)
    missed = (step for step, _ in execution.skipped)
    return slices_after(books, (*execution.applied, *missed))


def _with_orders(books: Books, orders: Mapping[GuestId, tuple[int, ...]]) -> Books:
    holdings = {g: replace(h, order=orders.get(g, h.order)) for g, h in books.holdings.items()}
    return replace(books, holdings=holdings)


def refusal_body(refusal: Refusal) -> dict[str, Any]:
    """A refusal as the audit log keeps it."""
    return {
        "reason": refusal.reason.value, "detail": refusal.detail,
        "would_fit": dict(refusal.would_fit), "considered": list(refusal.considered),
    }  # fmt: skip
