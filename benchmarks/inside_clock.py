"""For scripts in a host: a command is timed until it returns and until the guest tells of it.

The standard library alone, as a script's start is not measured either.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

PATIENCE_S = 600.0


def count_said(guest: str, words: str) -> int:
    """How often a guest said this."""
    console = Path(f"/var/log/libvirt/qemu/{guest}-console.log")
    return console.read_text(errors="replace").count(words)


def await_said(guest: str, words: str, count: int) -> None:
    """Until it said this so often; ends the script when it cannot any more."""
    tick, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while count_said(guest, words) < count:
        if not Path(f"/run/libvirt/qemu/{guest}.pid").exists():
            raise SystemExit(f"{guest} does not run any more")
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} did not say {words!r}")
        tick.wait(0.02)


def run(*argv: str) -> str:
    """What a command prints that has to succeed."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done.stdout


def measure(guest: str, argv: list[str], words: str) -> tuple[float, float, str]:
    """Seconds until the command returned, and until the guest said it; what the command printed."""
    before = count_said(guest, words)
    said_at: list[float] = []

    def watch() -> None:
        await_said(guest, words, before + 1)
        said_at.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    began = time.monotonic()
    watcher.start()
    printed = run(*argv)
    returned = time.monotonic() - began
    watcher.join()
    if not said_at:
        raise SystemExit(f"{guest} did not say {words!r}")
    return returned, said_at[0] - began, printed
