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

    from virtfabric.ports import Clock

log = logging.getLogger(__name__)


class Glance:
    """Makes one look at a time, in a thread of its own. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._looking = threading.Lock()

    def within(self, seconds: float, look: Callable[[], object]) -> bool:
        """Look, after the look that is being made; whether it ended in this time."""
        until = self._clock.monotonic() + seconds
        if self._looking.acquire(timeout=seconds):
            thread = threading.Thread(target=self._run, args=(look,), name="glance", daemon=True)
            thread.start()
            thread.join(max(0.0, until - self._clock.monotonic()))
            if not thread.is_alive():
                return True
        log.warning("the kernel does not tell of PCIe functions within %g s", seconds)
        return False

    def _run(self, look: Callable[[], object]) -> None:
        try:
            look()
        except Exception:
            log.exception("looking at the PCIe functions failed")
        finally:
            self._looking.release()
