"""A lab's life without a QEMU: who may be at work on it, what is left, what is refused before."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.shim.guestimage import GuestImage
from virtfabric.shim.lab import lab
from virtfabric.shim.lab.cards import cards_of
from virtfabric.shim.lab.image import LabImage
from virtfabric.shim.lab.outer import OuterQemu
from virtfabric.shim.lab.place import LabError, Place, place_of
from virtfabric.shim.lab.remote import Keys
from virtfabric.shim.topology.shipped import read_shipped_topology

if TYPE_CHECKING:
    from collections.abc import Iterator

TOPOLOGY = read_shipped_topology("small")


@pytest.fixture
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Of a lab that is not there yet."""
    monkeypatch.setenv("VIRTFABRIC_LABS", str(short_path))
    return place_of("one")


def bring_up(place: Place) -> lab.Status:
    return lab.up(TOPOLOGY, name=place.name, title="small", report=[].append)


def left(place: Place) -> list[str]:
    return sorted(path.name for path in place.directory.parent.iterdir())


def test_while_a_lab_starts_no_other_command_is_at_work_on_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(*_: Any) -> None:
        started.append(place.directory.exists())
        if len(started) == 1:
            for command in (lambda: bring_up(place), lambda: lab.down(place.name)):
                with pytest.raises(LabError, match="is at work on it"):
                    command()
        raise LabError("that is enough")

    monkeypatch.setattr(lab, "_start", start)
    with pytest.raises(LabError, match="that is enough"):
        bring_up(place)
    assert started == [True]
    assert left(place) == []


def test_a_lock_that_was_taken_away_meanwhile_is_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is opened; then who ended the lab takes that file away, and lets go of it."""
    flock, opened = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not opened:
            (place.directory.parent / ".one.lock").unlink()
        opened.append(file)
        flock(file, how)

    place.directory.mkdir()
    monkeypatch.setattr(fcntl, "flock", late)
    with place.locked(), pytest.raises(LabError, match="is at work on it"), place.locked():
        pass
    assert left(place) == [".one.lock", "one"]


@contextlib.contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


def test_only_its_qemu_ends_with_a_lab(place: Place) -> None:
    """It is known by `-pidfile`; who reads that file, or names it otherwise, is none."""
    place.directory.mkdir()
    place.pid_file.write_text("1\n")
    pid_file = str(place.pid_file)
    with (
        running("tail", "-f", pid_file) as reader,
        running(sys.executable, "-c", SLEEPER, "-pidfile", f"{pid_file}.other", pid_file) as other,
        running(sys.executable, "-c", SLEEPER, "-pidfile", pid_file, "-no-reboot") as qemu,
    ):
        assert reader.stdout is not None
        assert reader.stdout.readline() == "1\n"
        for process in (other, qemu):
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
        place.pid_file.write_text(f"{reader.pid}\n")
        assert place.read_pid() is None
        place.pid_file.write_text(f"{qemu.pid}\n")
        assert place.read_pid() == qemu.pid
        assert lab.down(place.name)
        assert qemu.wait(10) == -15
        assert (reader.poll(), other.poll()) == (None, None)


def test_a_lab_that_is_being_started_is_not_dead(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any) -> None:
        """As while an image is built."""
        assert [(one.name, one.state) for one in lab.read_labs()] == [("one", "starting")]
        with pytest.raises(LabError, match="lab one is starting"):
            lab.connect("one")
        raise LabError("that is enough")

    monkeypatch.setattr(lab, "_start", start)
    with pytest.raises(LabError, match="that is enough"):
        bring_up(place)
    place.directory.mkdir()
    assert lab.read_status(place).state is lab.State.DEAD
    with place.locked():
        assert lab.read_status(place).state is lab.State.STARTING
    place.lock.touch()
    assert lab.read_status(place).state is lab.State.DEAD


def test_a_killed_up_leaves_nothing_of_the_payload_outside_the_lab(
    place: Place, tmp_path: Path
) -> None:
    place.directory.mkdir()
    tools, parts, elsewhere = (tmp_path / name for name in ("tools", "parts", "elsewhere"))
    for directory in (tools, parts, elsewhere):
        directory.mkdir()
    for name in ("vmlinux", "initrd", "host", "client.pub"):
        (parts / name).write_text(name)
    mke2fs = tools / "mke2fs"
    mke2fs.write_text("#!/bin/sh\nkill -KILL $PPID\n")
    mke2fs.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from virtfabric.shim.guestimage import GuestImage\n"
        "from virtfabric.shim.lab.payload import write_payload\n"
        "from virtfabric.shim.lab.remote import Keys\n"
        "disk, parts = map(Path, sys.argv[1:])\n"
        "write_payload(disk, GuestImage(parts / 'vmlinux', parts / 'initrd'), Keys(parts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, place.payload, parts],
        check=False,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TMPDIR": str(elsewhere), "PATH": f"{tools}:{os.environ['PATH']}"},
        timeout=60,
    )
    assert done.returncode == -9
    assert not [*elsewhere.iterdir()]
    assert [*place.directory.iterdir()], "it is cut off in the middle"
    assert lab.down(place.name)
    assert not place.directory.exists()


QEMU = """
import os, re, socket, sys, time
words = sys.argv
port = re.search("hostfwd=tcp:127.0.0.1:([0-9]+)-", " ".join(words))[1]
door = socket.socket(); door.bind(("127.0.0.1", int(port)))
monitor = socket.socket(socket.AF_UNIX)
monitor.bind(re.search("unix:([^,]*)", words[words.index("-qmp") + 1])[1])
with open(words[words.index("-pidfile") + 1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""
"""As far as a lab's start looks at one."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A lab without images, and with a program of our own for QEMU."""
    program = tmp_path / "parts" / "qemu.py"
    program.parent.mkdir()
    program.write_text(QEMU)
    image = LabImage(*(program.with_name(name) for name in ("vmlinux", "initrd", "root")))
    for name, made in {
        "choose_outer": OuterQemu((sys.executable, str(program)), "a test's"),
        "ensure_lab_image": image,
        "ensure_guest_image": GuestImage(image.kernel, image.initrd),
        "choose_accel": ("tcg", ""),
        "ensure_keys": Keys(tmp_path),
        "write_payload": None,
    }.items():
        monkeypatch.setattr(lab, name, lambda *_, made=made, **__: made)
    return monkeypatch


def test_a_port_that_is_taken_while_the_payload_is_made_is_not_the_labs(
    place: Place, stand_in: pytest.MonkeyPatch
) -> None:
    with socket.socket() as somebody:

        def write_payload(*_: Any) -> None:
            if record := place.read_record():
                somebody.bind(("127.0.0.1", record.port))

        stand_in.setattr(lab, "write_payload", write_payload)
        place.directory.mkdir()
        try:
            lab._start(TOPOLOGY, place, "small", [].append)
            assert place.read_pid() is not None
            record = place.read_record()
            assert record is not None
            with pytest.raises(OSError, match="in use"):
                somebody.bind(("127.0.0.1", record.port))
        finally:
            lab.down(place.name)


def test_a_qemu_that_does_not_start_says_why_and_what_to_try(
    place: Place, stand_in: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "parts" / "qemu.py").write_text("raise SystemExit('qemu: no such device')")
    with pytest.raises(LabError, match="lab one did not come up: its QEMU did not start") as caught:
        bring_up(place)
    assert caught.value.log == ("last lines of its QEMU:", "  qemu: no such device")
    assert "--keep" in caught.value.advice


def test_a_card_that_does_not_start_shows_the_labs_console_too(
    place: Place, stand_in: pytest.MonkeyPatch
) -> None:
    topology = read_shipped_topology("card")

    def wait_until_ready(*_: Any) -> None:
        place.console_log.write_text("VFLAB 1.0 ready\n")
        for card in cards_of(topology, place):
            card.description.write_text("version = 2\n")

    stand_in.setattr(lab, "wait_until_ready", wait_until_ready)
    with pytest.raises(LabError, match="lab one did not come up: card card0 did not start") as why:
        lab.up(topology, name="one", title="card", report=[].append)
    assert "  VFLAB 1.0 ready" in why.value.log
    assert "version: 2 is not" in "\n".join(why.value.log)
    assert "--keep" in why.value.advice
