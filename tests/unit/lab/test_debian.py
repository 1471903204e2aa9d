"""A build that is cut off takes mmdebstrap along, and what mmdebstrap started."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

BUILD = """
import sys
from pathlib import Path
from virtfabric.shim.lab.debian import unpack_debian
unpack_debian("trixie", ["hello"], Path(sys.argv[1]), report=print)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mmdebstrap builds as root")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_goes_on_building_after_the_builder(tmp_path: Path, end: signal.Signals) -> None:
    programs, alive = tmp_path / "programs", tmp_path / "alive"
    programs.mkdir()
    mmdebstrap = programs / "mmdebstrap"
    # it ignores what mmdebstrap ignores, and has a child that holds the lock as long as it lives
    mmdebstrap.write_text(
        f"#!/bin/sh\ntrap : INT TERM HUP\nexec 9> {alive}\nflock 9\nsleep 60 &\n"
        "echo 'I: downloading' >&2\nwait\nwait\n"
    )
    mmdebstrap.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-uc", BUILD, str(tmp_path / "target")],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as builder:  # fmt: skip
        assert builder.stdout is not None
        assert "downloading" in builder.stdout.readline()
        with alive.open() as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            builder.send_signal(end)
            builder.wait(20)
            assert _is_free(lock.fileno()), "its child lives on"


def _is_free(lock: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False
