"""A shelf: adapters in the order in which they should be used up, and the first one that fits.

Kept in blocks with the largest of each coordinate, so that a search passes over whole blocks and a
change touches one. Measured on 10,000 adapters by benchmarks/bench_card.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import nlargest
from itertools import islice
from operator import add, le, sub
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.policy.seating import Vector, fits

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from virtfabric.model.adapter import AdapterId

_BLOCK: Final = 32


class Entry(NamedTuple):
    """An adapter on the shelf; `fill` is how much of it is free, all resources in one figure."""

    fill: int
    site: str
    serial: AdapterId
    room: Vector


class _Block:
    __slots__ = ("entries", "most")

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.most = Vector(*map(max, zip(*(entry.room for entry in entries), strict=True)))


class Shelf:
    """Entries in ascending order."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lasts: list[Entry] = []
        self.total = Vector(*[0] * len(Vector._fields))
        """The sum of each coordinate over all entries."""

    def __len__(self) -> int:
        return sum(len(block.entries) for block in self._blocks)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for block in self._blocks for entry in block.entries)

    def put(self, entry: Entry) -> None:
        """Add an entry that is not there yet."""
        self.total = Vector(*map(add, self.total, entry.room))
        place = min(bisect_left(self._lasts, entry), len(self._blocks) - 1)
        entries = self._blocks[place].entries if self._blocks else []
        insort(entries, entry)
        half = len(entries) // 2
        parts = [entries] if len(entries) <= _BLOCK else [entries[:half], entries[half:]]
        self._replace(max(0, place), parts)

    def remove(self, entry: Entry) -> None:
        """Take off an entry that is there."""
        self.total = Vector(*map(sub, self.total, entry.room))
        place = bisect_left(self._lasts, entry)
        entries = self._blocks[place].entries
        del entries[bisect_left(entries, entry)]
        self._replace(place, [entries] if entries else [])

    def _replace(self, place: int, parts: list[list[Entry]]) -> None:
        self._blocks[place : place + 1] = [_Block(part) for part in parts]
        self._lasts[place : place + 1] = [part[-1] for part in parts]

    def find(
        self,
        need: Vector,
        *,
        least: tuple[int, str] = (0, ""),
        exactly: bool = False,
        skip: Collection[str] = (),
    ) -> Entry | None:
        """The first entry that has what is needed; None: there is none.

        Args:
            need: what it must have.
            least: fill and site from which on to look.
            exactly: whether to look at that fill and site only.
            skip: serials that are passed over.
        """
        first = bisect_left(self._lasts, least)
        for place in range(first, len(self._blocks)):
            block = self._blocks[place]
            if exactly and block.entries[0][:2] > least:
                return None
            if fits(need, block.most):
                found = _find_in(block.entries, need, least, skip)
                if found is not None:
                    return found if not exactly or found[:2] == least else None
        return None

    def find_all(self, need: Vector) -> Iterator[Entry]:
        """Every entry that has what is needed, in order."""
        for block in self._blocks:
            if fits(need, block.most):
                yield from (entry for entry in block.entries if fits(need, entry.room))

    def largest(self, coordinate: int, count: int, need: Vector) -> list[Entry]:
        """So many entries with the most of one coordinate, of those that have what is needed."""
        found: list[Entry] = []
        least = 0
        for block in sorted(self._blocks, key=lambda block: -block.most[coordinate]):
            if block.most[coordinate] <= least:
                break
            more = [
                entry for entry in block.entries
                if entry.room[coordinate] > least and fits(need, entry.room)
            ]  # fmt: skip
            found = nlargest(count, [*found, *more], key=lambda entry: entry.room[coordinate])
            if len(found) == count:
                least = found[-1].room[coordinate]
        return found


def _find_in(
    entries: list[Entry], need: Vector, least: tuple[int, str], skip: Collection[str]
) -> Entry | None:
    for entry in islice(entries, bisect_left(entries, least), None):
        if all(map(le, need, entry.room)) and entry.serial not in skip:
            return entry
    return None
