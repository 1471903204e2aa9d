"""Running `cxl` and `daxctl`: what they say, deadlines, and a caller who gives up."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.cxl.tools import run_tool
from virtfabric.model.errors import CxlError, StepCancelledError

if TYPE_CHECKING:
    from pathlib import Path


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
