"""What every audit log keeps: in memory and in SQLite."""

import threading

import pytest

from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.simulated.records import MemoryAudit
from virtfabric.adapters.sqlite.audit import SqliteAuditLog
from virtfabric.model.errors import InvalidValueError


@pytest.fixture
def clock():
    return SimulatedClock(1000.0)


@pytest.fixture
def exported():
    return []


@pytest.fixture(params=["memory", "sqlite"])
def audit(request, tmp_path, clock, exported):
    if request.param == "memory":
        log = MemoryAudit(clock, exported.append)
    else:
        log = SqliteAuditLog(tmp_path / "audit.db", tmp_path / "audit.key", clock, exported.append)
    yield log
    log.close()


def test_empty_is_whole(audit):
    verdict = audit.verify()
    assert (verdict.records, verdict.problem) == (0, "")
    assert audit.read() == ()
    assert audit.verify(verdict.head).problem == ""


def test_records_come_back_as_they_went(audit, clock, exported):
    first = audit.append(
        "request.granted", ("r1", "g1", "r1"), {"cpu": 1, "ü": [None, 1.5, "\ud800"]}
    )
    clock.advance(10.25)
    second = audit.append("grant.ended", ["g1"], {10: "ten", "9": "nine"})
    assert (first.sequence, second.sequence) == (1, 2)
    assert (first.at, second.at) == (1000.0, 1010.25)
    assert first.subjects == ("r1", "g1")
    assert second.body == {"10": "ten", "9": "nine"}
    assert audit.read() == (first, second)
    assert exported == [f"virtfabric audit head {r.sequence}:{r.mac}" for r in (first, second)]
    verdict = audit.verify()
    assert (verdict.records, verdict.problem) == (2, "")
    assert exported[-1].endswith(" " + verdict.head)


def test_any_text_is_taken(audit):
    record = audit.append("k\ud800", ["a\0b", "\udfff", "ü\n'"], {"\0": "\ud800"})
    assert audit.read() == (record,)
    assert audit.read(subject="a\0b") == (record,)
    assert audit.verify().problem == ""


def test_reading_by_subject_time_and_limit(audit, clock):
    for n in range(6):
        audit.append("x", [f"s{n % 2}", "all"], {"n": n})
        clock.advance(1)
    assert [r.body["n"] for r in audit.read(subject="s1")] == [1, 3, 5]
    assert [r.body["n"] for r in audit.read(since=1003.0)] == [3, 4, 5]
    assert [r.body["n"] for r in audit.read(since=1002.0, subject="s0")] == [2, 4]
    assert [r.body["n"] for r in audit.read(subject="all", limit=2)] == [4, 5]
    assert audit.read(subject="nobody") == ()


def test_earlier_heads_are_contained(audit):
    heads = []
    for n in range(3):
        record = audit.append("x", (), {"n": n})
        heads.append(f"{record.sequence}:{record.mac}")
    for head in heads:
        assert audit.verify(head).problem == ""
        assert audit.verify(f" {head.upper()} ").problem == ""
    assert "2" in audit.verify("2:" + "0" * 64).problem
    assert "cut off" in audit.verify("9:" + "0" * 64).problem


@pytest.mark.parametrize(
    "head", ["", "1", "1:", "x:" + "0" * 64, "-1:" + "0" * 64, "1:" + "g" * 64]
)
def test_malformed_heads_are_refused(audit, head):
    with pytest.raises(InvalidValueError, match="head"):
        audit.verify(head)


@pytest.mark.parametrize("body", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_what_is_not_json_is_refused_and_changes_nothing(audit, body):
    with pytest.raises(InvalidValueError):
        audit.append("x", (), body)
    assert audit.verify().records == 0


def test_threads_make_one_chain(audit, exported):
    def work(number: int) -> None:
        for n in range(10):
            audit.append("x", [f"t{number}"], {"n": n})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = audit.verify()
    assert (verdict.records, verdict.problem) == (40, "")
    for number in range(4):
        assert [r.body["n"] for r in audit.read(subject=f"t{number}")] == list(range(10))
    assert len(set(exported)) == 40
    for line in exported:
        assert audit.verify(line.rpartition(" ")[2]).problem == ""
