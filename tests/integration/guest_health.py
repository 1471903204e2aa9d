"""Guests that hang or fell over by no doing of what is tested.

An emulated host's guests do so now and then (docs/lab.md). What is found is told beside a failure,
a line each that begins with `PREFIX`; `tests/lab/test_agent_in_lab.py` then takes a new lab.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final

from virtfabric.shim.sandbox_process import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab_host import LabHost

PREFIX: Final = "emulator: "
_SILENT_S: Final = 90
"""A guest that runs says something every second; one with a small cap in a busy lab every three."""
_STUCK: Final = re.compile(r"soft lockup - CPU#\d+ stuck for (\d+)s")
_STUCK_S: Final = 60
"""Its kernel still says so every 20 s, so that it is not silent."""
_WHY: Final = re.compile(r"panic|BUG|Oops|RIP:")
_FELL: Final = "shutting down, reason=shutdown"


def find_faults(host: LabHost) -> Iterator[str]:
    """Which of its guests have hung or ended by themselves, and how that shows."""
    for name in host.guests:
        log = host.box.path(f"/var/log/libvirt/qemu/{name}.log")
        if log.exists() and _FELL in log.read_text(errors="replace"):
            words = " | ".join(_read_last_words(host.console(name)))
            yield f"{PREFIX}guest {name} ended by itself (libvirt: {_FELL}); it said: {words}"
            continue
        console = host.console(name)
        stuck_s = _read_stuck(console)
        if stuck_s >= _STUCK_S and _runs(host, name):
            yield f"{PREFIX}guest {name} runs and is stuck for {stuck_s} s, by its kernel"
            continue
        silent_s = time.time() - console.stat().st_mtime if console.exists() else 0.0
        if silent_s > _SILENT_S and _runs(host, name):
            yield f"{PREFIX}guest {name} runs and has said nothing for {silent_s:.0f} s"


def _read(console: Path) -> str:
    return console.read_text(errors="replace") if console.exists() else ""


def _read_stuck(console: Path) -> int:
    """For how many seconds one of its vCPUs has done nothing else, since its last report."""
    since = _read(console).rpartition("VFSTAT")[2]
    return max(map(int, _STUCK.findall(since)), default=0)


def _read_last_words(console: Path) -> list[str]:
    """Why its kernel fell, as far as it says so; else what it said last beside its reports."""
    lines = [line.strip() for line in _read(console).splitlines()]
    lines = [line for line in lines if line and "VFSTAT" not in line]
    return ([line for line in lines if _WHY.search(line)] or lines)[-4:]


def _runs(host: LabHost, name: str) -> bool:
    try:
        return host.virsh("domstate", name, check=False).stdout.strip() == "running"
    except SandboxError:  # libvirtd hangs, or the host is gone
        return False
