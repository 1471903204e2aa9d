"""Events of a simulated host, delivered in a thread of their own as libvirt's are."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from virtfabric.ports import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Callable


class SimulatedEvents:
    """Implements `ports.EventSource`.

    Attributes:
        count: events queued so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin delivering, with CONNECTED first; what happened before is not told."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(deliver,), name="simulated-events", daemon=True
        )
        self._thread.start()
        self.emit(Event(EventKind.CONNECTED))

    def close(self) -> None:
        """Deliver what waits, then stop; safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def emit(self, event: Event) -> None:
        """Queue an event; dropped when nobody listens."""
        if self._thread is not None:
            self.count += 1
            self._queue.put(event)

    def drain(self) -> None:
        """Wait until everything queued so far was delivered (for tests)."""
        self._queue.join()

    def _run(self, deliver: Callable[[Event], None]) -> None:
        while True:
            event = self._queue.get()
            try:
                if event is None:
                    return
                deliver(event)
            finally:
                self._queue.task_done()
