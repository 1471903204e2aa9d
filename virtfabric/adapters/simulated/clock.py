"""Time that moves when it is told to."""

from __future__ import annotations

import threading
from typing import Final

DEFAULT_START: Final = 1_700_000_000.0


class SimulatedClock:
    """Implements `ports.Clock`."""

    def __init__(self, start: float = DEFAULT_START) -> None:
        self._lock = threading.Lock()
        self._start = start
        self._passed = 0.0

    def now(self) -> float:
        """UNIX seconds."""
        with self._lock:
            return self._start + self._passed

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        with self._lock:
            return self._passed

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        with self._lock:
            self._passed += seconds
