"""The firmware's thread: everything that a card decides happens here, one thing after the other.

Whoever has a loop of its own does without: `CardDevice` only wants jobs run on one thread, and
`refresh` after them.
"""

from __future__ import annotations

from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

from virtfabric.shim.cardpci.card import CardDevice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.shim.cardpci.card import Slots
    from virtfabric.shim.firmware.desk import Desk
    from virtfabric.shim.firmware.firmware import Firmware

_TICK_S: Final = 0.05
_Result = TypeVar("_Result")


class CardRunner:
    """A card that runs, from its start until `close`."""

    def __init__(
        self, firmware: Firmware, desk: Desk, directory: Path, *, boot: str,
        slots: Slots | None = None, report: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Begin; arguments as `CardDevice` has them."""
        self._desk = desk
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closed = False
        self.device = CardDevice(
            firmware, desk, directory, boot=boot, post=self._jobs.put, slots=slots, report=report
        )
        self._thread = Thread(target=self._run, name="firmware", daemon=True)
        self._thread.start()

    def ask(self, job: Callable[[], _Result]) -> _Result:
        """Have something done on the firmware's thread, and wait for it and what follows of it.

        Raises:
            Exception: whatever the job raised.
        """
        done: Future[_Result] = Future()

        def carry_out() -> None:
            try:
                result = job()
                self.device.refresh()
            except Exception as error:  # noqa: BLE001 (raised where it was asked)
                done.set_exception(error)
            else:
                done.set_result(result)

        self._jobs.put(carry_out)
        return done.result()

    def close(self) -> None:
        """Take the functions out and stop; safe to repeat."""
        if not self._closed:
            self._closed = True
            self._jobs.put(lambda: None)
            self._thread.join()
            self.device.close()

    def _run(self) -> None:
        next_tick = monotonic()
        while not self._closed:
            try:
                job = self._jobs.get(timeout=max(0.0, next_tick - monotonic()))
            except Empty:
                next_tick = monotonic() + _TICK_S
                self._desk.tick()
                self.device.refresh()
            else:
                job()
