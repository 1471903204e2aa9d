"""Restarts libvirtd by the command that the configuration names, so that it learns of new nodes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S: Final = 60.0
_LAST: Final = 200
"""Characters of its complaint that are passed on."""


class CommandRestarter:
    """Implements `ports.Restarter`."""

    def __init__(self, command: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Nothing is run before `restart`; the command gets no shell."""
        self._command = tuple(command)
        self._timeout_s = timeout_s

    def restart(self) -> None:
        """Run it.

        Raises:
            HypervisorError: it cannot be run, fails, or takes too long.
        """
        words = " ".join(self._command)
        try:
            done = subprocess.run(
                self._command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=self._timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise HypervisorError(f"{words}: not done after {self._timeout_s:g} s") from None
        except OSError as error:
            raise HypervisorError(f"{words}: {error.strerror}") from error
        if done.returncode:
            said = done.stderr.strip()[-_LAST:] or f"exit code {done.returncode}"
            raise HypervisorError(f"{words}: {said}")
