"""Waiting for a guest: woken by events, bounded by a deadline, ended by the caller's cancel."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

from virtfabric.model.errors import StepCancelledError
from virtfabric.ports import EventKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.ports import Event

T = TypeVar("T")
_FIRST_POLL_S: Final = 0.002
_LAST_POLL_S: Final = 0.05
_MOVES: Final = frozenset(
    {
        EventKind.MEMORY,
        EventKind.VCPUS,
        EventKind.DEVICE_REMOVED,
        EventKind.STOPPED,
        EventKind.CONNECTED,
    }
)


class Pulse:
    """Wakes everybody who waits when an event says that something may have moved."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._count = 0

    def hear(self, event: Event) -> None:
        """Take notice of an event; never blocks."""
        if event.kind in _MOVES:
            with self._moved:
                self._count += 1
                self._moved.notify_all()

    def wait_for(
        self,
        read: Callable[[], T],
        done: Callable[[T], bool],
        *,
        until: float,
        cancelled: threading.Event | None = None,
    ) -> T:
        """Read until `done` or `until` (of time.monotonic); the last value read.

        An event leads to a reading at once; without any (no event tells of a vCPU that came or
        went) the reading is repeated every 2 ms at first and every 50 ms in the end.

        Raises:
            StepCancelledError: the caller gave up. Whatever `read` raises.
        """
        pause = _FIRST_POLL_S
        while True:
            seen = self._count
            value = read()
            left = until - time.monotonic()
            if done(value) or left <= 0:
                return value
            if cancelled is not None and cancelled.is_set():
                raise StepCancelledError("cancelled by the caller")
            self._sleep(seen, min(pause, left))
            pause = min(pause * 1.5, _LAST_POLL_S)

    def _sleep(self, seen: int, timeout_s: float) -> None:
        """Until the count differs from `seen`, but `timeout_s` at most."""
        with self._moved:
            self._moved.wait_for(lambda: self._count != seen, timeout_s)
