"""`RunningLab`: a long command's lines as they come; what has hung is told from what is slow."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

FILE = Path(__file__).parents[2] / "lab" / "running_lab.py"


@pytest.fixture
def running_lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a shell in the lab's place."""
    spec = importlib.util.spec_from_file_location("followed_lab", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    # words as the real command has them: run NAME COMMAND
    monkeypatch.setattr(module, "COMMAND", ("bash", "-c", 'bash -c "$2"; exit $?'))
    return module


def test_its_lines(running_lab: Any) -> None:
    lab = running_lab.RunningLab("small")
    assert list(lab.follow(r"echo a; printf 'b\xff\n'; echo c >&2; exit 3")) == [
        "a",
        "b\ufffd",
        "c",
    ]


def test_silence_in_a_sound_lab_is_waited_for_and_in_a_hung_one_not(
    running_lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks = iter([[], [], ["processor 2 runs nothing any more"]])
    monkeypatch.setattr(running_lab.RunningLab, "find_faults", lambda _: next(looks))
    pid = tmp_path / "pid"
    followed = running_lab.RunningLab("small").follow(
        f"echo $$ > {pid}; echo begun; sleep 60; echo never", look_s=0.05
    )
    assert next(followed) == "begun"
    process = psutil.Process(int(pid.read_text()))
    with pytest.raises(AssertionError, match="processor 2"):
        next(followed)
    assert psutil.wait_procs([process], timeout=30)[0], "what ran for it ends with it"


@pytest.mark.parametrize(
    ("state", "silent_s", "hung"),
    [("running", 200, True), ("running", 5, False), ("paused", 200, False)],
)
def test_a_guest_that_is_silent_in_its_boot_has_hung(
    running_lab: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    silent_s: int,
    hung: bool,
) -> None:
    virsh = tmp_path / "virsh"
    virsh.write_text(f"#!/bin/sh\necho {state}\n")
    virsh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    console = tmp_path / "console.log"
    console.write_text("Linux version 6.1\nBooting\n")
    os.utime(console, (time.time() - silent_s,) * 2)
    lab = running_lab.RunningLab("small")
    lab._judge_boot("db", str(console))
    assert [fault.startswith("guest db has said nothing for") for fault in lab.faults] == [
        True
    ] * hung
    assert "Booting" in capsys.readouterr().out
