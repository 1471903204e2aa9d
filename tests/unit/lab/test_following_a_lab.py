"""`RunningLab.follow`: a long command's lines as they come, given up when its lab has hung."""

from __future__ import annotations

import importlib.util
import sys
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
