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
        silent_s = time.time() - console.stat().st_mtime if console.exists() else 0.0
        if silent_s > _SILENT_S and _runs(host, name):
            yield f"{PREFIX}guest {name} runs and has said nothing for {silent_s:.0f} s"


def _read_last_words(console: Path) -> list[str]:
    """Why its kernel fell, as far as it says so; else what it said last beside its reports."""
    text = console.read_text(errors="replace") if console.exists() else ""
    lines = [line.strip() for line in text.splitlines() if "VFSTAT" not in line and line.strip()]
    return ([line for line in lines if _WHY.search(line)] or lines)[-4:]


def _runs(host: LabHost, name: str) -> bool:
    try:
        return host.virsh("domstate", name, check=False).stdout.strip() == "running"
    except SandboxError:  # libvirtd hangs, or the host is gone
        return False
