"""After a crash: what the journal left open is undone, newest first, before anything else."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.daemon.custody import (
    Undone,
    after_undo,
    is_withheld,
    residues_of,
    with_residues,
)
from virtfabric.model.errors import VirtfabricError
from virtfabric.ports import StepState, TransactionState

if TYPE_CHECKING:
    from collections.abc import Collection

    from virtfabric.model.ledger import Books
    from virtfabric.model.step import Step
    from virtfabric.ports import (
        AuditLog,
        Clock,
        Handlers,
        Journal,
        JournalledTransaction,
    )

log = logging.getLogger(__name__)

TOUCHED = frozenset({StepState.APPLYING, StepState.APPLIED, StepState.VERIFIED})


def recover(
    journal: Journal, audit: AuditLog, handlers: Handlers, clock: Clock, books: Books
) -> Books:
    """Undo every open transaction; the books stay as they were before it.

    Steps name absolute values, so undoing one that never happened, or twice, is harmless.

    Raises:
        VirtfabricError: a step could not be undone; the transaction stays open and the agent
            does not start: it would otherwise decide on a host that it does not know.
    """
    for transaction in reversed(journal.open_transactions()):
        log.warning("transaction %s was cut off; undoing it", transaction.id)
        left = undo_transaction(transaction, handlers)
        books = books_after(books, left, clock.now(), "left by the recovery")
        books = replace(books, generation=books.generation + 1)
        outcome = {"state": "undone", "why": "the agent was cut off", "recovered": True}
        journal.close(transaction.id, TransactionState.UNDONE, outcome, books)
        _record(audit, transaction, left, books)
    return books


def undo_transaction(transaction: JournalledTransaction, handlers: Handlers) -> list[Undone]:
    """Undo the steps that were touched; what is answered is in that order, newest first.

    Raises:
        VirtfabricError: a step could not be undone; repeating is safe.
    """
    undone: list[Undone] = []
    for step in (entry.step for entry in reversed(transaction.steps) if entry.state in TOUCHED):
        if is_withheld(step, undone):
            undone.append(Undone(step, withheld=True))
        else:
            undone.append(Undone(step, _undo(step, handlers)))
    return undone


def books_after(books: Books, undone: Collection[Undone], at: float, why: str) -> Books:
    """The books after these steps were undone: residues, and functions that are in doubt."""
    residues = [r for one in undone for r in residues_of(one.step, one.left, at, why)]
    books = with_residues(books, {one.step.guest for one in undone}, residues)
    return after_undo(books, undone, at)


def _undo(step: Step, handlers: Handlers) -> int:
    try:
        return handlers.for_step(step).undo(step)
    except VirtfabricError as error:
        error.advice = error.advice or "mend the cause and start virtfabricd again"
        raise


def _record(
    audit: AuditLog, transaction: JournalledTransaction, left: Collection[Undone], books: Books
) -> None:
    touched = {one.step.guest for one in left}
    residues = [r for r in books.residues if r.guest in touched]
    body = transaction.body
    subjects = [transaction.id, str(body.get("request", ""))]
    subjects += sorted({s.step.guest for s in transaction.steps})
    undone = [str(one.step.inverse()) for one in left if not one.withheld]
    audit.append(
        "plan.recovered",
        [s for s in subjects if s],
        {
            "txn": transaction.id, "request": body.get("request"), "title": body.get("title"),
            "why": "the agent was cut off in mid-plan", "undone": undone,
            "residues": [r.to_json() for r in residues],
        },
    )  # fmt: skip
