"""A job for another thread, at most once in its queue, however often it is asked for."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Errand:
    """For what a guest can ask for faster than it is done."""

    def __init__(self, post: Callable[[Callable[[], None]], None], job: Callable[[], None]) -> None:
        """Begin.

        Args:
            post: puts a job into the other thread's queue.
            job: sees to all that was asked for before it begins.
        """
        self._post = post
        self._job = job
        self._lock = Lock()
        self._waits = False

    def ask(self) -> None:
        """Have the job done, soon. From any thread."""
        with self._lock:
            if self._waits:
                return
            self._waits = True
        self._post(self._run)

    def _run(self) -> None:
        with self._lock:
            self._waits = False
        self._job()
