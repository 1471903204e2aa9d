"""A slice's bandwidth limit: how long to wait after so many bytes. Pure."""

from __future__ import annotations


class Pace:
    """Bytes over time; what was not used within the last tenth of a second is lost."""

    _BURST_S = 0.1

    def __init__(self) -> None:
        self._free_at = 0.0

    def charge(self, moved: int, limit: int, now: float) -> float:
        """Seconds to wait before moving more.

        Args:
            moved: bytes that were moved.
            limit: Mbit/s; 0 for none.
            now: monotonic seconds.
        """
        if not limit:
            return 0.0
        self._free_at = max(self._free_at, now - self._BURST_S) + moved * 8 / (limit * 1_000_000)
        return max(0.0, self._free_at - now)
