"""The books as rows: one table for each kind, one row for each entry.

Owns their encoding. Only rows that changed are written; a header row keeps the generation and a
digest of all rows, so that a lost row shows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from virtfabric.adapters.sqlite.database import seal
from virtfabric.model.card import HeldSlice
from virtfabric.model.device import Quarantine
from virtfabric.model.ledger import Books, Grant, Holding, Loan, Residue
from virtfabric.model.memoryquarantine import MemoryQuarantine

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping

    from virtfabric.adapters.sqlite.database import Database

TABLES: Final = ("holding", "grant_", "loan", "residue", "quarantine", "memory_quarantine", "slice")


def _create(table: str) -> str:
    return (
        f"CREATE TABLE {table} (key TEXT PRIMARY KEY, body TEXT NOT NULL, seal TEXT NOT NULL)"
        " STRICT, WITHOUT ROWID"
    )


BOOKS_SCRIPT: Final = (
    ";".join(_create(table) for table in TABLES)
    + ";CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal TEXT NOT NULL)"
    " STRICT, WITHOUT ROWID"
)
UPGRADES: Final = {
    1: _create("quarantine"), 2: _create("memory_quarantine"), 3: _create("slice"),
}  # fmt: skip
"""A table without rows leaves the digest in the header as it was."""


class _Jsonable(Protocol):
    def to_json(self) -> dict[str, Any]: ...


class Row(NamedTuple):
    """One row, with the value it was made from."""

    value: _Jsonable
    body: str
    seal: str


Rows = dict[str, dict[str, Row]]
"""By table and key."""


def _rows_of(
    table: str, values: Mapping[Any, _Jsonable], known: Mapping[str, Row]
) -> dict[str, Row]:
    rows = {}
    for key, value in values.items():
        row = known.get(key)
        # Frozen values that are still the same object need no second encoding: with 1,000 guests
        # and two changed ones this is most of the work.
        if row is None or row.value is not value:
            body = json.dumps(value.to_json(), sort_keys=True, separators=(",", ":"))
            row = Row(value, body, seal(table, key, body))
        rows[str(key)] = row
    return rows


def _header(generation: int, rows: Rows) -> str:
    digest = seal(*(row.seal for table in TABLES for _, row in sorted(rows[table].items())))
    return json.dumps({"generation": generation, "rows": digest}, sort_keys=True)


def encode_books(books: Books, known: Rows) -> Rows:
    """All rows of these books; `known` are those of the books stored last."""
    by_table: dict[str, Mapping[Any, _Jsonable]] = {
        "holding": books.holdings,
        "grant_": books.grants,
        "loan": books.loans,
        "residue": {f"{n:06}": r for n, r in enumerate(books.residues)},
        "quarantine": books.quarantine,
        "memory_quarantine": books.memory_quarantine,
        "slice": books.slices,
    }
    return {t: _rows_of(t, values, known.get(t, {})) for t, values in by_table.items()}


def write_rows(connection: sqlite3.Connection, generation: int, rows: Rows, known: Rows) -> None:
    """Write what differs from `known`, within the caller's transaction."""
    for table in TABLES:
        old, new = known.get(table, {}), rows[table]
        connection.executemany(
            f"DELETE FROM {table} WHERE key = ?", [(key,) for key in old.keys() - new.keys()]
        )
        connection.executemany(
            f"INSERT OR REPLACE INTO {table} (key, body, seal) VALUES (?, ?, ?)",
            [
                (key, row.body, row.seal)
                for key, row in new.items()
                if key not in old or old[key].seal != row.seal
            ],
        )
    header = _header(generation, rows)
    connection.execute(
        "INSERT OR REPLACE INTO meta (key, value, seal) VALUES ('books', ?, ?)",
        (header, seal("meta", "books", header)),
    )


def read_books(connection: sqlite3.Connection, database: Database) -> tuple[Books, Rows]:
    """The books and their rows.

    Raises:
        JournalCorruptError: names table and row.
    """
    rows: Rows = {}
    kinds: dict[str, Callable[[Mapping[str, Any]], _Jsonable]] = {
        "holding": Holding.from_json, "grant_": Grant.from_json, "loan": Loan.from_json,
        "residue": Residue.from_json, "quarantine": Quarantine.from_json,
        "memory_quarantine": MemoryQuarantine.from_json, "slice": HeldSlice.from_json,
    }  # fmt: skip
    for table, decode in kinds.items():
        rows[table] = {
            key: _decode(database, table, key, body, found, decode)
            for key, body, found in connection.execute(
                f"SELECT key, body, seal FROM {table} ORDER BY key"
            )
        }
    generation = _read_header(connection, database, rows)
    holdings, grants, loans, residues, quarantine, memory, slices = (
        [r.value for r in rows[t].values()] for t in TABLES
    )
    return Books(
        generation=generation,
        holdings={h.guest: h for h in holdings if isinstance(h, Holding)},
        grants={g.id: g for g in grants if isinstance(g, Grant)},
        loans={x.id: x for x in loans if isinstance(x, Loan)},
        residues=tuple(r for r in residues if isinstance(r, Residue)),
        quarantine={q.address: q for q in quarantine if isinstance(q, Quarantine)},
        memory_quarantine={m.subject: m for m in memory if isinstance(m, MemoryQuarantine)},
        slices={s.key: s for s in slices if isinstance(s, HeldSlice)},
    ), rows


def _decode(
    database: Database,
    table: str,
    key: str,
    body: str,
    found: str,
    decode: Callable[[Mapping[str, Any]], _Jsonable],
) -> Row:
    where = f"table {table}, row {key!r}"
    if seal(table, key, body) != found:
        raise database.corrupt(f"{where}: the content does not match its checksum")
    try:
        return Row(decode(json.loads(body)), body, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise database.corrupt(f"{where}: cannot be read: {error!r}") from error


def _read_header(connection: sqlite3.Connection, database: Database, rows: Rows) -> int:
    where = "table meta, row 'books'"
    found = connection.execute("SELECT value, seal FROM meta WHERE key = 'books'").fetchone()
    if found is None:
        if any(rows.values()):
            raise database.corrupt(f"{where}: is missing")
        return 0
    value, sealed = found
    try:
        generation = int(json.loads(value)["generation"])
    except (ValueError, KeyError, TypeError) as error:
        raise database.corrupt(f"{where}: cannot be read: {error!r}") from error
    if seal("meta", "books", value) != sealed:
        raise database.corrupt(f"{where}: the content does not match its checksum")
    if _header(generation, rows) != value:
        raise database.corrupt(f"{where}: rows of {', '.join(TABLES)} are missing")
    return generation
