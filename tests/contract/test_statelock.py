"""One agent for one state directory: locks between objects and between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtfabric.adapters.statelock import StateLock
from virtfabric.model.errors import AlreadyRunningError, JournalError

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys
from pathlib import Path
from virtfabric.adapters.statelock import StateLock
StateLock(Path(sys.argv[1]), "x").acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "lock"
    first = StateLock(path, "state directory /here")
    second = StateLock(path, "state directory /here")
    with first:
        assert first.held
        assert first.acquire() is first
        with pytest.raises(AlreadyRunningError, match=f"state directory /here.*{os.getpid()}"):
            second.acquire()
        assert not second.held
    first.release()
    with second:
        assert path.read_text() == f"{os.getpid()}\n"


def test_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "lock"
    path.write_text("99999999999\nold and longer than a process id\n")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        lock = StateLock(path, "libvirtd socket /s")
        with pytest.raises(
            AlreadyRunningError, match=f"socket /s.* process {child.pid} "
        ) as caught:
            lock.acquire()
        assert caught.value.advice
        child.kill()
        child.wait()
        lock.acquire().release()


def test_lock_that_cannot_be_made_is_told(tmp_path):
    with pytest.raises(JournalError, match="nowhere"):
        StateLock(tmp_path / "nowhere" / "lock", "x").acquire()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(JournalError, match="link"):
        StateLock(tmp_path / "link", "x").acquire()
    assert not (tmp_path / "target").exists()
