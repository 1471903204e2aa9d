"""One SQLite file: how it is created, opened, locked, and how its errors are told.

Owns connection settings and error translation; knows no table. A new file is built under another
name and moved into place whole, so an empty or half-made file is never mistaken for a new one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from virtfabric.model.errors import JournalCorruptError, JournalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_BUSY_TIMEOUT_S: Final = 5.0
_CORRUPT: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        # Our statements are fixed, so these can only come from tables or rows that others made.
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
    }
)
SQLITE_ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
"""What the sqlite3 module raises. The second comes of a damaged name in SQLite's own message."""
_PRIMARY_CODE: Final = 0xFF
"""The low byte of an extended result code. Source: https://www.sqlite.org/rescode.html."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What a file should be.

    Attributes:
        what: the file as people know it, for messages ("the journal").
        application_id: SQLite header field that says whose file it is.
        version: of the tables; a file of a higher version is refused.
        script: creates the tables of this version.
        check: SQLite's pragma for the check on open; `quick_check` leaves indexes out.
        upgrades: by version, what makes the next one of it; earlier versions are refused.
        moving_away: what happens when the file is moved away, for the advice.
    """

    what: str
    application_id: int
    version: int
    script: str
    moving_away: str
    check: str = "integrity_check"
    upgrades: Mapping[int, str] = field(default_factory=dict)


def seal(*parts: object) -> str:
    """A digest of a row's content: SQLite has no checksums, so a flipped bit would pass for data.

    It guards against accidents, not against people; the audit log has its HMAC for those.
    """
    text = "\x1f".join(str(part) for part in parts)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Database:
    """A file with one writing connection, shared by threads under a lock."""

    def __init__(self, path: Path, schema: Schema) -> None:
        """Open the file, or create it when there is none.

        Raises:
            JournalCorruptError: not what `schema` says, damaged, or of a newer version.
            JournalError: cannot be opened or written.
        """
        self.path = path
        self.schema = schema
        self._lock = threading.RLock()
        try:
            if not path.exists():
                self._create()
            elif path.stat().st_size == 0:
                raise self.corrupt("the file is empty")
            self._connection = self._connect(path)
        except OSError as error:
            raise JournalError(f"{schema.what} {path}: {error.strerror}") from error
        except SQLITE_ERRORS as error:
            raise self.translated(error) from error
        try:
            self._check()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file (a checkpoint folds the WAL into it); safe to repeat."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction: committed and fsynced at the end, or nothing of it happened."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except SQLITE_ERRORS as error:
                raise self.translated(error) from error
            finally:
                # SQLite rolls some failures back by itself (SQLITE_FULL), others not; here is
                # also where an exception of the caller's own ends up.
                self._roll_back()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A consistent view, on a connection of its own: it never waits for a writer."""
        try:
            # Not mode=ro: the first reader may have to recover the WAL's index.
            with closing(self._connect(self.path)) as connection:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("BEGIN")
                yield connection
        except SQLITE_ERRORS as error:
            raise self.translated(error) from error

    def checkpoint(self) -> bool:
        """Fold the WAL into the file. False when it could not (disk full, a reader): try later."""
        with self._lock:
            try:
                row = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except SQLITE_ERRORS:
                return False
            return row is not None and row[0] == 0

    def corrupt(self, problem: str) -> JournalCorruptError:
        """The error for content that is not what this agent wrote."""
        return JournalCorruptError(
            f"{self.schema.what} {self.path} is damaged: {problem}",
            advice=self._moving_advice(),
        )

    def translated(self, error: Exception) -> JournalError:
        """SQLite's error as ours."""
        if isinstance(error, UnicodeDecodeError):
            return self.corrupt("a name in it cannot be read")
        code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE
        if code in _CORRUPT:
            return self.corrupt(str(error))
        if code == sqlite3.SQLITE_FULL:
            advice = f"free some space on the file system of {self.path.parent}"
        elif code == sqlite3.SQLITE_IOERR:
            advice = "the disk or its file system fails or is full: see dmesg and df"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            advice = f"another process holds the file: see `fuser {self.path}`"
        else:
            advice = f"check owner and mode of {self.path}"
        return JournalError(f"{self.schema.what} {self.path}: {error}", advice=advice)

    def _moving_advice(self) -> str:
        names = " ".join(self.path.name + suffix for suffix in ("", "-wal", "-shm"))
        return (
            f"move it away (all of {names} in {self.path.parent}, keep them for a look): "
            f"{self.schema.moving_away}"
        )

    def _roll_back(self) -> None:
        with suppress(*SQLITE_ERRORS):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _connect(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=rw",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            # Above SQLite's 1000 pages: we checkpoint ourselves at a quiet moment, and this
            # catches what that misses.
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self) -> None:
        left_over = self.path.with_name(self.path.name + "-wal")
        if left_over.exists():
            # SQLite would replay this log of another file into the new one.
            raise self.corrupt(f"{left_over.name} is there without its {self.path.name}")
        new = self.path.with_name(self.path.name + ".new")
        for suffix in ("", "-wal", "-shm", "-journal"):
            new.with_name(new.name + suffix).unlink(missing_ok=True)
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with closing(self._connect(new)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"BEGIN; {self.schema.script}; "
                f"PRAGMA application_id = {self.schema.application_id}; "
                f"PRAGMA user_version = {self.schema.version}; COMMIT;"
            )
        new.rename(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _upgrade(self, version: int) -> None:
        """Bring a sound file of an earlier version to this one; each step happens or does not."""
        for old in range(version, self.schema.version):
            with self.writing() as connection:
                connection.execute(self.schema.upgrades[old])
                connection.execute(f"PRAGMA user_version = {old + 1}")

    def _check(self) -> None:
        try:
            (owner,) = self._connection.execute("PRAGMA application_id").fetchone()
            if owner != self.schema.application_id:
                raise self.corrupt("it is the file of another program")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > self.schema.version:
                raise JournalCorruptError(
                    f"{self.schema.what} {self.path} was written by a newer virtfabric "
                    f"(schema {version}, this one knows {self.schema.version})",
                    advice="upgrade virtfabric again, or " + self._moving_advice(),
                )
            if version != self.schema.version and version not in self.schema.upgrades:
                raise self.corrupt(f"schema {version} was never released")
            problems = [
                row[0] for row in self._connection.execute(f"PRAGMA {self.schema.check}(5)")
            ]
            if problems != ["ok"]:
                raise self.corrupt("; ".join(str(p).replace("\n", " ") for p in problems))
            (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
            self._upgrade(version)
        except SQLITE_ERRORS as error:
            raise self.translated(error) from error
        if mode != "wal":
            raise JournalError(
                f"{self.schema.what} {self.path}: write-ahead logging cannot be had",
                advice="the state directory needs a local file system (no NFS)",
            )
