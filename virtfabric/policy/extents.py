"""Pieces: which part of what is free is taken, of memory and of lanes. Plain geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.adapter import Extent

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


def subtract(free: Sequence[Extent], taken: Iterable[Extent]) -> tuple[Extent, ...]:
    """What is left of ascending extents; what is taken may overlap, and lie outside of them."""
    left: list[Extent] = []
    holes = sorted(hole for hole in taken if hole.size)
    first = 0
    for extent in free:
        start = extent.start
        while first < len(holes) and holes[first].start < extent.end:
            hole = holes[first]
            if hole.start > start:
                left.append(Extent(start, hole.start - start))
            start = max(start, hole.end)
            if hole.end > extent.end:
                break  # it may reach into the next extent
            first += 1
        if start < extent.end:
            left.append(Extent(start, extent.end - start))
    return tuple(left)


def join(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Ascending; neighbours are one."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined and joined[-1].end == extent.start:
            joined[-1] = Extent(joined[-1].start, joined[-1].size + extent.size)
        else:
            joined.append(extent)
    return tuple(joined)


def largest(free: Iterable[Extent]) -> int:
    """Bytes of the largest extent."""
    return max((extent.size for extent in free), default=0)


def take(free: Sequence[Extent], size: int) -> tuple[Extent, ...] | None:
    """This much in the fewest pieces, of the smallest extent that has it; None: there is less.

    What one extent can give is in one piece, so a caller that wants it in one piece asks
    `largest` first.
    """
    taken: list[Extent] = []
    left = sorted(free, key=lambda extent: (-extent.size, extent.start))
    while size:
        whole = [extent for extent in left if extent.size >= size]
        if whole:
            best = min(whole, key=lambda extent: (extent.size, extent.start))
            taken.append(Extent(best.start, size))
            break
        if not left:
            return None
        taken.append(left.pop(0))
        size -= taken[-1].size
    return join(taken)


def keep(own: Sequence[Extent], size: int) -> tuple[Extent, ...]:
    """The first bytes of what a slice has."""
    kept: list[Extent] = []
    for extent in own:
        if size <= 0:
            break
        kept.append(Extent(extent.start, min(size, extent.size)))
        size -= kept[-1].size
    return tuple(kept)


def widest(free: Collection[int]) -> int:
    """Lanes of the widest link that can be made of free ones."""
    width, starts = 1, set(free)
    while starts:
        pairs = {start for start in starts if start % (2 * width) == 0 and start + width in starts}
        width, starts = 2 * width, pairs
    return width // 2


def take_lanes(free: Collection[int], width: int) -> tuple[int, ...] | None:
    """A link's lanes, which begin at a multiple of its width (as ports bifurcate).

    Of the places there are, the one that breaks up the narrowest wider link. None: there is none.
    """
    if not width:
        return ()
    lanes = set(free)
    starts = _starts(lanes, width)
    if not starts:
        return None
    first = min(starts, key=lambda start: (_block(lanes, start, width), start))
    return tuple(range(first, first + width))


def _starts(lanes: set[int], width: int) -> list[int]:
    return [
        start for start in sorted(lanes)
        if start % width == 0 and all(lane in lanes for lane in range(start, start + width))
    ]  # fmt: skip


def _block(lanes: set[int], start: int, width: int) -> int:
    """Width of the widest link that could be made around these lanes."""
    while True:
        around = start - start % (width * 2)
        if not all(lane in lanes for lane in range(around, around + width * 2)):
            return width
        start, width = around, width * 2
