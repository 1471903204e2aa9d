"""Work that hooks and events leave behind: in order for one guest, side by side for different ones.

Owns the threads. It knows nothing of guests: a key is whatever has an order of its own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import HypervisorGoneError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Work = Callable[[], None]

log = logging.getLogger(__name__)

WORKERS: Final = 8
"""Guests that are settled side by side; half of the plans that may run, so that requests do too."""


class Errands:
    """A queue for each key, worked off by a bounded pool. Thread-safe."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._changed = threading.Condition()
        self._queues: dict[Hashable, deque[tuple[Work, threading.Event]]] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lifecycle")
        self._closed = False
        self._count = 0

    @property
    def count(self) -> int:
        """Errands put so far: where it is the same twice, none was put in between."""
        return self._count

    def put(self, key: Hashable, work: Work) -> threading.Event:
        """Do this after everything with the same key; what is answered is set when it is done.

        After `close` nothing is done any more.
        """
        done = threading.Event()
        with self._changed:
            if self._closed:
                done.set()
                return done
            self._count += 1
            queue = self._queues.setdefault(key, deque())
            queue.append((work, done))
            if len(queue) == 1:
                self._pool.submit(self._run_next, key)
        return done

    def flush(self, key: Hashable, wait_s: float) -> bool:
        """Wait until all that is queued now with this key is done; False when it took longer."""
        return self.put(key, lambda: None).wait(wait_s)

    def drain(self, wait_s: float | None = None) -> bool:
        """Wait until nothing is queued at all; False when it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queues, wait_s)

    def close(self) -> None:
        """Finish what is queued, and stop; safe to repeat."""
        self.drain()
        with self._changed:
            self._closed = True
        self._pool.shutdown(wait=True)

    def _run_next(self, key: Hashable) -> None:
        with self._changed:
            work, done = self._queues[key][0]
        _run(work)
        done.set()
        with self._changed:
            queue = self._queues[key]
            queue.popleft()
            if queue:
                self._pool.submit(self._run_next, key)
            else:
                del self._queues[key]
                self._changed.notify_all()


def _run(work: Work) -> None:
    try:
        work()
    except HypervisorGoneError as error:
        log.warning("libvirt is away: %s; everything is read again when it is back", error)
    except VirtfabricError as error:
        log.warning("lifecycle: %s", error)
    except Exception:
        # one bad event must not end what all others need
        log.exception("lifecycle work failed")
