"""The card's own memory, behind its protection keys. It holds only what was written."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from virtfabric.model.adapter import GRANULE
from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtfabric.model.adapter import Extent, SliceId
    from virtfabric.policy.slicecheck import AccessFault


class ProtectionError(VirtfabricError):
    """The protection stopped an access; the firmware has been told."""

    def __init__(self, fault: AccessFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class CardMemory:
    """Granules by number. Safe for several threads."""

    def __init__(self, check: Callable[[SliceId, int, int, int], AccessFault | None]) -> None:
        """Begin, all zeros.

        Args:
            check: slice that asks, key, start, size; a fault if the protection is against it.
        """
        self._check = check
        self._lock = Lock()
        self._granules: dict[int, bytearray] = {}

    def read(self, by: SliceId, key: int, start: int, size: int) -> bytes:
        """Bytes of the card.

        Raises:
            ProtectionError: the key does not open all of them, or is not the slice's.
        """
        with self._lock:
            self._enter(by, key, start, size)
            return b"".join(
                bytes(self._granules[number][first:last])
                if number in self._granules
                else bytes(last - first)
                for number, first, last in _parts(start, size)
            )

    def write(self, by: SliceId, key: int, start: int, data: bytes) -> None:
        """Change bytes of the card: all, or none.

        Raises:
            ProtectionError: as `read`.
        """
        with self._lock:
            self._enter(by, key, start, len(data))
            done = 0
            for number, first, last in _parts(start, len(data)):
                granule = self._granules.setdefault(number, bytearray(GRANULE))
                granule[first:last] = data[done : done + last - first]
                done += last - first

    def scrub(self, pieces: Iterable[Extent]) -> None:
        """Forget what is in whole granules: they go to somebody else."""
        with self._lock:
            for piece in pieces:
                numbers = range(piece.start // GRANULE, -(-piece.end // GRANULE))
                for number in [n for n in self._granules if n in numbers]:
                    del self._granules[number]

    def _enter(self, by: SliceId, key: int, start: int, size: int) -> None:
        # within the lock: else a slice could end, its memory be scrubbed and given on, and an
        # access that was checked before reach it after
        fault = self._check(by, key, start, size)
        if fault is not None:
            raise ProtectionError(fault)


def _parts(start: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Granule, and from where to where in it."""
    end = start + size
    while start < end:
        number, first = divmod(start, GRANULE)
        last = min(GRANULE, first + end - start)
        yield number, first, last
        start += last - first
