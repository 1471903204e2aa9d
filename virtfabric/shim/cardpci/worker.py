"""A thread that works where something is to do, so that whoever asks is answered at once."""

from __future__ import annotations

from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE: Final = -1.0


class Worker:
    """Calls `step` again and again while it has something to do."""

    def __init__(self, name: str, step: Callable[[], float]) -> None:
        """Begin.

        Args:
            name: of the thread.
            step: does a little; returns seconds until it is to be called again, or `IDLE`.
        """
        self._step = step
        self._wake = Condition()
        self._kicked = False
        self._closed = False
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """There is something to do. From any thread."""
        with self._wake:
            self._kicked = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, and wait until the last step is over; safe to repeat."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        pause = IDLE
        while True:
            with self._wake:
                if pause == IDLE:
                    self._wake.wait_for(lambda: self._kicked or self._closed)
                elif pause > 0:
                    self._wake.wait_for(lambda: self._closed, pause)
                if self._closed:
                    return
                self._kicked = False
            pause = self._step()
