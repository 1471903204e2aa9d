"""Starting processes in a PID namespace, and waiting for what they do.

Knows no sandbox: only how a process of this one gets inside.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CLONE_NEWPID: Final = 0x20000000  # linux/sched.h
_POLL_S: Final = allow(0.01)


class SandboxError(Exception):
    """A sandbox, or a command in it, failed; the message ends with the last lines of its log."""


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    """Polls `condition` until it holds.

    Raises:
        SandboxError: it did not hold within `timeout_s` seconds (times this machine's patience).
    """
    timeout_s = allow(timeout_s)
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_POLL_S)


def read_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error's message."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"({error})"
    return "\n".join(text.splitlines()[-lines:])


def call_libc(function: str, *arguments: int) -> None:
    """Calls what Python has no wrapper for.

    Raises:
        SandboxError: it failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise SandboxError(f"{function}: {os.strerror(code)} (sandboxes need root)")


def popen_into(choose: Callable[[], None], argv: Sequence[str], **kw: Any) -> subprocess.Popen[str]:
    """Popen from a thread whose children go into the PID namespace that `choose` selects.

    The kernel keeps that choice for each thread, so a thread that ends at once leaves the caller
    alone. Compared with `unshare` or `nsenter` there is no process in between: the Popen *is* the
    process inside, its pid (the host's view) can be signalled and its exit status is its own.
    """

    def start() -> subprocess.Popen[str]:
        choose()
        return subprocess.Popen(argv, text=True, **kw)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(start).result()
