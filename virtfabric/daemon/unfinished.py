"""Transactions whose undo could not be finished: libvirt was away, or the disk full.

Their guests stay reserved and their journal entries open until a later try succeeds; the next
start of the agent would do the same. It undoes, it decides nothing.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.recovery import books_after, undo_transaction
from virtfabric.model.devicesteps import AttachFunction
from virtfabric.model.errors import VirtfabricError
from virtfabric.ports import TransactionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.model.ids import TransactionId
    from virtfabric.ports import AuditLog, Clock, Handlers, Journal, JournalledTransaction

log = logging.getLogger(__name__)


class Unfinished:
    """Keeps them and tries again. Thread-safe."""

    def __init__(
        self, *, ledger: Ledger, journal: Journal, audit: AuditLog, handlers: Handlers, clock: Clock
    ) -> None:
        self._ledger = ledger
        self._journal = journal
        self._audit = audit
        self._handlers = handlers
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: set[TransactionId] = set()
        self._moved: Callable[[], None] = lambda: None

    def tell_moves(self, moved: Callable[[], None]) -> None:
        """Whom to tell when functions may have become free, or doubtful; it must not block."""
        self._moved = moved

    def __contains__(self, txn: object) -> bool:
        return txn in self._waiting

    def add(self, txn: TransactionId) -> None:
        """Its undo has to be tried again."""
        self._waiting.add(txn)

    def finish(self) -> None:
        """Try all again, newest first; what fails again stays. Cheap when there is nothing."""
        if not self._waiting:
            return
        with self._lock:
            try:
                for transaction in reversed(self._journal.open_transactions()):
                    if transaction.id in self._waiting:
                        self._finish_one(transaction)
            except VirtfabricError as error:
                log.warning("an undo still cannot be finished: %s", error)

    def _finish_one(self, transaction: JournalledTransaction) -> None:
        left = undo_transaction(transaction, self._handlers)
        touched = {one.step.guest for one in left}
        now = self._clock.now()
        outcome = {"state": "undone", "why": "undone at a later try"}
        self._ledger.commit(
            transaction.id,
            lambda books: books_after(books, left, now, "left by an undo"),
            lambda books: self._journal.close(
                transaction.id, TransactionState.UNDONE, outcome, books
            ),
        )  # fmt: skip
        self._waiting.discard(transaction.id)
        body: dict[str, Any] = {
            "title": transaction.body.get("title"), "txn": transaction.id,
            "request": transaction.body.get("request"),
            "why": "its first undo could not be finished", "not_undone": [],
        }  # fmt: skip
        subjects = [transaction.id, str(transaction.body.get("request", "")), *sorted(touched)]
        self._audit.append("plan.undone", [s for s in subjects if s], body)
        log.info("transaction %s is undone now", transaction.id)
        if any(isinstance(one.step, AttachFunction) for one in left):
            self._moved()
