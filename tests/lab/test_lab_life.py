"""Labs come and go: what is left, what is said when one does not come up, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running_lab import COMMAND, UP_S, RunningLab, lab_command

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = {
    "version": 1,
    "cpu": {"sockets": 1, "cores": 1, "threads": 1},
    "memory": "512MiB",
}
CARD = {
    "ports": [{"id": "rp0"}, {"id": "rp1"}],
    "cards": [{"id": "card0", "management": "rp0", "slices": ["rp1"]}],
}
"""Only a QEMU that is run from the cache, in a mount namespace of its own, has vfio-user."""


@pytest.fixture
def labs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for labs of one test. Short: it holds UNIX sockets."""
    root = Path(f"/tmp/vfl{os.getpid()}")
    monkeypatch.setenv("VIRTFABRIC_LABS", str(root))
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The smallest topology, as a file of one's own."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def qemus_of(root: Path) -> list[str]:
    """Processes that name anything below this directory."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = cmdline.read_bytes()
        except OSError:
            continue
        if f"{root}/".encode() in arguments and b"qemu-system" in arguments:
            found.append(cmdline.parent.name)
    return found


@pytest.fixture
def clean(labs_root: Path) -> Iterator[None]:
    """Whatever the test leaves is found, and fails it."""
    yield
    lab_command("down", "--all")
    left = [path.name for path in labs_root.glob("*")] if labs_root.exists() else []
    assert left == []
    assert qemus_of(labs_root) == []
    labs_root.rmdir()


def test_a_lab_from_a_file_comes_up_answers_and_goes(
    labs_root: Path, clean: None, tiny: str, tmp_path: Path
) -> None:
    up = lab_command("up", tiny, "--name", "one", timeout_s=UP_S)
    assert up.returncode == 0, up.stderr
    one = RunningLab("one")
    assert one.run("nproc; hostname") == "1\none"
    assert lab_command("run", "one", "exit 7").returncode == 7
    status = json.loads(lab_command("status", "one", "--json").stdout)
    assert (status["state"], status["name"], status["topology"]) == ("ready", "one", "tiny")
    again = lab_command("up", tiny, "--name", "one")
    assert again.returncode == 1
    assert "is up already" in again.stderr

    (tmp_path / "there").write_text("and back")
    assert lab_command("copy", "one", str(tmp_path / "there"), ":/root/there").returncode == 0
    assert lab_command("copy", "one", ":/root/there", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_text() == "and back"

    kind = json.loads(lab_command("qmp", "one", "query-status").stdout)
    assert kind["status"] == "running"
    assert "VFLAB" in lab_command("console", "one", "--log").stdout
    assert one.run("virtfabric --version").startswith("virtfabric ")

    assert lab_command("down", "one").returncode == 0
    assert qemus_of(labs_root) == []
    assert not (labs_root / "one").exists()
    assert "there was no such lab" in lab_command("down", "one").stdout


@pytest.mark.parametrize("addition", [{}, CARD], ids=["the system's QEMU", "an unpacked QEMU"])
def test_down_cleans_up_after_an_up_that_was_killed(
    labs_root: Path, clean: None, tmp_path: Path, addition: dict[str, Any]
) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(TINY | addition))
    mounts = Path("/proc/self/mounts").read_text()
    up = subprocess.Popen([*COMMAND, "up", str(path), "--name", "cut"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + UP_S
    while not qemus_of(labs_root):
        assert up.poll() is None, "it ended before its QEMU was there"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    up.send_signal(signal.SIGKILL)
    up.wait()
    assert qemus_of(labs_root), "its QEMU lives on: that is what `down` is to end"
    (listed,) = json.loads(lab_command("list", "--json").stdout)["labs"]
    assert (listed["name"], listed["topology"]) == ("cut", "cut")
    assert listed["state"] in ("starting", "dead")
    assert lab_command("down", "cut").returncode == 0
    assert qemus_of(labs_root) == []
    assert Path("/proc/self/mounts").read_text() == mounts


def test_a_lab_that_does_not_come_up_shows_its_last_words(
    labs_root: Path, clean: None, tiny: str
) -> None:
    up = lab_command("up", tiny, "--name", "late", "--timeout", "1", timeout_s=UP_S)
    assert up.returncode == 1
    assert "lab late did not come up: it was not ready after 1 s" in up.stderr
    assert "--keep" in up.stderr
    assert qemus_of(labs_root) == []


def test_what_cannot_be_is_refused_before_anything_starts(
    labs_root: Path, clean: None, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(TINY | {"functions": {"edu": [{"id": "e0", "port": "rp9"}]}}))
    for words, said in (
        (("up", str(broken)), "functions.edu[0].port"),
        (("up", "nosuch"), "nosuch"),
        (("up", str(tmp_path / "missing.json")), "cannot be read"),
        (("up", "small", "--name", "Bad Name"), "name"),
        (("run", "nobody", "true"), "there is no lab nobody"),
        (("fault", "nobody", "agent-kill"), "there is no lab nobody"),
        (("fault", "nobody", "earthquake"), "earthquake"),
        (("qmp", "nobody", "query-status"), "nobody"),
    ):
        done = lab_command(*words)
        assert done.returncode in (1, 2), (words, done.stdout, done.stderr)
        assert said in done.stderr, (words, done.stderr)
    assert not labs_root.exists() or not list(labs_root.glob("*"))
    labs_root.mkdir(exist_ok=True)
