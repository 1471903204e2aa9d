"""A slice's way into the guest's memory: counted, and cut at once by a reset.

An operation works on a channel. Whatever ends it (a stopped queue, a reset, a client that goes)
cuts the channels of before: an operation under way reaches nothing from then on.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.vfiouser.memory import DmaRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.shim.vfiouser.function import Bus


class CutOffError(VirtfabricError):
    """The operation was ended from outside; nobody waits for its result."""


@dataclass(frozen=True, slots=True)
class DmaCounts:
    """Since the slice was made: bytes, and accesses that were refused."""

    read: int = 0
    written: int = 0
    refused: int = 0

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written


class Dma:
    """Of one function. Safe for several threads."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._bus: Bus | None = None
        self._counts = DmaCounts()

    @property
    def counts(self) -> DmaCounts:
        """What moved so far: who sees a byte in the guest's memory finds it counted.

        So this waits for a copy under way, of 1 MiB at most.
        """
        with self.lock:
            return self._counts

    def attach(self, bus: Bus | None) -> None:
        """A client came; None: it went, and no copy is under way any more."""
        with self.lock:
            self._bus = bus

    def interrupt(self) -> None:
        """Send the function's message, if somebody wants it."""
        bus = self._bus
        if bus is not None:
            bus.interrupt()

    def move(self, address: int, size: int, data: bytes | None) -> bytes:
        """Read, or write `data`; within the lock.

        Raises:
            DmaRefusedError, CutOffError: see `Channel`.
        """
        if self._bus is None:
            raise CutOffError("nobody is there")
        counts = self._counts
        try:
            if data is None:
                found = self._bus.read(address, size)
                self._counts = DmaCounts(counts.read + size, counts.written, counts.refused)
                return found
            self._bus.write(address, data)
        except DmaRefusedError:
            self._counts = DmaCounts(counts.read, counts.written, counts.refused + 1)
            raise
        self._counts = DmaCounts(counts.read, counts.written + size, counts.refused)
        return b""


class Channel:
    """DMA for the operations of one queue, until it is cut."""

    def __init__(self, dma: Dma) -> None:
        self._dma = dma
        self._live = True

    def cut(self) -> None:
        """End it; when this returns no copy of it is under way. Safe to repeat."""
        with self._dma.lock:
            self._live = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While this lasts it is not cut: for what an operation changes beside the guest's memory.

        Raises:
            CutOffError: the operation has ended.
        """
        with self._dma.lock:
            if not self._live:
                raise CutOffError("ended")
            yield

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the guest.

        Raises:
            DmaRefusedError: not within its memory.
            CutOffError: the operation has ended.
        """
        return self._move(address, size, None) if size else b""

    def write(self, address: int, data: bytes) -> None:
        """Change bytes of the guest.

        Raises:
            DmaRefusedError, CutOffError: as `read`.
        """
        if data:
            self._move(address, len(data), data)

    def _move(self, address: int, size: int, data: bytes | None) -> bytes:
        with self.kept():
            return self._dma.move(address, size, data)
