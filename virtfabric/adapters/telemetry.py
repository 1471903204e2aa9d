"""The host's own load: `ports.HostLoad`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping


class PsutilLoad:
    """Implements `ports.HostLoad`; percentages are since the sample before."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        # The first reading has nothing to compare with and is always 0.
        psutil.cpu_percent(interval=None)
        self._process.cpu_percent(interval=None)

    def sample(self) -> Mapping[str, float]:
        """`cpu_percent`, `memory_available`, `agent_rss`, `agent_cpu_percent`."""
        return {
            "cpu_percent": psutil.cpu_percent(interval=None),
            "memory_available": float(psutil.virtual_memory().available),
            "agent_rss": float(self._process.memory_info().rss),
            "agent_cpu_percent": self._process.cpu_percent(interval=None),
        }
