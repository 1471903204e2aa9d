"""The audit log: an HMAC-chained table in a file of its own, with its key and its head beside it.

Owns the file `audit.db` and `audit.head`. What is signed and how is in `audit_chain`.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from virtfabric.adapters.sqlite.audit_chain import (
    ChainCheck,
    Head,
    RawRecord,
    make_record,
)
from virtfabric.adapters.sqlite.audit_files import HeadFile, create_key, read_key
from virtfabric.adapters.sqlite.database import SQLITE_ERRORS, Database, Schema
from virtfabric.model.errors import ConfigError, InvalidValueError, JournalError
from virtfabric.ports import AuditRecord, ChainVerdict

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from virtfabric.ports import Clock

log = logging.getLogger(__name__)

SCHEMA: Final = Schema(
    what="the audit log",
    application_id=0x76664131,  # "vfA1"
    version=1,
    check="quick_check",  # the log grows for years, and `verify` looks at every record
    moving_away="virtfabric will then begin a new log",
    script="""
CREATE TABLE record (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    subjects TEXT NOT NULL,
    body TEXT NOT NULL,
    mac TEXT NOT NULL
) STRICT;
CREATE TABLE subject (
    subject TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (subject, seq)
) STRICT, WITHOUT ROWID
""",
)

_COLUMNS: Final = "seq, at, kind, subjects, body, mac"
_CHECKPOINT_EVERY: Final = 256


class SqliteAuditLog:
    """Implements `ports.AuditLog`."""

    def __init__(
        self, path: Path, key_path: Path, clock: Clock, export: Callable[[str], None]
    ) -> None:
        """Open the log, or begin one with a new key.

        A log that was tampered with is opened all the same (the agent must be able to run, and
        to write down what it found): a cut tail stays visible as a gap in the numbers, and a
        lost or wrong `audit.head` as an `audit.head-lost` record.

        Args:
            path: the SQLite file; `audit.head` lives beside it.
            key_path: 32 random bytes, mode 0600; created when there is no log yet.
            clock: dates the records.
            export: takes `virtfabric audit head SEQ:MAC` after each record, to the system log;
                must neither block nor raise.

        Raises:
            ConfigError: the key is unsafe, or missing although there are records.
            JournalCorruptError, JournalError
        """
        self._clock = clock
        self._export = export
        self._lock = threading.Lock()
        self._database = Database(path, SCHEMA)
        self._head_file = HeadFile(path.with_suffix(".head"))
        try:
            tail = self._read_tail()
            self._key = self._load_key(key_path, tail)
            self._head = tail
            self._resume(tail)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; safe to repeat."""
        self._head_file.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def head(self) -> str:
        """The newest record as `SEQ:MAC`."""
        with self._lock:
            return str(self._head)

    def append(self, kind: str, subjects: Iterable[str], body: Mapping[str, Any]) -> AuditRecord:
        """Add a record (fsynced) and export the new head to the system log.

        Raises:
            InvalidValueError: `body` is not JSON.
            JournalError: nothing was written.
        """
        with self._lock:
            record = make_record(self._key, self._head, self._clock.now(), kind, subjects, body)
            with self._database.writing() as connection:
                connection.execute(
                    f"INSERT INTO record ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", record
                )
                connection.executemany(
                    "INSERT INTO subject (subject, seq) VALUES (?, ?)",
                    [(name, record.sequence) for name in json.loads(record.subjects)],
                )
            self._head = Head(record.sequence, record.mac)
            self._keep_head()
            exported = str(self._head)
        self._export(f"virtfabric audit head {exported}")
        if record.sequence % _CHECKPOINT_EVERY == 0:
            self._database.checkpoint()
        return record.decoded()

    def read(
        self, *, since: float | None = None, subject: str | None = None, limit: int = 10_000
    ) -> tuple[AuditRecord, ...]:
        """Records in order, of one subject and from a time on if given; the newest `limit`.

        Raises:
            JournalCorruptError: a record cannot be decoded; `verify` says more.
        """
        table, conditions, values = "record", ["at >= ?"], [since if since is not None else 0.0]
        if subject is not None:
            table = "subject JOIN record USING (seq)"
            conditions.append("subject.subject = ?")
            values.append(subject)  # type: ignore[arg-type]
        query = (
            f"SELECT {_COLUMNS} FROM {table} WHERE {' AND '.join(conditions)}"
            " ORDER BY seq DESC LIMIT ?"
        )
        with self._database.reading() as connection:
            rows = connection.execute(query, (*values, limit)).fetchall()
        return tuple(self._decode(RawRecord(*row)) for row in reversed(rows))

    def verify(self, head: str | None = None) -> ChainVerdict:
        """Check every record, and that the chain still contains `head` (exported earlier).

        Raises:
            InvalidValueError: `head` is not of the form SEQ:MAC.
        """
        wanted = [] if head is None else [("the given head", Head.parse(head))]
        with self._database.reading() as connection:
            with self._lock:
                # A WAL snapshot begins with the first read, not with BEGIN.
                connection.execute("SELECT count(*) FROM record WHERE seq < 0").fetchone()
                wanted.append(("the running agent", self._head))
                try:
                    on_file = self._head_file.read()
                except (InvalidValueError, JournalError) as error:
                    return self._verdict(ChainCheck(self._key, wanted), connection, str(error))
            missing = on_file is None and self._head.sequence > 0
            if on_file is not None:
                wanted.append((self._head_file.path.name, on_file))
            problem = f"{self._head_file.path.name} is missing" if missing else ""
            return self._verdict(ChainCheck(self._key, wanted), connection, problem)

    def _verdict(
        self, check: ChainCheck, connection: sqlite3.Connection, head_problem: str
    ) -> ChainVerdict:
        problem = ""
        try:
            records = connection.execute(f"SELECT {_COLUMNS} FROM record ORDER BY seq")
            if all(check.take(RawRecord(*row)) for row in records):
                check.finish()
                problem = _check_index(connection)
        except SQLITE_ERRORS as error:
            problem = f"after record {check.head.sequence} the file is damaged: {error}"
        return ChainVerdict(
            check.records, str(check.head), check.problem or problem or head_problem
        )

    def _decode(self, raw: RawRecord) -> AuditRecord:
        try:
            return raw.decoded()
        except (ValueError, TypeError) as error:
            raise self._database.corrupt(f"table record, row {raw.sequence}: {error}") from error

    def _read_tail(self) -> Head:
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT seq, mac FROM record ORDER BY seq DESC LIMIT 1"
            ).fetchone()
        if row is None:
            return Head()
        try:
            return Head.parse(f"{row[0]}:{row[1]}", field="mac")
        except InvalidValueError as error:
            raise self._database.corrupt(f"table record, row {row[0]}: {error}") from error

    def _load_key(self, key_path: Path, tail: Head) -> bytes:
        if key_path.exists() or key_path.is_symlink():
            return read_key(key_path)
        if tail.sequence > 0:
            raise ConfigError(
                f"audit key {key_path}: is missing, but {self._database.path} has records",
                advice="bring the key back, or move the log away and a new one begins",
            )
        return create_key(key_path)

    def _resume(self, tail: Head) -> None:
        """Go on behind what was there, and write down what is wrong with it."""
        problem = ""
        try:
            on_file = self._head_file.read()
        except InvalidValueError as error:
            on_file, problem = None, str(error)
        if on_file is None:
            if tail.sequence > 0:
                problem = problem or f"{self._head_file.path.name} is missing"
        elif on_file.sequence > tail.sequence:
            # Cut off. The numbers go on behind the lost records, so that the gap stays.
            log.error("the audit log was cut off after record %d", tail.sequence)
            self._head = on_file
        elif not self._contains(on_file):
            problem = f"record {on_file.sequence} is not the one that {self._head_file.path} has"
        if problem:
            log.error("audit log: %s", problem)
            self.append("audit.head-lost", (), {"problem": problem})
        self._keep_head()

    def _contains(self, head: Head) -> bool:
        if head.sequence == 0:
            return True
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT mac FROM record WHERE seq = ?", (head.sequence,)
            ).fetchone()
        return row is not None and row[0] == head.mac

    def _keep_head(self) -> None:
        try:
            self._head_file.write(self._head)
        except JournalError as error:
            # The record is safe and its head goes to the system log; failing the caller now
            # would tell him that nothing was written.
            log.warning("%s", error)


def _check_index(connection: sqlite3.Connection) -> str:
    """Whether the index by subject is what the (checked) records say: `explain` reads by it."""
    expected = 0
    find = "SELECT 1 FROM subject WHERE subject = ? AND seq = ?"
    for sequence, subjects in connection.execute("SELECT seq, subjects FROM record"):
        for name in json.loads(subjects):
            expected += 1
            if connection.execute(find, (name, sequence)).fetchone() is None:
                return f"the index by subject has lost record {sequence} of {name!r}"
    (found,) = connection.execute("SELECT count(*) FROM subject").fetchone()
    return (
        "" if found == expected else f"the index by subject has {found - expected} forged entries"
    )
