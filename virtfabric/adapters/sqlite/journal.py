"""The journal in one SQLite file: transactions, their steps, and the books they lead to.

Each call is one SQLite transaction with one fsync (WAL, synchronous=FULL). What cannot be read
back exactly as it was written is refused on open, never guessed at.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.sqlite.books import (
    BOOKS_SCRIPT,
    UPGRADES,
    encode_books,
    read_books,
    write_rows,
)
from virtfabric.adapters.sqlite.database import Database, Schema, seal
from virtfabric.model.errors import InvalidValueError, JournalError
from virtfabric.model.ids import TransactionId
from virtfabric.model.plan import parse_step
from virtfabric.ports import (
    JournalledStep,
    JournalledTransaction,
    StepState,
    TransactionState,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from virtfabric.adapters.sqlite.books import Rows
    from virtfabric.model.ledger import Books
    from virtfabric.model.step import Step

log = logging.getLogger(__name__)

KEEP_ENDED: Final = 10_000
_MAINTENANCE_EVERY: Final = 64
"""Ended transactions between two rounds of pruning and checkpointing."""

SCHEMA: Final = Schema(
    what="the journal",
    application_id=0x76664A31,  # "vfJ1"
    version=4,
    moving_away="virtfabric will then find running guests and start with empty books",
    script="""
CREATE TABLE txn (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    steps INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL,
    seal TEXT NOT NULL,
    outcome TEXT,
    outcome_seal TEXT
) STRICT;
CREATE TABLE step (
    txn INTEGER NOT NULL REFERENCES txn (seq) ON DELETE CASCADE,
    idx INTEGER NOT NULL,
    state TEXT NOT NULL,
    body TEXT NOT NULL,
    seal TEXT NOT NULL,
    PRIMARY KEY (txn, idx)
) STRICT, WITHOUT ROWID;
"""
    + BOOKS_SCRIPT,
    upgrades=UPGRADES,
)

_SELECT: Final = (
    "SELECT seq, id, state, created, steps, body, seal, outcome, outcome_seal FROM txn "
)


class SqliteJournal:
    """Implements `ports.Journal`."""

    def __init__(self, path: Path, *, keep: int = KEEP_ENDED) -> None:
        """Open (or create) and check everything a start depends on.

        Args:
            path: the file; its directory exists.
            keep: how many ended transactions stay, about.

        Raises:
            JournalCorruptError: names file, table and row, and says what to do.
            JournalError: cannot be opened or written.
        """
        self._database = Database(path, SCHEMA)
        self._keep = keep
        self._ended = 0
        self._rows: Rows = {}  # as stored; changes together with a commit, under _books_lock
        self._books_lock = threading.Lock()
        try:
            self.open_transactions()
            with self._database.reading() as connection:
                _, self._rows = read_books(connection, self._database)
        except BaseException:
            self._database.close()
            raise

    def shut(self) -> None:
        """Close the file (`close` ends a transaction); safe to repeat."""
        self._database.close()

    def begin(self, txn: TransactionId, body: Mapping[str, Any], at: float) -> None:
        """Open a transaction.

        Raises:
            InvalidValueError: the id was used before, or `body` is not JSON.
            JournalError
        """
        text = _encode("body", body)
        with self._database.writing() as connection:
            if connection.execute("SELECT 1 FROM txn WHERE id = ?", (txn,)).fetchone():
                raise InvalidValueError("transaction", txn, "is in the journal already")
            connection.execute(
                "INSERT INTO txn (id, state, created, body, seal) VALUES (?, ?, ?, ?, ?)",
                (txn, TransactionState.OPEN.value, float(at), text, seal(txn, float(at), text)),
            )

    def extend(self, txn: TransactionId, steps: Sequence[Step]) -> int:
        """Append steps as PLANNED; returns the index of the first.

        Raises:
            InvalidValueError: no open transaction of this id.
            JournalError
        """
        bodies = [_encode("step", step.to_json()) for step in steps]
        with self._database.writing() as connection:
            seq, first = _open_row(connection, txn)
            connection.executemany(
                "INSERT INTO step (txn, idx, state, body, seal) VALUES (?, ?, ?, ?, ?)",
                [
                    (seq, n, StepState.PLANNED.value, body, seal(txn, n, body))
                    for n, body in enumerate(bodies, first)
                ],
            )
            connection.execute("UPDATE txn SET steps = ? WHERE seq = ?", (first + len(bodies), seq))
        return first

    def mark(self, txn: TransactionId, index: int, state: StepState) -> None:
        """Move one step on.

        Raises:
            InvalidValueError: no such step in an open transaction.
            JournalError
        """
        with self._database.writing() as connection:
            changed = connection.execute(
                "UPDATE step SET state = ? WHERE idx = ? AND txn ="
                " (SELECT seq FROM txn WHERE id = ? AND state = 'open')",
                (state.value, index, txn),
            ).rowcount
            if changed != 1:
                raise InvalidValueError("step", f"{txn}/{index}", "is not in an open transaction")

    def close(
        self,
        txn: TransactionId,
        state: TransactionState,
        outcome: Mapping[str, Any],
        books: Books | None,
    ) -> None:
        """End a transaction and, in the same fsync, store the books it leads to.

        Raises:
            InvalidValueError: no open transaction of this id, or `state` is OPEN.
            JournalError
        """
        if state is TransactionState.OPEN:
            raise InvalidValueError("state", state.value, "does not end a transaction")
        text = _encode("outcome", outcome)
        with self._books_lock:
            self._end(txn, state, text, books)
        self._maintain()

    def _end(
        self, txn: TransactionId, state: TransactionState, text: str, books: Books | None
    ) -> None:
        with self._database.writing() as connection:
            seq, _ = _open_row(connection, txn)
            connection.execute(
                "UPDATE txn SET state = ?, outcome = ?, outcome_seal = ? WHERE seq = ?",
                (state.value, text, seal(txn, state.value, text), seq),
            )
            rows = self._write_books(connection, books)
        self._rows = rows

    def open_transactions(self) -> tuple[JournalledTransaction, ...]:
        """What a crash left open, oldest first.

        Raises:
            JournalCorruptError
        """
        with self._database.reading() as connection:
            found = connection.execute(_SELECT + "WHERE state = 'open' ORDER BY seq").fetchall()
            strange = connection.execute(
                "SELECT id, state FROM txn WHERE state NOT IN (?, ?, ?, ?) LIMIT 1",
                [s.value for s in TransactionState],
            ).fetchone()
            if strange is not None:
                raise self._database.corrupt(f"table txn, row {strange[0]!r}: state {strange[1]!r}")
            return tuple(self._decode(connection, row) for row in found)

    def transaction(self, txn: TransactionId) -> JournalledTransaction | None:
        """One transaction, open or ended; None when unknown or pruned long ago."""
        with self._database.reading() as connection:
            row = connection.execute(_SELECT + "WHERE id = ?", (txn,)).fetchone()
            return None if row is None else self._decode(connection, row)

    def store_books(self, books: Books) -> None:
        """Store the books outside a transaction (a guest stopped, a lease was edited)."""
        with self._books_lock:
            with self._database.writing() as connection:
                rows = self._write_books(connection, books)
            self._rows = rows

    def load_books(self) -> Books:
        """The books as last stored.

        Raises:
            JournalCorruptError
        """
        with self._database.reading() as connection:
            return read_books(connection, self._database)[0]

    def _write_books(self, connection: sqlite3.Connection, books: Books | None) -> Rows:
        if books is None:
            return self._rows
        rows = encode_books(books, self._rows)
        write_rows(connection, books.generation, rows, self._rows)
        return rows

    def _maintain(self) -> None:
        """Prune and checkpoint now and then; failing costs nothing but space, so it only logs."""
        self._ended += 1
        if self._ended % _MAINTENANCE_EVERY:
            return
        try:
            with self._database.writing() as connection:
                connection.execute(
                    "DELETE FROM txn WHERE state <> 'open'"
                    " AND seq <= (SELECT max(seq) FROM txn) - ?",
                    (self._keep,),
                )
        except JournalError as error:
            log.warning("old transactions stay in the journal for now: %s", error)
        self._database.checkpoint()

    def _decode(
        self, connection: sqlite3.Connection, row: tuple[Any, ...]
    ) -> JournalledTransaction:
        seq, txn, state, created, count, body, found, outcome, outcome_seal = row
        where = f"table txn, row {txn!r}"
        if seal(txn, created, body) != found:
            raise self._database.corrupt(f"{where}: the content does not match its checksum")
        if outcome is not None and seal(txn, state, outcome) != outcome_seal:
            raise self._database.corrupt(f"{where}: the outcome does not match its checksum")
        steps = tuple(
            self._decode_step(txn, *found)
            for found in connection.execute(
                "SELECT idx, state, body, seal FROM step WHERE txn = ? ORDER BY idx", (seq,)
            )
        )
        if [s.index for s in steps] != list(range(count)):
            raise self._database.corrupt(
                f"table step, rows of {txn!r}: {len(steps)} of {count} steps are there"
            )
        try:
            return JournalledTransaction(
                TransactionId(txn), TransactionState(state), created, json.loads(body), steps,
                None if outcome is None else json.loads(outcome),
            )  # fmt: skip
        except ValueError as error:
            raise self._database.corrupt(f"{where}: cannot be read: {error}") from error

    def _decode_step(
        self, txn: str, index: int, state: str, body: str, found: str
    ) -> JournalledStep:
        where = f"table step, row {txn!r}/{index}"
        if seal(txn, index, body) != found:
            raise self._database.corrupt(f"{where}: the content does not match its checksum")
        try:
            return JournalledStep(index, parse_step(json.loads(body)), StepState(state))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._database.corrupt(f"{where}: cannot be read: {error}") from error


def _encode(field: str, value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidValueError(field, value, f"is not JSON: {error}") from None


def _open_row(connection: sqlite3.Connection, txn: TransactionId) -> tuple[int, int]:
    row = connection.execute(
        "SELECT seq, steps FROM txn WHERE id = ? AND state = 'open'", (txn,)
    ).fetchone()
    if row is None:
        raise InvalidValueError("transaction", txn, "is not open in the journal")
    return int(row[0]), int(row[1])
