"""The card's own memory, behind its protection keys. It holds only what was written."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from virtfabric.model.adapter import GRANULE
from virtfabric.model.errors import VirtfabricError
from virtfabric.policy.slicecheck import check_access

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtfabric.model.adapter import AdapterBooks, Extent, SliceId
    from virtfabric.policy.slicecheck import AccessFault


class ProtectionError(VirtfabricError):
    """The protection stopped an access; the firmware has been told."""

    def __init__(self, fault: AccessFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class CardMemory:
    """Granules by number. Safe for several threads."""

    def __init__(self, books: AdapterBooks, note: Callable[[AccessFault], None]) -> None:
        """Begin, all zeros.

        Args:
            books: whose memory is whose, until `follow` is told of others.
            note: hears of each access that was stopped; any thread, never slow.
        """
        self._books = books
        self._note = note
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

    def follow(self, books: AdapterBooks, fresh: Iterable[Extent]) -> None:
        """From now on memory is whose these books say.

        The protection changes together with what is there: nobody sees what another has left, not
        even between the grant and the zeros.

        Args:
            books: of the card.
            fresh: memory that somebody comes to, whole granules: all zeros.
        """
        with self._lock:
            for piece in fresh:
                numbers = range(piece.start // GRANULE, -(-piece.end // GRANULE))
                for number in [n for n in self._granules if n in numbers]:
                    del self._granules[number]
            self._books = books

    def _enter(self, by: SliceId, key: int, start: int, size: int) -> None:
        # within the lock: else a slice could end, its memory be scrubbed and given on, and an
        # access that was checked before reach it after
        fault = check_access(self._books, key, start, size, by=by)
        if fault is not None:
            self._note(fault)
            raise ProtectionError(fault)


def _parts(start: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Granule, and from where to where in it."""
    end = start + size
    while start < end:
        number, first = divmod(start, GRANULE)
        last = min(GRANULE, first + end - start)
        yield number, first, last
        start += last - first
