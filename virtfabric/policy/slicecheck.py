"""What must hold of an adapter's books, and of an access to its memory.

For the firmware when it reads its state back, and for an agent that does not believe a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from virtfabric.model.adapter import Adapter, AdapterBooks, Seat, Slice


def find_faults(books: AdapterBooks) -> tuple[str, ...]:
    """What is wrong with slices that are there, and with what is promised; empty: nothing."""
    return tuple(_faults(books))


def _faults(books: AdapterBooks) -> Iterator[str]:
    for name, one in books.slices.items():
        if name != one.id:
            yield f"{name} is kept as {one.id}"
        yield from _outside(books.adapter, one)
    yield from _shared((name, one.seat) for name, one in books.slices.items())
    yield from _shared((name, r.slice.seat) for name, r in books.reservations.items())
    limits = sum(one.seat.bandwidth for one in books.slices.values())
    if limits > books.adapter.bandwidth:
        yield f"limits of {limits} Mbit/s on an adapter of {books.adapter.bandwidth}"
    for promise in books.reservations.values():
        yield from _outside(books.adapter, promise.slice)
        if promise.replaces and promise.slice.id not in books.slices:
            yield f"{promise.id} changes {promise.slice.id}, which is not there"
        leaving = {*promise.victims, *([promise.slice.id] if promise.replaces else [])}
        staying = [(n, one.seat) for n, one in books.slices.items() if n not in leaving]
        yield from _shared([*staying, (promise.id, promise.slice.seat)])


def _outside(adapter: Adapter, one: Slice) -> Iterator[str]:
    seat = one.seat
    units = adapter.accelerators.get(seat.capability, 0)
    for what, numbers, least, most in (
        ("core", seat.cores, 0, adapter.cores), ("lane", seat.lanes, 0, adapter.lanes),
        ("key", seat.keys, 1, adapter.keys + 1), ("unit", seat.units, 0, units),
    ):  # fmt: skip
        for number in numbers:
            if not least <= number < most:
                yield f"{one.id} has {what} {number}, which the adapter does not"
    for piece in seat.memory:
        if piece.end > adapter.memory:
            yield f"{one.id} has memory {piece} of {adapter.memory}"
    had = (
        len(seat.cores), sum(piece.size for piece in seat.memory), len(seat.lanes),
        len(seat.keys), len(seat.units), seat.bandwidth,
    )  # fmt: skip
    spec = one.spec
    wanted = (
        spec.cores, spec.memory, spec.lanes, spec.keys, spec.units, spec.bandwidth or 0,
    )  # fmt: skip
    if had != wanted:
        yield f"{one.id} has other amounts than it is to have"


def _shared(seats: Iterable[tuple[str, Seat]]) -> Iterator[str]:
    owner: dict[Hashable, str] = {}
    pieces = []
    for name, seat in seats:
        pieces += [(piece.start, piece.end, name) for piece in seat.memory]
        parts: list[tuple[str, int]] = [
            *(("core", n) for n in seat.cores), *(("lane", n) for n in seat.lanes),
            *(("key", n) for n in seat.keys), *((seat.capability, n) for n in seat.units),
        ]  # fmt: skip
        for part in parts:
            if part in owner:
                yield f"{name} and {owner[part]} share {part[0]} {part[1]}"
            owner[part] = name
    for (_, end, one), (start, _, other) in pairwise(sorted(pieces)):
        if start < end:
            yield f"{other} and {one} share memory at {start:#x}"


@dataclass(frozen=True, slots=True)
class AccessFault:
    """An access that the card's memory protection stopped.

    Attributes:
        slice: whose function it came from, or, where that is not known, whose key was used; empty
            for a key that nobody has.
    """

    slice: str
    key: int
    start: int
    size: int

    def __str__(self) -> str:
        return f"key {self.key}: {Bytes(self.size)} at {self.start:#x} are not its own"


def check_access(
    books: AdapterBooks, key: int, start: int, size: int, *, by: str = ""
) -> AccessFault | None:
    """Whether a key opens all of this memory; None: it does.

    Memory that a slice has is open to its own keys and to no other.

    Args:
        books: of the adapter.
        key: that is shown.
        start: of the access.
        size: of the access, bytes.
        by: slice whose function shows the key: another's key opens nothing to it, and the fault is
            its own. Empty: whoever has the key.
    """
    one = next((one for one in books.slices.values() if key in one.seat.keys), None)
    if one is None or by not in ("", one.id):
        return AccessFault(by, key, start, size)
    place, end = start, start + size
    for piece in one.seat.memory:
        if piece.start <= place < piece.end:
            place = piece.end
    return None if size > 0 and place >= end else AccessFault(one.id, key, start, size)
