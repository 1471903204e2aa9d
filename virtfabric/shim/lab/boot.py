"""Watches a lab come up: QEMU first, then what its PID 1 says on the console.

Owns the words "VFLAB <uptime> <what>" and what is shown when they do not come.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.shim.lab.place import LabError, Place, find_processes, has_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

READY: Final = "ready"
_TOLD: Final = re.compile(r"VFLAB (\d+\.\d+ )?(.*)")
_LAST_LINES: Final = 25
_TRIPLE_FAULT: Final = "Triple fault"
_LOOK_S: Final = 0.1
_QEMU_S: Final = 30.0
_FIRST_TO_GO: Final = "1000"
"""For the OOM killer (proc(5)); libvirt leaves it at 0 for guests."""


def read_told(place: Place) -> list[str]:
    """What the lab has told of itself, in order, such as "12.3 s: reachable"."""
    try:
        lines = place.console_log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = (_TOLD.search(line) for line in lines)
    return [f"{m[1].strip()} s: {m[2].strip()}" if m[1] else m[2].strip() for m in found if m]


def read_last_words(place: Place) -> list[str]:
    """The last lines of what its QEMU said: of a lab that is dead, why."""
    words = [*_lines(place.qemu_log), *(w for w in _lines(place.cpu_log) if w == _TRIPLE_FAULT)]
    return words[-_LAST_LINES:]


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines() if log.exists() else []


def is_ready(place: Place) -> bool:
    """Whether it has come up."""
    told = read_told(place)
    return bool(told) and told[-1].endswith(f": {READY}")


def start_qemu(place: Place, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the lab's QEMU. Where memory runs out, a lab ends before anybody's guests."""
    with place.qemu_log.open("wb") as log:
        qemu = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    with contextlib.suppress(OSError):  # it has ended at once: that is told by who waits for it
        Path(f"/proc/{qemu.pid}/oom_score_adj").write_text(_FIRST_TO_GO)
    return qemu


def wait_for_qemu(place: Place, qemu: subprocess.Popen[bytes]) -> None:
    """Wait until QEMU runs the machine.

    Raises:
        LabError: it refused to; `log` is what it said.
    """
    deadline = time.monotonic() + _QEMU_S
    while place.read_pid() is None or not place.monitor_socket.exists():
        if qemu.poll() is not None or time.monotonic() > deadline:
            raise failure(place, "its QEMU did not start")
        time.sleep(_LOOK_S)


def wait_until_ready(place: Place, report: Callable[[str], None], timeout_s: float) -> None:
    """Wait for the lab's "ready", passing on what it tells on the way.

    Raises:
        LabError: QEMU ended, something failed, or it took too long; `log` has the last lines of
            the console.
    """
    pid = place.read_pid()
    if pid is None:
        raise failure(place, "its QEMU ended at once")
    deadline = time.monotonic() + timeout_s
    shown = 0
    handle = os.pidfd_open(pid)
    try:
        while True:
            told = read_told(place)
            for line in told[shown:]:
                report(line)
                if "failed" in line:
                    raise failure(place, line)
            shown = len(told)
            if is_ready(place):
                return
            if time.monotonic() > deadline:
                raise failure(place, f"it was not ready after {timeout_s:.0f} s")
            if select.select([handle], [], [], _LOOK_S)[0]:
                raise failure(place, "its QEMU ended")
    finally:
        os.close(handle)


def end_qemu(place: Place, timeout_s: float = 10.0) -> None:
    """End the lab's QEMU, as pulling the plug does; nothing happens when it is gone."""
    for pid in find_processes(place.qemu_words):
        _end(pid, place.qemu_words, timeout_s)


def _end(pid: int, words: tuple[str, str], timeout_s: float) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not has_words(pid, words):
            return  # it was gone, and its number is another's
        for signum in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, signum)
            if select.select([handle], [], [], timeout_s)[0]:
                return
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def failure(place: Place, why: str, said: Sequence[str] = ()) -> LabError:
    """What to raise for a lab that does not come up.

    Args:
        place: its.
        why: in a few words.
        said: last lines of what failed, where that is neither its console nor its QEMU.
    """
    lines: list[str] = []
    for title, last in (
        ("its console", _lines(place.console_log)),
        ("its QEMU", _lines(place.qemu_log)),
        ("what failed", said),
    ):
        last_lines = [f"  {line}" for line in last[-_LAST_LINES:]]
        lines += [f"last lines of {title}:", *last_lines] if last_lines else []
    return LabError(
        f"lab {place.name} did not come up: {why}",
        log=lines,
        advice="try again on a quieter machine or with a longer --timeout, with --keep to look at "
        "what is left, or `virtfabric lab build --again` if the image may be damaged",
    )
