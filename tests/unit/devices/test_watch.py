"""The watch: emulated hot-plug (umockdev), and what this kernel tells of interfaces and mounts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.pci.watch import LONGEST_S, QUIET_S, DeviceWatcher

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
DEADLINE_S = 20
private_namespaces = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has namespaces of its own everywhere"
)


def test_hot_plug_events() -> None:
    done = subprocess.run(
        ["umockdev-wrapper", sys.executable, str(HERE / "hotplug_bed.py")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    port, nic = {"0000:00:10.0": [None, None, []]}, "0000:01:00.0"
    assert told["seen"] == {
        "add": port | {nic: [None, None, []]},
        "net": port | {nic: [None, None, ["eth0"]]},
        "bind": port | {nic: ["igb", None, ["eth0"]]},
        "unbind": port | {nic: [None, None, ["eth0"]]},
        "remove": port,
    }
    assert told["threads"] == ["devices"]
    assert told["alive"] == []
    assert told["after_close"] == 0


class Calls:
    """Counts the calls of a watch, with their times."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.times) >= count, DEADLINE_S)


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """A procfs whose `mountinfo` never tells anything: a plain file."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("")
    return tmp_path


IN_NAMESPACES = """
import subprocess, sys, threading
from pathlib import Path
from virtfabric.adapters.pci.watch import DeviceWatcher
told = threading.Event()
watcher = DeviceWatcher(told.set, proc=Path("/proc"))
subprocess.run(sys.argv[1], shell=True, check=True)
watcher.start()
for command in sys.argv[2:]:
    told.clear()
    subprocess.run(command, shell=True, check=True)
    assert told.wait(20), command
watcher.close()
print("heard", len(sys.argv) - 2)
"""


def in_namespaces(*commands: str) -> str:
    """Watch in network and mount namespaces of its own; the first command goes before."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, "-c", IN_NAMESPACES, *commands],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@private_namespaces
def test_interfaces_that_go_up_or_join_a_bridge() -> None:
    """No uevent tells of either."""
    told = in_namespaces(
        "ip link add eth7 type veth peer name eth8 && ip link add br7 type bridge",
        "ip link set eth7 up",
        "ip link set eth8 master br7",
        "ip link set eth7 down",
    )
    assert told == "heard 3\n"


@private_namespaces
def test_mounts(tmp_path: Path) -> None:
    told = in_namespaces("true", f"mount -t tmpfs x {tmp_path}", f"umount {tmp_path}")
    assert told == "heard 2\n"


class Source(DeviceWatcher):
    """A watch with one more source: a pipe."""

    def __init__(self, changed: Calls, proc: Path) -> None:
        super().__init__(changed, proc=proc)
        self.reading, self.writing = os.pipe()
        self._add(self.reading, 1, lambda: os.read(self.reading, 1 << 16))

    def tell(self) -> None:
        os.write(self.writing, b"x")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def source(calls: Calls, mounts: Path) -> Iterator[Source]:
    watcher = Source(calls, mounts)
    watcher.start()
    yield watcher
    watcher.close()
    os.close(watcher.reading)
    os.close(watcher.writing)


def test_a_burst_is_told_once(source: Source, calls: Calls) -> None:
    for _ in range(50):
        source.tell()
    calls.wait_for(1)
    since = time.monotonic()
    source.tell()
    calls.wait_for(2)
    assert len(calls.times) == 2
    assert calls.times[1] - since >= QUIET_S


def test_a_burst_that_does_not_end_is_told_meanwhile(source: Source, calls: Calls) -> None:
    ended = threading.Event()

    def stream() -> None:
        while not ended.wait(QUIET_S / 5):
            source.tell()

    sender = threading.Thread(target=stream)
    since = time.monotonic()
    sender.start()
    calls.wait_for(2)
    ended.set()
    sender.join()
    assert calls.times[1] - since >= LONGEST_S


def test_a_listener_that_fails_is_told_of_the_next(
    mounts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()

    def changed() -> None:
        calls()
        raise RuntimeError("listener")

    watcher = Source(changed, mounts)
    watcher.start()
    watcher.tell()
    calls.wait_for(1)
    watcher.tell()
    calls.wait_for(2)
    watcher.close()
    assert "telling it failed" in caplog.text


def open_descriptors() -> set[str]:
    """Numbers and what they lead to, without the directory that is read for this."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(f"{entry.name} {entry.readlink()}")
    return found


def test_closing(mounts: Path) -> None:
    """It ends the thread and leaves no descriptor, is safe to repeat, also before the start."""
    before = open_descriptors()
    watcher = DeviceWatcher(Calls(), proc=mounts)
    watcher.close()
    watcher = DeviceWatcher(Calls(), proc=mounts)
    watcher.start()
    assert "devices" in {thread.name for thread in threading.enumerate()}
    watcher.close()
    watcher.close()
    assert "devices" not in {thread.name for thread in threading.enumerate()}
    assert open_descriptors() == before


def test_closing_from_the_listener_itself(mounts: Path) -> None:
    closed = threading.Event()

    def changed() -> None:
        watcher.close()
        closed.set()

    watcher = Source(changed, mounts)
    watcher.start()
    watcher.tell()
    assert closed.wait(DEADLINE_S)
