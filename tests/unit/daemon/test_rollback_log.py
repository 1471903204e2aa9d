"""What the log says of an undo that fails: one line with cause and advice, never a traceback."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import agent_world as aw

from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.records import MemoryJournal
from virtfabric.daemon.executor import Execution, Progress, Stopwatch
from virtfabric.model.errors import HypervisorGoneError
from virtfabric.model.ids import TransactionId
from virtfabric.model.plan import SetQuota, SetShares

if TYPE_CHECKING:
    import pytest

TXN = TransactionId("txn-1")
GUEST = aw.uuid_of(1)


class Handler:
    """Does nothing, and fails to undo caps."""

    def __init__(self, failure: Exception) -> None:
        self.kind = "any"
        self.failure = failure
        self.undone: list[str] = []

    def for_step(self, _step: Any) -> Handler:
        return self

    def apply(self, step: Any, context: Any) -> None:
        pass

    def verify(self, step: Any) -> None:
        pass

    def undo(self, step: Any) -> int:
        self.undone.append(step.kind)
        if isinstance(step, SetQuota):
            raise self.failure
        return 0


def roll_back(handler: Handler) -> list[str]:
    clock, journal = SystemClock(), MemoryJournal()
    journal.begin(TXN, {}, 0.0)
    progress = Progress(lambda _fraction, _text: None)
    execution = Execution(TXN, journal, handler, clock, progress, Stopwatch(clock))
    execution.extend(
        [
            SetShares(guest=GUEST, name="db", before=100, after=200),
            SetQuota(guest=GUEST, name="db", before=-1, after=500),
        ]
    )
    assert execution.run() is None
    return execution.rollback()


def test_an_expected_failure_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    gone = HypervisorGoneError("qemu:///system: no route", advice="is libvirtd running?")
    with caplog.at_level(logging.DEBUG):
        (problem,) = roll_back(Handler(gone))
    assert "no route" in problem
    (record,) = [r for r in caplog.records if "undo" in r.message]
    assert record.levelno == logging.ERROR
    assert record.message.endswith("qemu:///system: no route; is libvirtd running?")
    assert record.exc_info is None


def test_a_defect_keeps_its_traceback_for_debug_and_the_others_are_undone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = Handler(TypeError("a defect of ours"))
    with caplog.at_level(logging.DEBUG):
        (problem,) = roll_back(handler)
    assert "TypeError" in problem
    assert handler.undone == ["set-quota", "set-shares"]
    told = {r.levelno: r for r in caplog.records if "undo" in r.message}
    assert "a defect of ours" in told[logging.ERROR].message
    assert told[logging.ERROR].exc_info is None
    assert told[logging.DEBUG].exc_info is not None
