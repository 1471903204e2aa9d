"""Several adapters as one pool: which of them a slice goes to, whole or in parts.

The order of wishes: nobody has to make way; the fewest adapters; the least fragmentation (those
that are the fullest already, so that large rooms stay large); the nearest site. A slice that one
adapter can hold is never divided. It chooses only: two-phase promises (`slicing.reserve`, commit,
abort) on each adapter make it true, all or none.

A pool is an index: it is told of every change by `put`, and looks at few adapters for each choice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import GIB, Bytes
from virtfabric.policy.combining import Lot, choose_lots, divide
from virtfabric.policy.seating import Vector, fits, free_of, need_of
from virtfabric.policy.shelf import Entry, Shelf
from virtfabric.policy.slicing import (
    SeatChoice,
    choose_slice,
    describe_shortage,
    room_for_anybody,
    rooms_by_priority,
    would_fit,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from virtfabric.model.adapter import AdapterBooks, AdapterId, SliceSpec
    from virtfabric.policy.seating import FreeParts

_ANY: Final = ""
"""The shelf of all adapters, for slices without accelerators."""
_GENTLE: Final = 8
"""Adapters compared where somebody has to make way: the one is taken that hurts least."""
_BREADTHS: Final = (48, 384)
"""Adapters with the most of one coordinate that are looked at, before all of them are."""
_UNITS: Final = Vector._fields.index("units")
_ADDED_UP: Final = tuple(Vector._fields.index(name) for name in ("cores", "memory", "units"))
"""What a divided slice can have from several adapters."""


@dataclass(frozen=True, slots=True)
class PoolPart:
    """What one adapter gives to a slice."""

    adapter: AdapterId
    spec: SliceSpec
    choice: SeatChoice


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """The adapters of a slice; one part where it is not divided."""

    parts: tuple[PoolPart, ...]


@dataclass(frozen=True)
class _Member:
    books: AdapterBooks
    free: FreeParts
    fill: int
    later: FreeParts | None
    """What would be free with everything reclaimable gone; None where nothing is."""

    @cached_property
    def _rooms(self) -> tuple[tuple[int, FreeParts], ...]:
        """What would be free for a priority above each of these, ascending."""
        return tuple(rooms_by_priority(self.books))

    def room(self, spec: SliceSpec, *, reclaim: bool) -> Vector:
        """What is free for this slice; with all that has to make way for it gone, if so asked."""
        best = self.free
        for priority, free in self._rooms if reclaim else ():
            if priority >= spec.priority:
                break
            best = free
        return best.vector(spec.capability)


class _Shelves:
    """By capability those that have accelerators for it, and all of them."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Shelf] = {_ANY: Shelf()}

    def put(self, books: AdapterBooks, free: FreeParts) -> None:
        for kind, entry in _entries(books, free):
            self._by_kind.setdefault(kind, Shelf()).put(entry)

    def remove(self, books: AdapterBooks, free: FreeParts) -> None:
        for kind, entry in _entries(books, free):
            self._by_kind[kind].remove(entry)

    def __getitem__(self, capability: str) -> Shelf:
        return self._by_kind.get(capability, _EMPTY)


_EMPTY: Final = Shelf()


class SlicePool:
    """Adapters by serial."""

    def __init__(self, adapters: Iterable[AdapterBooks] = ()) -> None:
        self._members: dict[AdapterId, _Member] = {}
        self._now = _Shelves()
        self._later = _Shelves()  # with everything reclaimable gone
        self._kinds: Counter[str] = Counter()
        for books in adapters:
            self.put(books)

    def __len__(self) -> int:
        return len(self._members)

    def put(self, books: AdapterBooks) -> None:
        """An adapter came, or what is on it changed."""
        self.remove(books.adapter.serial)
        free = free_of(books)
        member = _Member(books, free, _fill(free), room_for_anybody(books))
        self._members[books.adapter.serial] = member
        self._kinds.update(_kinds(books))
        self._now.put(books, member.free)
        if member.later is not None:
            self._later.put(books, member.later)

    def remove(self, serial: AdapterId) -> None:
        """An adapter is gone; safe to repeat."""
        member = self._members.pop(serial, None)
        if member is None:
            return
        self._kinds.subtract(_kinds(member.books))
        self._now.remove(member.books, member.free)
        if member.later is not None:
            self._later.remove(member.books, member.later)

    def choose(
        self, spec: SliceSpec, *, near: Sequence[str] = (), reclaim: bool = True
    ) -> PoolChoice | Refusal:
        """Where a slice goes.

        Args:
            spec: what it is to have; checked. What is in one piece is on one adapter. Of a slice
                that is divided each part is a function of its own, with its lanes, keys and
                bandwidth limit; cores, memory and accelerator units add up.
            near: sites, the nearest first; all others are farther than these.
            reclaim: whether slices of lower priority may have to make way.
        """
        if spec.units and not self._kinds[spec.capability]:
            detail = f"no adapter has accelerators for {spec.capability}"
            return Refusal(Reason.UNKNOWN_CAPABILITY, detail)
        chosen = self._whole(spec, near) or self._divided(spec, near, reclaim=False)
        if chosen is None and reclaim and len(self._later[_ANY]):
            chosen = self._whole_reclaimed(spec, near) or self._divided(spec, near, reclaim=True)
        return chosen or self._refuse(spec)

    # -- on one adapter -----------------------------------------------------------------------

    def _whole(self, spec: SliceSpec, near: Sequence[str]) -> PoolChoice | None:
        shelf, need = self._now[spec.capability], need_of(spec)
        found = shelf.find(need, least=(_fill_of(need), ""))
        if found is None:
            return None
        for site in near:  # the nearest of those that are as full
            if site == found.site:
                break
            other = shelf.find(need, least=(found.fill, site), exactly=True)
            if other is not None:
                found = other
                break
        return self._parts([(found.serial, spec)])

    def _whole_reclaimed(self, spec: SliceSpec, near: Sequence[str]) -> PoolChoice | None:
        need, able = need_of(spec), []
        for entry in self._later[spec.capability].find_all(need):
            member = self._members[entry.serial]
            if fits(need, member.room(spec, reclaim=True)):
                able.append(self._parts([(entry.serial, spec)]))
                if len(able) == _GENTLE:
                    break
        return min(able, key=lambda choice: self._harm(choice, near), default=None)

    def _harm(self, choice: PoolChoice, near: Sequence[str]) -> tuple[int, int, int, int]:
        (part,) = choice.parts
        books = self._members[part.adapter].books
        victims = [books.slices[name] for name in part.choice.victims]
        return (
            max((victim.spec.priority for victim in victims), default=0),
            sum(bool(victim.holder) for victim in victims),
            len(victims),
            _distance(books.adapter.site, near),
        )

    # -- on several ---------------------------------------------------------------------------

    def _divided(self, spec: SliceSpec, near: Sequence[str], *, reclaim: bool) -> PoolChoice | None:
        need = need_of(spec)
        axes = tuple(axis for axis in _ADDED_UP if need[axis])
        if spec.contiguous or not axes or self._is_beyond(spec, axes, reclaim=reclaim):
            return None
        wanted = _of(need, axes)
        for breadth in (*(b for b in _BREADTHS if b < len(self)), len(self)):
            rooms = self._candidates(spec, axes, breadth, reclaim=reclaim)
            lots = [self._lot(serial, room, wanted, axes, near) for serial, room in rooms.items()]
            chosen = choose_lots(wanted, lots)
            if chosen is not None:
                break
        else:
            return None
        serials = [lot.serial for lot in chosen]
        if breadth < len(self) and not reclaim:
            serials = self._tightened(spec, serials)
        given = divide(wanted, [_of(self._room(spec, s, reclaim), axes) for s in serials])
        return self._parts(
            [(s, _part_of(spec, axes, g)) for s, g in zip(serials, given, strict=True) if any(g)]
        )

    def _is_beyond(self, spec: SliceSpec, axes: Sequence[int], *, reclaim: bool) -> bool:
        """Whether all adapters together do not have it: nothing need be searched then."""
        need = need_of(spec)
        for axis in axes:
            kind = spec.capability if axis == _UNITS else _ANY
            most = self._now[kind].total[axis]
            # what is free now is in both: a bound too high, never too low
            most += self._later[kind].total[axis] if reclaim else 0
            if most < need[axis]:
                return True
        return False

    def _candidates(
        self, spec: SliceSpec, axes: Sequence[int], breadth: int, *, reclaim: bool
    ) -> dict[AdapterId, Vector]:
        """Those with the most of something that is needed, and what they have."""
        least = need_of(spec)._replace(cores=0, memory=0, units=0)
        found: dict[AdapterId, Vector] = {}
        for shelves in (self._now, self._later) if reclaim else (self._now,):
            for axis in axes:
                shelf = shelves[spec.capability if axis == _UNITS else _ANY]
                for entry in shelf.largest(axis, breadth, least):
                    found.setdefault(entry.serial, self._room(spec, entry.serial, reclaim))
        return {serial: room for serial, room in found.items() if fits(least, room)}

    def _room(self, spec: SliceSpec, serial: AdapterId, reclaim: bool) -> Vector:  # noqa: FBT001
        return self._members[serial].room(spec, reclaim=reclaim)

    def _lot(
        self, serial: AdapterId, room: Vector, need: tuple[int, ...], axes: Sequence[int],
        near: Sequence[str],
    ) -> Lot:  # fmt: skip
        member = self._members[serial]
        give = tuple(map(min, _of(room, axes), need))
        return Lot(serial, give, member.fill, _distance(member.books.adapter.site, near))

    def _tightened(self, spec: SliceSpec, serials: list[AdapterId]) -> list[AdapterId]:
        """Each in turn replaced by the fullest adapter that does for what the others leave.

        The candidates were the emptiest, as those need to be the fewest.
        """
        need = need_of(spec)
        for serial in sorted(serials, key=lambda s: -self._members[s].fill):
            others = [self._room(spec, s, reclaim=False) for s in serials if s != serial]
            left = {
                Vector._fields[axis]: max(0, need[axis] - sum(room[axis] for room in others))
                for axis in _ADDED_UP
            }
            rest = need._replace(**left)
            shelf = self._now[spec.capability if rest.units else _ANY]
            found = shelf.find(rest, least=(_fill_of(rest), ""), skip=set(serials) - {serial})
            if found is not None:
                serials = [found.serial if s == serial else s for s in serials]
        return serials

    # -- answers ------------------------------------------------------------------------------

    def _parts(self, specs: Sequence[tuple[AdapterId, SliceSpec]]) -> PoolChoice:
        parts = []
        for serial, spec in specs:
            member = self._members[serial]
            choice = choose_slice(member.books, spec, free=member.free)
            assert isinstance(choice, SeatChoice)
            parts.append(PoolPart(serial, spec, choice))
        return PoolChoice(tuple(parts))

    def _refuse(self, spec: SliceSpec) -> Refusal:
        rooms = [entry.room for entry in self._now[spec.capability]] or [Vector(*[0] * 7)]
        most = Vector(*map(max, zip(*rooms, strict=True)))
        total = most._replace(**{
            Vector._fields[axis]: sum(room[axis] for room in rooms) for axis in _ADDED_UP
        })  # fmt: skip
        there = most if spec.contiguous else total
        short = describe_shortage(need_of(spec), there)
        if fits(need_of(spec), there):
            short = "the figures are there, but not together"
        return Refusal(
            Reason.NO_CAPACITY, f"{len(self)} adapters: {short}", would_fit(there)
        )  # fmt: skip


def _entries(books: AdapterBooks, free: FreeParts) -> Iterator[tuple[str, Entry]]:
    adapter = books.adapter
    fill = _fill(free)
    yield _ANY, Entry(fill, adapter.site, adapter.serial, free.vector(_ANY))
    for kind in _kinds(books):
        yield kind, Entry(fill, adapter.site, adapter.serial, free.vector(kind))


def _kinds(books: AdapterBooks) -> list[str]:
    return [kind for kind, count in books.adapter.accelerators.items() if count]


def _fill(free: FreeParts) -> int:
    """How much is free in one figure: a core, a lane and a unit each weigh as much as 1 GiB."""
    room = free.vector(_ANY)
    units = sum(len(numbers) for numbers in free.units.values())
    return room.memory + (room.cores + len(free.lanes) + units) * GIB


def _fill_of(need: Vector) -> int:
    """No adapter with less free than this has what is needed."""
    return need.memory + (need.cores + need.lanes + need.units) * GIB


def _distance(site: str, near: Sequence[str]) -> int:
    return near.index(site) if site in near else len(near)


def _of(vector: Vector, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(vector[axis] for axis in axes)


def _part_of(spec: SliceSpec, axes: Sequence[int], given: Sequence[int]) -> SliceSpec:
    share = {Vector._fields[axis]: amount for axis, amount in zip(axes, given, strict=True)}
    units = share.get("units", 0)
    return replace(
        spec,
        cores=share.get("cores", 0),
        memory=Bytes(share.get("memory", 0)),
        units=units,
        capability=spec.capability if units else "",
    )
