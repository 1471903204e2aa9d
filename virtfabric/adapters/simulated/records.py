"""Journal and audit log in memory; they end with the process."""

from __future__ import annotations

import json
import secrets
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from virtfabric.adapters.sqlite.audit_chain import ChainCheck, Head, RawRecord, make_record
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ledger import Books
from virtfabric.model.plan import parse_step
from virtfabric.ports import (
    AuditRecord,
    ChainVerdict,
    JournalledStep,
    JournalledTransaction,
    StepState,
    TransactionState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from virtfabric.model.errors import JournalError
    from virtfabric.model.ids import TransactionId
    from virtfabric.model.step import Step
    from virtfabric.ports import Clock


class MemoryJournal:
    """Implements `ports.Journal`. Set `failure` and every write raises it: a full disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transactions: dict[TransactionId, JournalledTransaction] = {}
        self._books = Books()
        self.failure: JournalError | None = None

    def begin(self, txn: TransactionId, body: Mapping[str, Any], at: float) -> None:
        """Open a transaction."""
        plain = _plain("body", body)
        with self._lock:
            self._writable()
            if txn in self._transactions:
                raise InvalidValueError("transaction", txn, "is in the journal already")
            self._transactions[txn] = JournalledTransaction(
                txn, TransactionState.OPEN, at, plain, ()
            )

    def extend(self, txn: TransactionId, steps: Sequence[Step]) -> int:
        """Append steps as PLANNED; returns the index of the first."""
        # Through the encoding and back, so that a step that cannot be stored fails here as well.
        decoded = [parse_step(_plain("step", step.to_json())) for step in steps]
        with self._lock:
            self._writable()
            found = self._open(txn)
            first = len(found.steps)
            new = (JournalledStep(n, s, StepState.PLANNED) for n, s in enumerate(decoded, first))
            self._transactions[txn] = replace(found, steps=(*found.steps, *new))
            return first

    def mark(self, txn: TransactionId, index: int, state: StepState) -> None:
        """Move one step on."""
        with self._lock:
            self._writable()
            found = self._transactions.get(txn)
            is_open = found is not None and found.state is TransactionState.OPEN
            if found is None or not is_open or not 0 <= index < len(found.steps):
                raise InvalidValueError("step", f"{txn}/{index}", "is not in an open transaction")
            steps = list(found.steps)
            steps[index] = replace(steps[index], state=state)
            self._transactions[txn] = replace(found, steps=tuple(steps))

    def close(
        self,
        txn: TransactionId,
        state: TransactionState,
        outcome: Mapping[str, Any],
        books: Books | None,
    ) -> None:
        """End a transaction and store the books it leads to."""
        if state is TransactionState.OPEN:
            raise InvalidValueError("state", state.value, "does not end a transaction")
        plain = _plain("outcome", outcome)
        with self._lock:
            self._writable()
            found = self._open(txn)
            self._transactions[txn] = replace(found, state=state, outcome=plain)
            if books is not None:
                self._books = _copied(books)

    def open_transactions(self) -> tuple[JournalledTransaction, ...]:
        """What is open, oldest first."""
        with self._lock:
            return tuple(t for t in self._transactions.values() if t.state is TransactionState.OPEN)

    def transaction(self, txn: TransactionId) -> JournalledTransaction | None:
        """One transaction, open or ended."""
        with self._lock:
            return self._transactions.get(txn)

    def store_books(self, books: Books) -> None:
        """Store the books outside a transaction."""
        with self._lock:
            self._writable()
            self._books = _copied(books)

    def load_books(self) -> Books:
        """The books as last stored."""
        with self._lock:
            return _copied(self._books)

    def shut(self) -> None:
        """Nothing to close."""

    def _writable(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _open(self, txn: TransactionId) -> JournalledTransaction:
        found = self._transactions.get(txn)
        if found is None or found.state is not TransactionState.OPEN:
            raise InvalidValueError("transaction", txn, "is not open in the journal")
        return found


class MemoryAudit:
    """Implements `ports.AuditLog`, with the real chain over a list."""

    def __init__(self, clock: Clock, export: Callable[[str], None] = lambda _text: None) -> None:
        self._clock = clock
        self._export = export
        self._lock = threading.Lock()
        self._key = secrets.token_bytes(32)
        self._records: list[RawRecord] = []
        self.failure: JournalError | None = None

    @property
    def head(self) -> str:
        """The newest record as `SEQ:MAC`."""
        with self._lock:
            return str(self._head())

    def append(self, kind: str, subjects: Iterable[str], body: Mapping[str, Any]) -> AuditRecord:
        """Add a record."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            now = self._clock.now()
            record = make_record(self._key, self._head(), now, kind, subjects, body)
            self._records.append(record)
        self._export(f"virtfabric audit head {record.sequence}:{record.mac}")
        return record.decoded()

    def read(
        self, *, since: float | None = None, subject: str | None = None, limit: int = 10_000
    ) -> tuple[AuditRecord, ...]:
        """Records in order, the newest `limit`."""
        with self._lock:
            records = [raw.decoded() for raw in self._records]
        chosen = [
            r
            for r in records
            if (since is None or r.at >= since) and (subject is None or subject in r.subjects)
        ]
        return tuple(chosen[max(0, len(chosen) - limit) :])

    def verify(self, head: str | None = None) -> ChainVerdict:
        """Check every record, and that the chain contains `head`."""
        wanted = [] if head is None else [("the given head", Head.parse(head))]
        check = ChainCheck(self._key, wanted)
        with self._lock:
            if all(check.take(raw) for raw in self._records):
                check.finish()
        return ChainVerdict(check.records, str(check.head), check.problem)

    def close(self) -> None:
        """Nothing to close."""

    def _head(self) -> Head:
        if not self._records:
            return Head()
        return Head(self._records[-1].sequence, self._records[-1].mac)


def _plain(field: str, value: object) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InvalidValueError(field, value, f"is not JSON: {error}") from None


def _copied(books: Books) -> Books:
    """The books are frozen, their dictionaries are not."""
    return replace(
        books, holdings=dict(books.holdings), grants=dict(books.grants), loans=dict(books.loans)
    )
