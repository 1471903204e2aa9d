"""Labs for tests: brought up by the real command, one for a module, taken down at its end.

A test that fails while the emulator under its lab has failed (`virtfabric lab status --probe`) is
run again in a new lab, and the summary says so. One that fails in a lab that is sound has failed.

`VIRTFABRIC_RESUME=1`, which `make lab` sets: see `resume.py`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).resolve().parent))

from resume import Resume
from running_lab import LABS, RunningLab, bring_up, find_faults

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

ATTEMPTS = 3
_FAULTS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="module")
def small() -> Iterator[RunningLab]:
    yield from bring_up("small")


@pytest.fixture(scope="module")
def cxl() -> Iterator[RunningLab]:
    yield from bring_up("cxl")


@pytest.fixture(scope="module")
def passthrough() -> Iterator[RunningLab]:
    yield from bring_up("passthrough")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("VIRTFABRIC_RESUME") == "1":
        config.pluginmanager.register(Resume(config))


# -- emulators that fail ---------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at the lab while it is there: at once after what failed."""
    report = yield
    if report.failed and call.when != "teardown":
        item.stash[_FAULTS] = find_faults()
        if item.stash[_FAULTS]:
            report.sections.append(("the emulator", "\n".join(item.stash[_FAULTS])))
        else:
            report.sections += [(lab.name, lab.tell()) for lab in LABS]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """As pytest's own, in a new lab where the emulator has failed."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(ATTEMPTS)):
        item.stash[_FAULTS] = []
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        again = item.stash[_FAULTS] and left
        for report in reports:
            failed = report.failed
            if again and failed:
                report.outcome = "rerun"  # type: ignore[assignment]
            item.ihook.pytest_runtest_logreport(report=report)
            if failed:
                _tell_at_once(item.config, report)
        if not again:
            break
        # the lab, and all that was set up in it
        item.session._setupstate.teardown_exact(None)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _tell_at_once(config: pytest.Config, report: pytest.TestReport) -> None:
    """Nobody who runs an hour of tests waits for its end to read this."""
    told = config.get_terminal_writer()
    told.line()
    told.sep("-", report.nodeid)
    told.line(report.longreprtext)
    for name, text in report.sections:
        told.sep("-", name)
        told.line(text[-6000:])


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """R, in a line of dots."""
    return ("rerun", "R", "RERUN") if str(report.outcome) == "rerun" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was run again, and why; the rest was told when it happened."""
    for report in terminalreporter.getreports("rerun"):
        why = dict(report.sections).get("the emulator", "")
        terminalreporter.write_line(f"run again in a new lab: {report.nodeid}: {why}")
