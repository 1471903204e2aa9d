"""The journal file when something goes wrong: corruption, full disks, SIGKILL."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.adapters.sqlite.database import seal
from virtfabric.adapters.sqlite.journal import SqliteJournal
from virtfabric.model.adapter import AdapterId, SliceId, SliceSpec
from virtfabric.model.amounts import Amounts
from virtfabric.model.card import HeldSlice
from virtfabric.model.device import HeldFunction, PciAddress, Quarantine
from virtfabric.model.errors import JournalCorruptError, JournalError
from virtfabric.model.hugepages import HeldPages
from virtfabric.model.ids import GrantId, GuestId, RequestId, TransactionId
from virtfabric.model.ledger import Books, Grant, Holding
from virtfabric.model.memoryquarantine import MemoryFault, MemoryQuarantine
from virtfabric.model.plan import PinVcpu, SetQuota
from virtfabric.model.units import CpuSet
from virtfabric.ports import StepState, TransactionState

ROOT = Path(__file__).resolve().parents[3]
GUEST = GuestId("00000000-0000-4000-8000-000000000010")
TXN = TransactionId("open-one")
VF = PciAddress("0000:3b:10.0")
SCHEMA_1 = ROOT / "tests/data/journals/schema-1.db"
"""As the version before PCIe functions wrote it: one ended and one open transaction, books."""
STEPS = [
    PinVcpu(guest=GUEST, vcpu=0, before=CpuSet(), after=CpuSet([3])),
    SetQuota(guest=GUEST, before=-1, after=1500),
]
BOOKS = Books(
    3,
    {GUEST: Holding(GUEST, Amounts.of(cpu=2000), pages=(HeldPages(0, 2 << 20, 30, 12),))},
    {GrantId("g"): Grant(GrantId("g"), GUEST, Amounts.of(cpu=1000), RequestId("r"), 1.0)},
    quarantine={VF: Quarantine(VF, "reset failed", "power cycle", 1.0)},
    memory_quarantine={
        "0x100": MemoryQuarantine(
            "0x100", MemoryFault.POISON, "poisoned", 1.0, "CXL region of 0x100", (1,)
        ),
        "node2": MemoryQuarantine(
            "node2", MemoryFault.BROKEN_PAGES, "3 pages", 1.0, nodes=(2,), pages=3, lifted=True
        ),
    },
    slices={
        "h/r/0": HeldSlice(
            "h/r/0",
            AdapterId("C-1"),
            SliceId("slice-1"),
            "r.0",
            SliceSpec(cores=1, name="x"),
            GUEST,
        )
    },
)


def write(path: Path) -> None:
    journal = SqliteJournal(path)
    for n in range(20):
        txn = TransactionId(f"ended-{n}")
        journal.begin(txn, {"n": n}, 1.0)
        journal.extend(txn, STEPS)
        journal.close(txn, TransactionState.COMMITTED, {}, BOOKS)
    journal.begin(TXN, {"request": "x"}, 2.0)
    journal.extend(TXN, STEPS)
    journal.mark(TXN, 0, StepState.APPLIED)
    journal.shut()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    write(path)
    return path


@pytest.fixture
def path(pristine, tmp_path):
    return Path(shutil.copy(pristine, tmp_path / "journal.db"))


def content(path: Path):
    journal = SqliteJournal(path)
    try:
        return journal.open_transactions(), journal.load_books()
    finally:
        journal.shut()


def check_refused_or_same(path: Path, pristine: Path) -> None:
    told = ""
    try:
        found = content(path)
    except JournalError as error:
        told = str(error)
    assert str(path) in told or found == content(pristine)


def edit(path: Path, *statements: tuple[str, tuple]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement, values in statements:
            connection.execute(statement, values)


def test_it_is_private_and_comes_back(path, tmp_path):
    transactions, books = content(path)
    assert [s.state for s in transactions[0].steps] == [StepState.APPLIED, StepState.PLANNED]
    assert books == BOOKS
    write(tmp_path / "new.db")
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.new*"))


def test_commits_are_durable(path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal = SqliteJournal(path)
    with journal._database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    journal.shut()
    journal.shut()
    with pytest.raises(JournalError):
        journal.store_books(BOOKS)


@settings(max_examples=examples(120), deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), length=st.integers(1, 3))
def test_flipped_bytes_are_found_or_harmless(pristine, tmp_path_factory, where, bit, length):
    path = tmp_path_factory.mktemp("flip") / "journal.db"
    data = bytearray(pristine.read_bytes())
    offset = int(where * len(data))
    for n in range(offset, min(offset + length, len(data))):
        data[n] ^= 1 << bit
    path.write_bytes(data)
    check_refused_or_same(path, pristine)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9])
def test_truncated_file_is_refused(path, share):
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(JournalCorruptError, match=r"journal.db") as caught:
        SqliteJournal(path)
    assert "move it away" in caught.value.advice
    assert "empty books" in caught.value.advice


def test_lost_end_of_the_last_page_is_found_or_harmless(path, pristine):
    os.truncate(path, path.stat().st_size - 40)
    check_refused_or_same(path, pristine)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_something_else_is_refused_and_left_alone(tmp_path, data):
    path = tmp_path / "journal.db"
    path.write_bytes(data)
    with pytest.raises(JournalCorruptError):
        SqliteJournal(path)
    assert path.read_bytes() == data


def test_another_programs_database_is_refused(tmp_path):
    path = tmp_path / "journal.db"
    edit(path, ("CREATE TABLE txn (id)", ()))
    with pytest.raises(JournalCorruptError, match="another program"):
        SqliteJournal(path)


def test_newer_schema_has_its_own_text(path):
    edit(path, ("PRAGMA user_version = 99", ()))
    with pytest.raises(JournalCorruptError, match=r"newer virtfabric.*99") as caught:
        SqliteJournal(path)
    assert "upgrade" in caught.value.advice


def test_older_schema_is_upgraded(tmp_path):
    path = Path(shutil.copy(SCHEMA_1, tmp_path / "journal.db"))
    [cut_off], books = content(path)
    assert (cut_off.id, cut_off.steps[0].step) == (TXN, STEPS[1])
    assert books.quarantine == {}
    assert (books.holdings[GUEST].functions, books.holdings[GUEST].pages) == ((), ())
    assert (len(books.grants), len(books.loans), len(books.residues)) == (1, 1, 1)
    held = (HeldFunction("net.vf", VF),)
    books = replace(
        books,
        holdings={GUEST: replace(books.holdings[GUEST], functions=held)},
        quarantine=BOOKS.quarantine,
    )
    journal = SqliteJournal(path)
    journal.close(TXN, TransactionState.UNDONE, {}, books)
    journal.shut()
    assert content(path) == ((), books)


def test_schema_without_memory_in_quarantine_is_upgraded(tmp_path):
    path = tmp_path / "journal.db"
    older = replace(BOOKS, memory_quarantine={}, slices={})
    journal = SqliteJournal(path)
    journal.store_books(older)
    journal.shut()
    newer = [(f"DROP TABLE {table}", ()) for table in ("memory_quarantine", "slice")]
    edit(path, *newer, ("PRAGMA user_version = 2", ()))
    assert content(path) == ((), older)
    journal = SqliteJournal(path)
    journal.store_books(BOOKS)
    journal.shut()
    assert content(path) == ((), BOOKS)


def test_schema_without_slices_of_cards_is_upgraded(tmp_path):
    path = tmp_path / "journal.db"
    older = replace(BOOKS, slices={})
    journal = SqliteJournal(path)
    journal.store_books(older)
    journal.shut()
    edit(path, ("DROP TABLE slice", ()), ("PRAGMA user_version = 3", ()))
    assert content(path) == ((), older)
    journal = SqliteJournal(path)
    journal.store_books(BOOKS)
    journal.shut()
    assert content(path) == ((), BOOKS)


def test_damaged_file_of_an_older_schema_is_left_alone(tmp_path):
    path = Path(shutil.copy(SCHEMA_1, tmp_path / "journal.db"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = path.read_bytes()
    with pytest.raises(JournalCorruptError):
        SqliteJournal(path)
    assert path.read_bytes() == before


def test_log_of_a_file_that_was_moved_away_is_not_replayed(path):
    path.with_name("journal.db-wal").write_bytes(b"x" * 100)
    path.unlink()
    with pytest.raises(JournalCorruptError, match=r"journal.db-wal"):
        SqliteJournal(path)


def test_half_made_file_of_a_crash_is_replaced(tmp_path):
    (tmp_path / "journal.db.new").write_bytes(b"half")
    SqliteJournal(tmp_path / "journal.db").shut()
    assert not (tmp_path / "journal.db.new").exists()


def _step(change) -> str:
    return json.dumps({**STEPS[0].to_json(), **change})


@pytest.mark.parametrize(
    ("body", "sealed"),
    [
        ("{{{", True), ("[]", True), ("null", True), ('"x"', True), ("{}", True),
        (_step({"kind": "explode"}), True), (_step({"version": 2}), True),
        (_step({"after": 7}), True), (_step({"after": "9-1"}), True),
        (_step({"guest": "me"}), True), (_step({"after": "4"}), False),
    ],
)  # fmt: skip
def test_garbage_in_a_step_names_table_and_row(path, body, sealed):
    values = (body, seal(TXN, 1, body)) if sealed else (body, "0" * 16)
    edit(
        path,
        (
            "UPDATE step SET body = ?, seal = ? WHERE idx = 1 AND txn ="
            f" (SELECT seq FROM txn WHERE id = '{TXN}')",
            values,
        ),
    )
    with pytest.raises(JournalCorruptError, match=f"table step, row '{TXN}'/1"):
        SqliteJournal(path)


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE step SET state = 'opplied' WHERE txn = 21", "table step"),
        ("UPDATE step SET idx = 5 WHERE txn = 21 AND idx = 0", "table step"),
        ("DELETE FROM step WHERE txn = 21 AND idx = 0", "table step"),
        ("DELETE FROM step WHERE txn = 21 AND idx = 1", "table step"),
        ("UPDATE txn SET body = '{}' WHERE seq = 21", "table txn, row 'open-one'"),
        ("UPDATE txn SET state = 'oqen' WHERE seq = 21", "table txn, row 'open-one'"),
        ("UPDATE txn SET created = 7 WHERE seq = 21", "table txn, row 'open-one'"),
        (
            "UPDATE holding SET body = replace(body, '2000', '9000')",
            f"table holding, row '{GUEST}'",
        ),
        ("DELETE FROM holding", "rows of holding"),
        ("DELETE FROM grant_", "rows of holding"),
        ("DELETE FROM quarantine", "rows of holding"),
        ("UPDATE quarantine SET body = replace(body, 'power', 'tower')", f"quarantine, row '{VF}'"),
        ("DELETE FROM meta", "table meta"),
        ("UPDATE meta SET value = 'x'", "table meta"),
        ("DROP TABLE loan", "loan"),
    ],
)
def test_edited_rows_are_named(path, statement, where):
    edit(path, (statement, ()))
    with pytest.raises(JournalCorruptError, match=r"journal.db.*" + where):
        SqliteJournal(path)


def test_row_that_cannot_be_decoded_is_named(path):
    edit(path, ("UPDATE grant_ SET body = '{}', seal = ?", (seal("grant_", "g", "{}"),)))
    with pytest.raises(JournalCorruptError, match="table grant_, row 'g'"):
        SqliteJournal(path)


def test_old_ended_transactions_are_pruned(tmp_path):
    journal = SqliteJournal(tmp_path / "journal.db", keep=10)
    journal.begin(TXN, {}, 0.0)
    for n in range(128):
        txn = TransactionId(str(n))
        journal.begin(txn, {}, 1.0)
        journal.extend(txn, STEPS)
        journal.close(txn, TransactionState.COMMITTED, {}, None)
    assert journal.transaction(TransactionId("0")) is None
    assert journal.transaction(TransactionId("127")) is not None
    assert [t.id for t in journal.open_transactions()] == [TXN]
    journal.shut()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as connection:
        assert connection.execute("SELECT count(*) FROM txn").fetchone()[0] <= 11
        assert connection.execute("SELECT count(*) FROM step").fetchone()[0] <= 20


def test_missing_or_unwritable_directory_is_told(tmp_path):
    with pytest.raises(JournalError, match="nowhere"):
        SqliteJournal(tmp_path / "nowhere" / "journal.db")


FILL = """
import os, sys
from pathlib import Path
from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.sqlite.audit import SqliteAuditLog
from virtfabric.adapters.sqlite.journal import SqliteJournal
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import JournalCorruptError, JournalError
from virtfabric.model.ids import GuestId, TransactionId
from virtfabric.model.ledger import Books, Holding
from virtfabric.model.plan import PinVcpu
from virtfabric.model.units import CpuSet
from virtfabric.ports import StepState, TransactionState

guest = GuestId("00000000-0000-4000-8000-000000000010")
steps = [PinVcpu(guest=guest, vcpu=n, before=CpuSet(), after=CpuSet([3])) for n in range(5)]
here = Path(sys.argv[1])
ballast = here / "ballast"
journal = SqliteJournal(here / "journal.db")
audit = SqliteAuditLog(here / "audit.db", here / "audit.key", SimulatedClock(), lambda text: None)
journal.begin(TransactionId("first"), {}, 1.0)
journal.extend(TransactionId("first"), steps)
audit.append("x", ["s"], {})
ballast.write_bytes(b"x" * 65536)

def books(n):
    return Books(n, {guest: Holding(guest, Amounts.of(cpu=n))})

def refused(call):
    try:
        call()
    except JournalCorruptError:
        raise
    except JournalError as error:
        assert "free some space" in error.advice or "full" in error.advice, error.advice
        assert str(here) in str(error) + error.advice
        return True
    return False

done = 0
for n in range(1, 10000):
    big = {"n": n, "pad": "p" * 300}
    txn = TransactionId(str(n))
    if refused(lambda: journal.begin(txn, big, 1.0)):
        assert journal.transaction(txn) is None
        break
    if refused(lambda: journal.extend(txn, steps)):
        assert journal.transaction(txn).steps == ()
        break
    if refused(lambda: journal.mark(txn, 0, StepState.APPLIED)):
        assert journal.transaction(txn).steps[0].state is StepState.PLANNED
        break
    if refused(lambda: journal.close(txn, TransactionState.COMMITTED, big, books(n))):
        assert journal.transaction(txn).outcome is None
        break
    done = n
else:
    raise SystemExit("the disk never filled")
assert done > 3, done
assert journal.load_books() == books(done), (journal.load_books(), done)
assert len(journal.transaction(TransactionId("first")).steps) == 5

record = audit.verify().head
while not refused(lambda: audit.append("x", ["s"], {"pad": "p" * 1000})):
    record = audit.head
assert audit.head == record
assert audit.verify(record).problem == "", audit.verify(record)

ballast.unlink()
audit.append("x", ["s"], {"after": True})
assert audit.verify(record).problem == ""
journal.mark(TransactionId("first"), 0, StepState.APPLIED)
journal.close(TransactionId("first"), TransactionState.UNDONE, {}, books(done + 1))
journal.shut()
audit.close()
again = SqliteJournal(here / "journal.db")
assert again.load_books() == books(done + 1)
print("survived", done)
"""


def _in_small_tmpfs(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    shell = f'mount -t tmpfs -o size=512k none "{tmp_path}" && exec "$0" -c "$1" "{tmp_path}"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_full_disk_for_real(tmp_path):
    ran = _in_small_tmpfs(tmp_path, FILL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("survived")


WORK = """
import sys
from pathlib import Path
from virtfabric.adapters.sqlite.journal import SqliteJournal
from virtfabric.model.amounts import Amounts
from virtfabric.model.ids import GuestId, TransactionId
from virtfabric.model.ledger import Books, Holding
from virtfabric.model.plan import SetQuota
from virtfabric.ports import StepState, TransactionState

guest = GuestId("00000000-0000-4000-8000-000000000010")
journal = SqliteJournal(Path(sys.argv[1]))
n = journal.load_books().generation
def say(word):
    sys.stdout.write(f"{word} {n}\\n")
    sys.stdout.flush()
while True:
    n += 1
    txn = TransactionId(str(n))
    journal.begin(txn, {"n": n}, 1.0); say("begin")
    journal.extend(txn, [SetQuota(guest=guest, before=-1, after=100 + i) for i in range(4)])
    say("extend")
    for i in range(4):
        journal.mark(txn, i, StepState.VERIFIED)
        say(f"mark{i}")
    journal.close(txn, TransactionState.COMMITTED, {"n": n},
                  Books(n, {guest: Holding(guest, Amounts.of(cpu=n))}))
    say("close")
"""


def test_sigkill_leaves_everything_that_was_acknowledged(tmp_path):
    path = tmp_path / "journal.db"
    for lines in (1, 40, 57, 83):
        with subprocess.Popen(
            [sys.executable, "-c", WORK, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            told = [child.stdout.readline().split() for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            told += [line.split() for line in child.stdout.read().splitlines()]
        word, number = next((w, int(n)) for w, n in reversed([t for t in told if len(t) == 2]))
        journal = SqliteJournal(path)
        _check_after_kill(journal, word, number)
        for txn in journal.open_transactions():
            journal.close(txn.id, TransactionState.UNDONE, {}, None)
        highest = max(number, journal.load_books().generation) + 1
        journal.store_books(Books(highest, {GUEST: Holding(GUEST, Amounts.of(cpu=highest))}))
        journal.shut()


def _check_after_kill(journal: SqliteJournal, word: str, number: int) -> None:
    books = journal.load_books()
    if books.generation:
        assert books.holdings[GUEST].amounts.cpu == books.generation
    if word == "close":
        assert books.generation >= number
    acknowledged = journal.transaction(TransactionId(str(number)))
    assert acknowledged is not None
    assert len(acknowledged.steps) in ((0, 4) if word == "begin" else (4,))
    if word.startswith("mark"):
        marked = acknowledged.steps[: int(word[4:]) + 1]
        assert all(s.state is StepState.VERIFIED for s in marked)
    # Only the newest may be open, and the books never run ahead of the transactions.
    assert all(int(t.id) >= number for t in journal.open_transactions())
    newest = journal.transaction(TransactionId(str(books.generation)))
    assert newest is None or newest.state is TransactionState.COMMITTED
