"""`virtfabric lab`, as far as it goes without a lab: what is wrong is told in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.lab.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]

Run = "Callable[..., subprocess.CompletedProcess[str]]"


@pytest.fixture
def root(short_path: Path) -> Path:
    root = short_path / "labs"
    root.mkdir()
    return root


@pytest.fixture
def run(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, with labs in a directory of the test's."""

    def run(*words: str, labs: Path = root) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "virtfabric.cli.main", "lab", *words],
            check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "VIRTFABRIC_LABS": str(labs)},
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done

    return run


def test_down_all_goes_on_after_one_that_cannot_be_ended(root: Path, run: Run) -> None:
    for name in ("aa", "a_b", "bb", "cc"):
        (root / name).mkdir()
    with Place(root / "bb").locked():
        done = run("down", "--all")
        assert done.returncode == 1
        assert done.stdout.splitlines() == ["lab aa is down", "lab cc is down"]
        assert "lab bb: another command" in done.stderr
        told = run("--json", "down", "--all")
        assert told.returncode == 1
        assert json.loads(told.stdout)["down"] == []
        assert [*json.loads(told.stdout)["failed"]] == ["bb"]
    assert run("down", "--all").stdout == "lab bb is down\n"
    done = run("down", "--all")
    assert (done.returncode, done.stdout) == (0, "there was no lab\n")
    assert [path.name for path in root.iterdir()] == ["a_b"], "that is no lab"


@pytest.mark.parametrize("words", [("console", "nosuch", "--log"), ("qmp", "nosuch", "quit")])
def test_a_lab_that_there_is_not(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "'nosuch' does not exist" in done.stderr
    assert "virtfabric lab list" in done.stderr


def test_arguments_of_qmp_that_are_no_object(root: Path, run: Run) -> None:
    (root / "one").mkdir()
    for arguments, said in (("[]", "is no JSON object"), ("{", "is not JSON")):
        done = run("qmp", "one", "query-status", arguments)
        assert done.returncode == 2
        assert said in done.stderr
    done = run("qmp", "one", "query-status", '{"place": 1, "command": 2}')
    assert done.returncode == 1
    assert "does not answer on QMP" in done.stderr


def test_a_directory_that_cannot_be_written_to(root: Path, run: Run) -> None:
    file = root / "file"
    file.touch()
    for words in (("up", "small"), ("down", "one")):
        done = run(*words, labs=file / "labs")
        assert done.returncode == 1
        assert f"virtfabric: {file / 'labs'}: Not a directory" in done.stderr
        assert "$VIRTFABRIC_LABS" in done.stderr
    done = run("--json", "down", "one", labs=file / "labs")
    assert "Not a directory" in str(json.loads(done.stdout)["error"])


def test_a_disk_that_is_full(root: Path, run: Run) -> None:
    """Its error names no file."""
    code = (
        "import sys; from virtfabric.shim.lab import lab; from virtfabric.cli.main import main\n"
        "lab._start = lambda *_: open('/dev/full', 'wb', buffering=0).write(b'x')\n"
        "sys.exit(main(['lab', 'up', 'small']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "VIRTFABRIC_LABS": str(root)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"virtfabric: {root}: No space left on device" in done.stderr


def test_the_words_of_a_labs_command_are_its_own(run: Run) -> None:
    assert "--json of this command stands before LAB" in " ".join(
        run("run", "--help").stdout.split()
    )
