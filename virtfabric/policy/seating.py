"""Seats: what is free on one adapter, whether a slice fits, and which part it gets.

Nothing that is there is ever moved, so making, changing and ending one slice interrupts no other.
What a reservation promises is as taken as what a slice has. It must not decide who pays (slicing).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import le
from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.adapter import Extent, Seat
from virtfabric.policy import extents

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from virtfabric.model.adapter import Adapter, AdapterBooks, SliceId, SliceSpec


class Vector(NamedTuple):
    """What decides whether a slice fits: it does exactly when no coordinate is short.

    `units` are of one capability; `lanes` is the width of a link, `extent` one piece of memory.
    """

    cores: int
    memory: int
    extent: int
    lanes: int
    keys: int
    bandwidth: int
    units: int


def need_of(spec: SliceSpec) -> Vector:
    """What a slice needs."""
    return Vector(
        spec.cores, spec.memory, spec.memory if spec.contiguous else 0, spec.lanes, spec.keys,
        spec.bandwidth or 0, spec.units,
    )  # fmt: skip


@dataclass(frozen=True)
class FreeParts:
    """What of an adapter nobody has; numbers ascend."""

    cores: tuple[int, ...]
    memory: tuple[Extent, ...]
    lanes: tuple[int, ...]
    keys: tuple[int, ...]
    bandwidth: int
    units: dict[str, tuple[int, ...]]

    def vector(self, capability: str) -> Vector:
        """As a slice of this capability sees it."""
        return self._vectors.get(capability, self._vector)

    @cached_property
    def _vectors(self) -> dict[str, Vector]:
        return {
            capability: self._vector._replace(units=len(units))
            for capability, units in self.units.items()
        }

    @cached_property
    def _vector(self) -> Vector:
        return Vector(
            len(self.cores), sum(extent.size for extent in self.memory),
            extents.largest(self.memory), extents.widest(self.lanes), len(self.keys),
            self.bandwidth, 0,
        )  # fmt: skip


def find_free(adapter: Adapter, seats: Iterable[Seat]) -> FreeParts:
    """What is left beside these seats.

    Seats may overlap where one is promised a part that another has to leave; bandwidth, which has
    no parts, then counts for both.
    """
    taken = tuple(seats)
    cores = {core for seat in taken for core in seat.cores}
    lanes = {lane for seat in taken for lane in seat.lanes}
    keys = {key for seat in taken for key in seat.keys}
    units = {(seat.capability, unit) for seat in taken for unit in seat.units}
    return FreeParts(
        _without(range(adapter.cores), cores),
        extents.subtract(
            (Extent(0, adapter.memory),), (piece for seat in taken for piece in seat.memory)
        ),
        _without(range(adapter.lanes), lanes),
        _without(range(1, adapter.keys + 1), keys),
        max(0, adapter.bandwidth - sum(seat.bandwidth for seat in taken)),
        {
            capability: tuple([unit for unit in range(count) if (capability, unit) not in units])
            for capability, count in adapter.accelerators.items()
        },
    )


def free_of(books: AdapterBooks, *, without: Collection[SliceId] = ()) -> FreeParts:
    """What is free on an adapter, once these slices have left."""
    slices = (one.seat for name, one in books.slices.items() if name not in without)
    promised = (reservation.slice.seat for reservation in books.reservations.values())
    return find_free(books.adapter, (*slices, *promised))


def fits(need: Vector, room: Vector) -> bool:
    """Whether nothing is short."""
    return all(map(le, need, room))


def choose_seat(free: FreeParts, spec: SliceSpec) -> Seat | None:
    """The part of what is free that breaks up the least of it; None: it does not fit."""
    if not fits(need_of(spec), free.vector(spec.capability)):
        return None
    memory = extents.take(free.memory, spec.memory)
    lanes = extents.take_lanes(free.lanes, spec.lanes)
    assert memory is not None
    assert lanes is not None
    units = free.units.get(spec.capability, ())
    return Seat(
        free.cores[: spec.cores], memory, lanes, free.keys[: spec.keys], spec.capability,
        units[: spec.units], spec.bandwidth or 0,
    )  # fmt: skip


def choose_other_seat(free: FreeParts, spec: SliceSpec, own: Seat) -> Seat | None:
    """A seat for a slice in use that changes: what it keeps stays where it is. None: no such.

    Memory in one piece grows at its end only. Lanes and capability do not change.

    Args:
        free: what nobody has, this slice included.
        spec: what it is to have.
        own: what it has.
    """
    grown = spec.memory - sum(piece.size for piece in own.memory)
    stays_whole = spec.contiguous and own.memory
    memory = (_grow if stays_whole else _add)(free.memory, own.memory, grown)
    cores = _resized(own.cores, free.cores, spec.cores)
    keys = _resized(own.keys, free.keys, spec.keys)
    units = _resized(own.units, free.units.get(spec.capability, ()), spec.units)
    limit = spec.bandwidth or 0
    short = (
        len(cores) < spec.cores or len(keys) < spec.keys or len(units) < spec.units
        or limit > own.bandwidth + free.bandwidth
    )  # fmt: skip
    if memory is None or short:
        return None
    return Seat(cores, memory, own.lanes, keys, own.capability, units, limit)


def _without(numbers: range, taken: Collection[int]) -> tuple[int, ...]:
    return tuple([number for number in numbers if number not in taken])


def _resized(own: Sequence[int], free: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(sorted((*own[:count], *free[: max(0, count - len(own))])))


def _grow(free: Sequence[Extent], own: Sequence[Extent], by: int) -> tuple[Extent, ...] | None:
    if len(own) > 1:
        return None  # in pieces it is, and one piece it cannot become where it is
    piece = own[0]
    room = next((extent.size for extent in free if extent.start == piece.end), 0)
    return (Extent(piece.start, piece.size + by),) if by <= room else None


def _add(free: Sequence[Extent], own: Sequence[Extent], by: int) -> tuple[Extent, ...] | None:
    if by <= 0:
        return extents.keep(own, sum(piece.size for piece in own) + by)
    more = extents.take(free, by) if by <= sum(piece.size for piece in free) else None
    return None if more is None else extents.join((*own, *more))
