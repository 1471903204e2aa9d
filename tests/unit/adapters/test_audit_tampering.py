"""The audit log against people: every kind of tampering with its files is found and named."""

import hashlib
import hmac
import json
import os
import re
import shutil
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.sqlite.audit import SqliteAuditLog
from virtfabric.model.errors import ConfigError, JournalCorruptError, JournalError


@contextmanager
def opened(directory: Path, exported: list[str] | None = None):
    log = SqliteAuditLog(
        directory / "audit.db",
        directory / "audit.key",
        SimulatedClock(),
        ([] if exported is None else exported).append,
    )
    try:
        yield log
    finally:
        log.close()


def edit(directory: Path, *statements: str) -> None:
    with closing(sqlite3.connect(directory / "audit.db", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("audit")
    exported: list[str] = []
    with opened(directory, exported) as log:
        for n in range(8):
            log.append("request.granted", [f"r{n}", "guest"], {"n": n, "amounts": {"cpu": 10 + n}})
    return directory, [line.rpartition(" ")[2] for line in exported]


@pytest.fixture
def written(pristine, tmp_path):
    directory = tmp_path / "state"
    shutil.copytree(pristine[0], directory)
    return directory


def test_files_are_private(written):
    assert sorted(p.name for p in written.iterdir()) == ["audit.db", "audit.head", "audit.key"]
    assert {p.stat().st_mode & 0o777 for p in written.iterdir()} == {0o600}
    assert (written / "audit.key").stat().st_size == 32


def test_the_chain_can_be_checked_without_us(written):
    key = (written / "audit.key").read_bytes()
    mac = hashlib.sha256(b"virtfabric audit log, version 1").digest()
    with closing(sqlite3.connect(written / "audit.db")) as connection:
        rows = connection.execute("SELECT * FROM record ORDER BY seq").fetchall()
    for seq, at, kind, subjects, body, stored in rows:
        content = [seq, at, kind, json.loads(subjects), json.loads(body)]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        mac = hmac.new(key, mac + text.encode(), "sha256").digest()
        assert mac.hex() == stored
    assert (written / "audit.head").read_text().split() == ["8", mac.hex()]


def test_it_goes_on_after_a_restart(written, pristine):
    with opened(written) as log:
        assert log.append("x", (), {}).sequence == 9
        for head in pristine[1]:
            assert log.verify(head).problem == ""
        assert log.verify().records == 9


SWAP = (
    "UPDATE record SET seq = -1 WHERE seq = 3", "UPDATE record SET seq = 3 WHERE seq = 4",
    "UPDATE record SET seq = 4 WHERE seq = -1",
)  # fmt: skip
RENUMBER = (
    "DELETE FROM record WHERE seq = 4",
    *(f"UPDATE record SET seq = {n - 1} WHERE seq = {n}" for n in range(5, 9)),
)
INSERT = (
    *(f"UPDATE record SET seq = {n + 1} WHERE seq = {n}" for n in range(8, 3, -1)),
    "INSERT INTO record SELECT 4, at, kind, subjects, body, mac FROM record WHERE seq = 3",
)
TAMPERINGS = {
    "edited body": (
        ("UPDATE record SET body = replace(body, '13', '99') WHERE seq = 4",),
        "record 4",
    ),
    "edited body, same meaning": (
        ("UPDATE record SET body = body || ' ' WHERE seq = 4",),
        "record 4",
    ),
    "edited into garbage": (("UPDATE record SET body = '{' WHERE seq = 4",), "record 4"),
    "edited into binary": (
        ("UPDATE record SET body = CAST(x'ff' AS TEXT) WHERE seq = 4",),
        "record 3",
    ),
    "moved between columns": (
        (
            """UPDATE record SET subjects = '["r3","guest"],{"amounts":{"cpu":13}',"""
            """ body = '"n":3}' WHERE seq = 4""",
        ),
        "record 4",
    ),
    "edited time": (("UPDATE record SET at = at + 1 WHERE seq = 8",), "record 8"),
    "edited kind": (("UPDATE record SET kind = 'x' WHERE seq = 1",), "record 1"),
    "edited subjects": (("UPDATE record SET subjects = '[]' WHERE seq = 2",), "record 2"),
    "edited mac": (
        ("UPDATE record SET mac = iif(mac LIKE 'a%', 'b', 'a') || substr(mac, 2) WHERE seq = 5",),
        "record 5",
    ),
    "mac of another": (
        ("UPDATE record SET mac = (SELECT mac FROM record WHERE seq = 6) WHERE seq = 5",),
        "record 5",
    ),
    "removed first": (("DELETE FROM record WHERE seq = 1",), "record 1 is missing"),
    "removed middle": (("DELETE FROM record WHERE seq IN (4, 5)",), "records 4-5 are missing"),
    "removed and renumbered": (RENUMBER, "record 4"),
    "reordered": (SWAP, "record 3"),
    "inserted": (INSERT, "record 4"),
    "inserted before": (
        ("INSERT INTO record SELECT 0, at, kind, subjects, body, mac FROM record WHERE seq = 1",),
        "record 0",
    ),
    "appended": (
        ("INSERT INTO record SELECT 9, at, kind, subjects, body, mac FROM record WHERE seq = 8",),
        "record 9",
    ),
    "cut off": (("DELETE FROM record WHERE seq > 6",), "records 7-8 are missing.*after record 6"),
    "emptied": (("DELETE FROM record",), "records 1-8 are missing"),
    "index lost": (("DELETE FROM subject WHERE subject = 'r3'",), "index.*record 4"),
    "index grown": (("INSERT INTO subject VALUES ('r3', 6)",), "index.*1 forged"),
    "index beyond": (("INSERT INTO subject VALUES ('r3', 60)",), "index.*1 forged"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_while_running_is_found(written, name):
    statements, expected = TAMPERINGS[name]
    with opened(written) as log:
        assert log.verify().problem == ""
        edit(written, *statements)
        verdict = log.verify()
    assert verdict.problem
    assert re.search(expected, verdict.problem), verdict.problem


@pytest.mark.parametrize("name", [n for n in TAMPERINGS if n != "edited mac"])
def test_tampering_while_down_is_found_now_and_for_ever(written, name):
    statements, _ = TAMPERINGS[name]
    edit(written, *statements)
    with opened(written) as log:
        assert log.verify().problem
        log.append("x", ["s"], {})
        assert log.verify().problem
    with opened(written) as log:
        assert log.verify().problem


def test_cut_tail_stays_a_gap(written):
    edit(written, "DELETE FROM record WHERE seq > 5", "DELETE FROM subject WHERE seq > 5")
    with opened(written) as log:
        assert log.append("x", (), {}).sequence == 9
        assert "records 6-8 are missing" in log.verify().problem


def test_cut_tail_and_head_show_against_an_exported_head(written, pristine):
    edit(written, "DELETE FROM record WHERE seq > 5", "DELETE FROM subject WHERE seq > 5")
    sequence, _, mac = pristine[1][4].partition(":")
    (written / "audit.head").write_text(f"{sequence:>20} {mac}\n")
    with opened(written) as log:
        assert log.verify().problem == ""
        assert log.verify(pristine[1][4]).problem == ""
        assert "records 6-8 are missing" in log.verify(pristine[1][7]).problem
        for n in range(3):
            log.append("x", (), {"n": n})
        assert "record 8 is not the one" in log.verify(pristine[1][7]).problem


@pytest.mark.parametrize("garbage", [None, "", "x", "1 2 3", "9 " + "z" * 64, "3 " + "0" * 64])
def test_lost_or_wrong_head_file_is_written_down(written, garbage):
    head = written / "audit.head"
    if garbage is None:
        head.unlink()
    else:
        head.write_text(garbage)
    with opened(written) as log:
        (record,) = [r for r in log.read() if r.kind == "audit.head-lost"]
        assert record.sequence == 9
        assert log.verify().problem == ""


@pytest.mark.parametrize("garbage", [None, "x", "3 " + "0" * 64, "90 " + "0" * 64])
def test_wrong_head_file_shows_while_running(written, garbage):
    with opened(written) as log:
        head = written / "audit.head"
        head.unlink()
        if garbage is not None:
            head.write_text(garbage)
        assert log.verify().problem


def test_head_behind_the_log_is_only_a_crash(written, pristine):
    sequence, _, mac = pristine[1][6].partition(":")
    (written / "audit.head").write_text(f"{sequence} {mac}\n")
    with opened(written) as log:
        assert log.verify().problem == ""
        assert log.verify().records == 8


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_key_that_others_may_use_is_refused(written, mode):
    key = written / "audit.key"
    key.chmod(mode)
    with pytest.raises(ConfigError, match=r"audit.key") as caught, opened(written):
        pass
    assert "chmod 600" in caught.value.advice


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_key_of_somebody_else_is_refused(written):
    os.chown(written / "audit.key", 12345, 0)
    with pytest.raises(ConfigError, match="12345"), opened(written):
        pass


@pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 33])
def test_key_of_the_wrong_size_is_refused(written, data):
    (written / "audit.key").write_bytes(data)
    with pytest.raises(ConfigError, match="32 bytes"), opened(written):
        pass


def test_key_behind_a_link_or_a_directory_is_refused(written, tmp_path):
    key = written / "audit.key"
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"), opened(written):
        pass
    key.unlink()
    key.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="32 bytes"), opened(written):
        pass


def test_lost_key_is_not_replaced(written):
    (written / "audit.key").unlink()
    with pytest.raises(ConfigError, match="is missing") as caught, opened(written):
        pass
    assert "bring the key back" in caught.value.advice
    assert not (written / "audit.key").exists()


def test_other_key_shows(written):
    (written / "audit.key").write_bytes(b"k" * 32)
    with opened(written) as log:
        assert "key" in log.verify().problem


def test_damaged_pages_are_told(written):
    path = written / "audit.db"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(JournalCorruptError, match=r"audit.db") as caught, opened(written):
        pass
    assert "new log" in caught.value.advice


def test_unreadable_record_is_told_by_read(written):
    with opened(written) as log:
        edit(written, "UPDATE record SET body = '{' WHERE seq = 4")
        with pytest.raises(JournalError, match="row 4"):
            log.read()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("edit"), st.sampled_from(["body", "kind", "at", "subjects", "mac"])),
        st.tuples(st.just("delete"), st.integers(0, 50)),
        st.tuples(st.just("swap"), st.integers(0, 50)),
        st.tuples(st.just("cut"), st.integers(1, 5)),
        st.tuples(st.just("copy"), st.integers(0, 50)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=8,
)


def rows_of(directory: Path) -> list[tuple]:
    """What the log holds, without what the agent itself noted about its head."""
    with closing(sqlite3.connect(directory / "audit.db")) as connection:
        return connection.execute(
            "SELECT * FROM record WHERE kind <> 'audit.head-lost' ORDER BY seq"
        ).fetchall()


def tamper(directory: Path, action: str, value) -> None:
    with closing(sqlite3.connect(directory / "audit.db", isolation_level=None)) as connection:
        seqs = [s for (s,) in connection.execute("SELECT seq FROM record ORDER BY seq")]
        if not seqs:
            return
        if action == "edit":
            new = "1.5" if value == "at" else f"{value} || 'x'"
            connection.execute(f"UPDATE record SET {value} = {new} WHERE seq = ?", (seqs[0],))
        elif action == "delete":
            connection.execute("DELETE FROM record WHERE seq = ?", (seqs[value % len(seqs)],))
        elif action == "cut":
            connection.execute("DELETE FROM record WHERE seq > ?", (seqs[-1] - value,))
        elif action == "copy":
            connection.execute(
                "INSERT INTO record SELECT ?, at, kind, subjects, body, mac FROM record"
                " WHERE seq = ?",
                (seqs[-1] + 1, seqs[value % len(seqs)]),
            )
        elif action == "swap" and len(seqs) > 1:
            one = seqs[value % (len(seqs) - 1)]
            other = seqs[seqs.index(one) + 1]
            for old, new in ((one, -1), (other, one), (-1, other)):
                connection.execute("UPDATE record SET seq = ? WHERE seq = ?", (new, old))


class Chain:
    """A log that is written to honestly and tampered with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.honest: list[tuple] = []
        self.tampered = False
        self.open()

    def open(self) -> None:
        self.log = SqliteAuditLog(
            self.directory / "audit.db",
            self.directory / "audit.key",
            SimulatedClock(),
            [].append,
        )

    def append(self, count: int) -> None:
        for n in range(count):
            try:
                record = self.log.append("x", ["s"], {"n": n})
            except JournalError:
                assert self.tampered  # a forged record sits where this one belongs
            else:
                body = f'{{"n":{n}}}'
                self.honest.append((record.sequence, record.at, "x", '["s"]', body, record.mac))


@settings(max_examples=examples(60), deadline=None)
@given(actions=ACTIONS)
def test_any_sequence_of_tampering_is_found(tmp_path_factory, actions):
    chain = Chain(tmp_path_factory.mktemp("chain"))
    try:
        for action, value in actions:
            if action == "append":
                chain.append(value)
            elif action == "restart":
                chain.log.close()
                try:
                    chain.open()
                except JournalCorruptError:
                    assert chain.tampered  # the tail's MAC is none: refused to build upon
                    return
            else:
                tamper(chain.directory, action, value)
                chain.tampered = chain.tampered or rows_of(chain.directory) != chain.honest
        problem = chain.log.verify().problem
        if rows_of(chain.directory) != chain.honest:
            assert problem
        if not chain.tampered:
            assert not problem
    finally:
        chain.log.close()
