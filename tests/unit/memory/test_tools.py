"""Running `cxl` and `daxctl`: what they say, deadlines, and a caller who gives up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.cxl.tools import run_tool
from virtfabric.model.errors import CxlError, StepCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_what_a_tool_prints() -> None:
    assert run_tool(["echo", "[]"], deadline_s=20) == "[]\n"


def test_a_tool_that_fails_says_why() -> None:
    with pytest.raises(CxlError, match=r"sh -c .*: no; not so$"):
        run_tool(["sh", "-c", "echo no >&2; echo not so >&2; exit 1"], deadline_s=20)
    with pytest.raises(CxlError, match="exit code 3"):
        run_tool(["sh", "-c", "exit 3"], deadline_s=20)


def test_a_tool_that_is_not_installed() -> None:
    with pytest.raises(CxlError, match="cannot be run: No such file") as caught:
        run_tool(["no-such-cxl", "list"], deadline_s=20)
    assert "cxl and daxctl" in caught.value.advice


def test_a_deadline_ends_the_tool(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f"trap 'echo ended > {said}; exit 1' TERM; while :; do sleep 0.05; done"
    began = time.monotonic()
    with pytest.raises(CxlError, match=r"not done in 0\.5 s"):
        run_tool(["sh", "-c", script], deadline_s=0.5)
    assert time.monotonic() - began < 5
    assert said.read_text() == "ended\n"


def test_who_gives_up_ends_the_tool() -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(StepCancelledError):
        run_tool(["sleep", "60"], deadline_s=60, cancelled=cancelled)
    assert time.monotonic() - began < 10


def test_a_tool_dies_with_a_killed_agent(tmp_path: Path) -> None:
    """Else it would go on making a region that the next agent has found undone."""
    pid = tmp_path / "pid"
    work = f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 600"
    program = (
        "from virtfabric.adapters.cxl.tools import run_tool\n"
        f"run_tool(['sh', '-c', {work!r}], deadline_s=600)"
    )
    agent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(pid.exists)
        tool = Path("/proc") / pid.read_text().strip()
        assert tool.exists()
        agent.send_signal(signal.SIGKILL)
        # gone, or a zombie where nobody reaps orphans
        wait_until(lambda: not tool.exists() or ") Z " in (tool / "stat").read_text())
    finally:
        agent.kill()
        agent.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
