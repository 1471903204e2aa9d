"""A look that may hang in the kernel, waited for so long and no longer.

Reading a function's configuration space waits while the kernel resets it: up to a minute for one
whose link is dead (`PCIE_RESET_READY_POLL_MS`). Who asks what there is gets what was seen last.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class Glance:
    """Makes one look at a time, in a thread of its own. Thread-safe."""

    def __init__(self, look: Callable[[], object]) -> None:
        """`look` stores what it sees."""
        self._look = look
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def within(self, seconds: float) -> bool:
        """Look, or join the look that hangs; whether it ended in this time."""
        with self._lock:
            thread = self._thread
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._run, name="glance", daemon=True)
                thread.start()
                self._thread = thread
        thread.join(seconds)
        if thread.is_alive():
            log.warning("the kernel does not tell of PCIe functions within %g s", seconds)
            return False
        return True

    def _run(self) -> None:
        try:
            self._look()
        except Exception:
            log.exception("looking at the PCIe functions failed")
