"""`cxl` and `daxctl` of ndctl: the programs that change CXL memory, and ask memdevs how they do.

They are used for changes because they know the sequence of writes to sysfs (decoders in order,
capacity before targets, then the commit, then the driver), and are kept by the kernel's CXL people.
Reading goes by sysfs itself (`inventory`): no program has to be started for it.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.model.errors import CxlError, StepCancelledError

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

LOG = logging.getLogger(__name__)
_LOOK_S: Final = 0.1
"""How often a program that runs is asked whether it has ended, and its caller whether he waits."""
_END_S: Final = 5.0
"""A program that was told to end has this long before it is killed."""
_SAID: Final = 300


class Tool(Protocol):
    """Runs a program."""

    def __call__(
        self,
        command: Sequence[str],
        *,
        deadline_s: float,
        cancelled: threading.Event | None = None,
    ) -> str:
        """What it prints on stdout.

        Raises:
            CxlError: it is not installed, failed, or was not done in time and was ended.
            StepCancelledError: the caller gave up, and it was ended.
        """


def run_tool(
    command: Sequence[str], *, deadline_s: float, cancelled: threading.Event | None = None
) -> str:
    """A `Tool`, for real.

    It runs in a session of its own: a signal ends what it waits for in the kernel. Taking a block
    of memory offline retries for ever there, and looks at signals in between (mm/memory_hotplug.c).
    It dies with the thread that waits for it: after a kill of the agent, the next one undoes what
    is there, and nothing more must come of a program that nobody knows of.
    """
    try:
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        process = subprocess.Popen(
            [*_mortally(), *command], stdin=subprocess.DEVNULL, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except OSError as error:
        raise CxlError(
            f"{command[0]} cannot be run: {error.strerror}",
            advice="install the packages cxl and daxctl (of ndctl)",
        ) from error
    until = time.monotonic() + deadline_s
    while True:
        try:
            said, complained = process.communicate(timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            gave_up = cancelled is not None and cancelled.is_set()
            if not gave_up and time.monotonic() < until:
                continue
            _end(process)
            if gave_up:
                raise StepCancelledError(f"{shlex.join(command)}: cancelled") from None
            raise CxlError(f"{shlex.join(command)}: not done in {deadline_s:g} s") from None
        if process.returncode:
            text = "; ".join(complained.split("\n"))[:_SAID].strip("; ")
            raise CxlError(f"{shlex.join(command)}: {text or f'exit code {process.returncode}'}")
        LOG.debug("%s: done", shlex.join(command))
        return said


def _mortally() -> Sequence[str]:
    """setpriv(1) of util-linux: code of ours between fork and exec may hang where threads run."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
