"""After a crash: what the journal left open is undone, newest first, before anything else."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.daemon.executor import measure_residue
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.ledger import Books, Residue
from virtfabric.ports import StepState, TransactionState

if TYPE_CHECKING:
    from virtfabric.ports import (
        AuditLog,
        Clock,
        Handlers,
        Journal,
        JournalledStep,
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
        residues = undo_transaction(transaction, handlers, clock)
        touched = {s.step.guest for s in transaction.steps if s.state in TOUCHED}
        kept = tuple(r for r in books.residues if r.guest not in touched)
        books = replace(books, residues=(*kept, *residues), generation=books.generation + 1)
        outcome = {"state": "undone", "why": "the agent was cut off", "recovered": True}
        journal.close(transaction.id, TransactionState.UNDONE, outcome, books)
        _record(audit, transaction, residues)
    return books


def undo_transaction(
    transaction: JournalledTransaction, handlers: Handlers, clock: Clock
) -> list[Residue]:
    """Undo the steps that were touched, newest first; what guests keep is the residue.

    Raises:
        VirtfabricError: a step could not be undone; repeating is safe.
    """
    return [r for s in reversed(transaction.steps) for r in _undo(s, handlers, clock)]


def _undo(entry: JournalledStep, handlers: Handlers, clock: Clock) -> list[Residue]:
    if entry.state not in TOUCHED:
        return []
    step = entry.step
    try:
        left = handlers.for_step(step).undo(step)
    except VirtfabricError as error:
        error.advice = error.advice or "mend the cause and start virtfabricd again"
        raise
    if not left:
        return []
    what, amount = measure_residue(step, left)
    return [Residue(step.guest, what, amount, clock.now(), "left by the recovery")]


def _record(audit: AuditLog, transaction: JournalledTransaction, residues: list[Residue]) -> None:
    body = transaction.body
    subjects = [transaction.id, str(body.get("request", ""))]
    subjects += sorted({s.step.guest for s in transaction.steps})
    undone = [str(s.step.inverse()) for s in reversed(transaction.steps) if s.state in TOUCHED]
    audit.append(
        "plan.recovered",
        [s for s in subjects if s],
        {
            "txn": transaction.id, "request": body.get("request"), "title": body.get("title"),
            "why": "the agent was cut off in mid-plan", "undone": undone,
            "residues": [r.to_json() for r in residues],
        },
    )  # fmt: skip
