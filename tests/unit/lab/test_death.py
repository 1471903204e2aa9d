"""A killed process's peers are told of an end of the stream, and of nothing worse."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.lab.death import kill_process

if TYPE_CHECKING:
    from collections.abc import Iterator

READ = struct.pack("<HHIIIQII", 1, 9, 32, 0, 0, 0, 0, 4)
"""A command of vfio-user."""
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def sleeper():
    """A process with one end of a connection that it never reads, and the other end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    with (
        ours,
        theirs,
        subprocess.Popen(
            [sys.executable, "-c", SLEEPER], pass_fds=[theirs.fileno()], stdout=subprocess.PIPE
        ) as process,
    ):
        process.stdout.readline()
        theirs.close()
        yield process, ours
        process.kill()


def test_what_it_never_read_is_no_reset_for_its_peer(sleeper):
    process, ours = sleeper
    ours.sendall(b"a request")
    kill_process(process.pid, patience_s=30)
    assert process.wait(30) == -signal.SIGKILL
    assert ours.recv(1) == b""


def test_a_plain_kill_is_one(sleeper):
    """What all this is for."""
    process, ours = sleeper
    ours.sendall(b"a request")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    with pytest.raises(ConnectionResetError):
        ours.recv(1)


def test_descriptors_that_nobody_took_are_closed(sleeper):
    process, ours = sleeper
    reads, writes = os.pipe()
    socket.send_fds(ours, [b"x"], [writes])
    os.close(writes)
    kill_process(process.pid, patience_s=30)
    with os.fdopen(reads, "rb") as end:
        assert end.read() == b""


def test_nothing_of_ours_stays_open(sleeper):
    process, _ = sleeper
    before = set(Path("/proc/self/fd").iterdir())
    kill_process(process.pid, patience_s=30)
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_one_that_is_gone_already():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    kill_process(process.pid, patience_s=1)


def test_a_number_that_is_anothers_by_now(sleeper):
    process, _ = sleeper
    kill_process(process.pid, words=("virtfabric.cli.cardd", "/a/card.toml"), patience_s=30)
    assert process.poll() is None
    kill_process(process.pid, words=("-c", SLEEPER), patience_s=30)
    assert process.wait(30) == -signal.SIGKILL


@contextmanager
def served(path: str, then: str) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection to a process that accepts it and then does something else."""
    server = (
        "import socket, sys, threading, time\n"
        "door = socket.socket(socket.AF_UNIX); door.bind(sys.argv[1]); door.listen()\n"
        f"client, _ = door.accept(); print('up', flush=True)\n{then}\n"
    )
    words = [sys.executable, "-c", server, path]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE) as process,
        socket.socket(socket.AF_UNIX) as ours,
    ):
        try:
            until = time.monotonic() + 30
            while ours.connect_ex(path):
                assert time.monotonic() < until
            assert process.stdout
            process.stdout.readline()
            yield ours, process
        finally:
            process.kill()


def test_a_client_s_connection_is_kept_with_what_nobody_read(tmp_path):
    path = str(tmp_path / "function.sock")
    with served(path, "threading.Event().wait()") as (ours, process):
        ours.sendall(READ)
        (kept,) = kill_process(process.pid, lambda bound: bound == path, patience_s=30)
        assert process.wait(30) == -signal.SIGKILL
        with kept:
            assert kept.recv(99) == READ
            kept.sendall(b"still there")
            assert ours.recv(99) == b"still there"


def test_threads_that_end_meanwhile_keep_nobody_alive(tmp_path):
    """Their /proc entries go while they are looked at."""
    path = str(tmp_path / "function.sock")
    busy = "while True: [threading.Thread(target=int).start() for _ in range(8)]"
    with served(path, busy) as (ours, process):
        ours.sendall(READ[16:])  # never a message's beginning: it is stopped many times
        (kept,) = kill_process(process.pid, lambda bound: bound == path, patience_s=30)
        kept.close()
        assert process.wait(30) == -signal.SIGKILL
