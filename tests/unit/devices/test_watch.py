"""The watch: emulated hot-plug (umockdev), and what this kernel tells of interfaces and mounts."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfabric.adapters.pci.watch import LONGEST_S, QUIET_S, DeviceWatcher, parse_links

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.device import DeviceNews

HERE = Path(__file__).parent
DEADLINE_S = 20
PORT, NIC = "0000:00:10.0", "0000:01:00.0"
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
    assert told["about"] == {name: [nic] for name in told["seen"]} | {"vnet": [], "dm": None}
    assert told["threads"] == ["devices"]
    assert told["alive"] == []
    assert told["after_close"] == 0


class Calls:
    """Counts the calls of a watch, with their times and what they tell."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.news: list[DeviceNews] = []
        self._changed = threading.Condition()

    def __call__(self, news: DeviceNews) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self.news.append(news)
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
told, about = threading.Event(), []
def hear(news):
    about.append(news.functions)
    told.set()
watcher = DeviceWatcher(hear, sys=Path("/sys"), proc=Path("/proc"))
subprocess.run(sys.argv[1], shell=True, check=True)
watcher.start()
for command in sys.argv[2:]:
    told.clear()
    subprocess.run(command, shell=True, check=True)
    assert told.wait(20), command
watcher.close()
print("heard", len(sys.argv) - 2, "of", "any" if None in about else "some")
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
    """No uevent tells of either; those of no function are news of none."""
    told = in_namespaces(
        "ip link add eth7 type veth peer name eth8 && ip link add br7 type bridge",
        "ip link set eth7 up",
        "ip link set eth8 master br7",
        "ip link set eth7 down",
    )
    assert told == "heard 3 of some\n"


@private_namespaces
def test_mounts(tmp_path: Path) -> None:
    told = in_namespaces("true", f"mount -t tmpfs x {tmp_path}", f"umount {tmp_path}")
    assert told == "heard 2 of any\n"


class Source(DeviceWatcher):
    """A watch with one more source: a pipe."""

    def __init__(self, changed: Calls, proc: Path) -> None:
        super().__init__(changed, sys=Path("/sys"), proc=proc)
        self.reading, self.writing = os.pipe()
        self._add(self.reading, 1, self._hear)

    def _hear(self) -> None:
        for path in os.read(self.reading, 1 << 16).decode().split():
            self._note(path)

    def tell(self, path: str = f"/devices/pci0000:00/{NIC}") -> None:
        os.write(self.writing, f"{path} ".encode())


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


def test_a_burst_tells_of_every_function_once(source: Source, calls: Calls) -> None:
    began = time.monotonic()
    for path in (NIC, f"{PORT}/{NIC}/net/eth0", f"{PORT}/0000:01:10.0"):
        source.tell(f"/devices/pci0000:00/{path}")
    source.tell("/devices/virtual/net/vnet3")
    calls.wait_for(1)
    assert calls.news[0].functions == {NIC, "0000:01:10.0"}
    assert began < calls.news[0].at < calls.times[0]
    source.tell("/devices/virtual/net/vnet3")
    calls.wait_for(2)
    assert calls.news[1].functions == frozenset()
    source.tell("/devices/virtual/block/dm-0")
    source.tell()
    calls.wait_for(3)
    assert calls.news[2].functions is None


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    """One of rtnetlink about a link."""
    body = bytes(16)
    for what, content in attributes:
        padding = bytes(-len(content) % 4)
        body += struct.pack("=HH", 4 + len(content), what) + content + padding
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_the_interfaces_of_route_messages() -> None:
    up = message(16, (1, b"\x52\x54\0\0\0\1"), (3, b"eth0\0"), (4, bytes(4)))
    gone, other = message(17, (3, b"eth1\0")), message(16, (3, b"enp1s0f0v12\0"))
    assert list(parse_links(up + gone + other)) == ["eth0", "enp1s0f0v12"]


@given(st.binary(max_size=80), st.integers(0, 60))
def test_garbled_route_messages_end_and_hide_none_before_them(garbage: bytes, cut: int) -> None:
    whole = message(16, (3, b"eth0\0"))
    assert next(parse_links(whole + garbage)) == "eth0"
    told = (garbage + whole)[:cut]
    for name in parse_links(told):
        assert "\0" not in name
        assert len(name) < len(told)


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

    def changed(news: DeviceNews) -> None:
        calls(news)
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
    watcher = DeviceWatcher(Calls(), sys=Path("/sys"), proc=mounts)
    watcher.close()
    watcher = DeviceWatcher(Calls(), sys=Path("/sys"), proc=mounts)
    watcher.start()
    assert "devices" in {thread.name for thread in threading.enumerate()}
    watcher.close()
    watcher.close()
    assert "devices" not in {thread.name for thread in threading.enumerate()}
    assert open_descriptors() == before


def test_closing_from_the_listener_itself(mounts: Path) -> None:
    closed = threading.Event()

    def changed(news: DeviceNews) -> None:
        watcher.close()
        closed.set()

    watcher = Source(changed, mounts)
    watcher.start()
    watcher.tell()
    assert closed.wait(DEADLINE_S)
