"""A bus that does not let us in: one clear error, the documented exit code, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from virtfabric.cli.session import UNREACHABLE

COMMAND = [sys.executable, "-X", "dev", "-m", "virtfabric.cli.main"]
NO_SUCH_USER = 54321
AS_NO_SUCH_USER = f"""
import os, sys
from virtfabric.cli import main
main.build_parser()
os.setgroups([]); os.setgid({NO_SUCH_USER}); os.setuid({NO_SUCH_USER})
sys.exit(main.main(sys.argv[1:]))
"""
REJECT = (b"REJECTED EXTERNAL\r\n",)
LET_IN_AND_HANG_UP = (b"OK 0123456789abcdef0123456789abcdef\r\n",)


@pytest.fixture
def door(tmp_path):
    """Starts a bus that says some lines, one for each that it hears, and hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bus"))
    listener.listen()

    def answer(lines, *, read_on):
        peer, _ = listener.accept()
        with peer:
            for line in lines:
                peer.recv(4096)
                peer.sendall(line)
            if read_on:
                peer.recv(4096)

    threads = []

    def open_door(lines, *, read_on):
        threads.append(threading.Thread(target=answer, args=(lines,), kwargs={"read_on": read_on}))
        threads[-1].start()
        return f"unix:path={tmp_path}/bus"

    yield open_door
    for thread in threads:
        thread.join(10)
    listener.close()


def expect_one_error(done, address):
    assert done.returncode == UNREACHABLE, done.stderr
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("virtfabric: the agent does not answer on the bus")
    assert address in first
    assert second.startswith("  advice: ")


@pytest.mark.parametrize("read_on", [True, False], ids=["end of file", "reset"])
@pytest.mark.parametrize("lines", [REJECT, LET_IN_AND_HANG_UP], ids=["rejected", "at hello"])
def test_a_bus_that_hangs_up(door, lines, read_on):
    address = door(lines, read_on=read_on)
    done = subprocess.run(
        [*COMMAND, "--bus", address, "status"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    expect_one_error(done, address)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_that_the_host_does_not_know(bus):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", AS_NO_SUCH_USER, "--bus", bus.address, "status"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    expect_one_error(done, bus.address)
