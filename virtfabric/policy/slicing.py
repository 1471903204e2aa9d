"""Slices of one adapter: made, changed, promised, ended; and who has to make way.

Books in, books out; every "no" is a `Refusal` and changes nothing. Free parts first, then
reclaimable slices of strictly lower priority, the lowest first, none that does not help. Of
several adapters `slicepool` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.adapter import (
    MAX_PRIORITY,
    AdapterBooks,
    Reservation,
    ReservationId,
    Seat,
    Slice,
    SliceId,
    SliceSpec,
)
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import Bytes
from virtfabric.policy.seating import (
    Vector,
    choose_other_seat,
    choose_seat,
    fits,
    free_of,
    need_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from virtfabric.policy.seating import FreeParts

ANYBODY: Final = MAX_PRIORITY + 1
"""A priority above all."""


@dataclass(frozen=True, slots=True)
class SeatChoice:
    """Where a slice goes, and which slices have to end for it, the lowest priority first."""

    seat: Seat
    victims: tuple[SliceId, ...] = ()


def reclaimable(books: AdapterBooks, priority: int) -> tuple[Slice, ...]:
    """Slices that have to make way for this priority, in the order in which they do.

    The lowest priority first; of the same those that nobody uses, then the smaller ones.
    """
    lower = (
        one for one in books.slices.values()
        if one.spec.reclaimable and one.spec.priority < priority
    )  # fmt: skip
    return tuple(sorted(lower, key=_rank))


def _rank(one: Slice) -> tuple[int, bool, int, str]:
    return one.spec.priority, bool(one.holder), one.spec.memory, one.id


def choose_slice(
    books: AdapterBooks, spec: SliceSpec, *, reclaim: bool = True, free: FreeParts | None = None
) -> SeatChoice | Refusal:
    """Where a new slice goes on this adapter.

    Args:
        books: the adapter.
        spec: what it is to have; checked.
        reclaim: whether others may have to make way.
        free: what nobody has, where it is known already.
    """
    unknown = _unknown(books, spec)
    if unknown is not None:
        return unknown
    seat = choose_seat(free or free_of(books), spec)
    if seat is not None:
        return SeatChoice(seat)
    choice = _reclaim(books, spec) if reclaim else None
    return choice or _no_capacity(books, spec)


def _unknown(books: AdapterBooks, spec: SliceSpec) -> Refusal | None:
    if not spec.units or spec.capability in books.adapter.accelerators:
        return None
    return Refusal(
        Reason.UNKNOWN_CAPABILITY,
        f"adapter {books.adapter.serial} has no accelerators for {spec.capability}",
    )


def _reclaim(books: AdapterBooks, spec: SliceSpec) -> SeatChoice | None:
    need = need_of(spec)
    out: list[Slice] = []
    for one in reclaimable(books, spec.priority):
        out.append(one)
        if fits(need, free_of(books, without={v.id for v in out}).vector(spec.capability)):
            break
    else:
        return None
    victims = {one.id: one for one in out}
    for one in reversed(out):  # who turns out not to be needed stays, the highest first
        rest = victims.keys() - {one.id}
        if fits(need, free_of(books, without=rest).vector(spec.capability)):
            del victims[one.id]
    seat = choose_seat(free_of(books, without=victims.keys()), spec)
    assert seat is not None
    return SeatChoice(seat, tuple(victims))


def rooms_by_priority(books: AdapterBooks) -> Iterator[tuple[int, FreeParts]]:
    """What is free for a priority above each of these, ascending: nobody pays below the first."""
    out: set[SliceId] = set()
    lower = reclaimable(books, ANYBODY)
    for place, one in enumerate(lower):
        out.add(one.id)
        if place + 1 == len(lower) or lower[place + 1].spec.priority > one.spec.priority:
            yield one.spec.priority, free_of(books, without=out)


def room_for_anybody(books: AdapterBooks) -> FreeParts | None:
    """What is free for a priority above all; None where nobody has to make way for any."""
    out = {one.id for one in reclaimable(books, ANYBODY)}
    return free_of(books, without=out) if out else None


def _no_capacity(books: AdapterBooks, spec: SliceSpec) -> Refusal:
    free = free_of(books)
    short = describe_shortage(need_of(spec), free.vector(spec.capability))
    reserved = reclaimable(books, spec.priority)
    pays = f"; {len(reserved)} slices of lower priority are not enough" if reserved else ""
    return Refusal(
        Reason.NO_CAPACITY,
        f"adapter {books.adapter.serial}: {short}{pays}",
        would_fit(free.vector(spec.capability)),
    )


def would_fit(room: Vector) -> dict[str, int]:
    """What could be had now, by coordinate."""
    return {name: value for name, value in room._asdict().items() if value}


def describe_shortage(need: Vector, room: Vector) -> str:
    """What is short, with figures."""
    short = []
    for name, wanted, there in zip(Vector._fields, need, room, strict=True):
        if wanted > there:
            is_size = name in ("memory", "extent")
            figures = (str(Bytes(wanted)), str(Bytes(there))) if is_size else (wanted, there)
            short.append(f"{_WORDS[name]} {figures[0]} wanted, {figures[1]} free")
    return ", ".join(short) or "nothing is short"


_WORDS: Final = {
    "cores": "cores", "memory": "memory", "extent": "memory in one piece",
    "lanes": "lanes of one link", "keys": "protection keys", "bandwidth": "bandwidth (Mbit/s)",
    "units": "accelerator units",
}  # fmt: skip


# -- books ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promise:
    """A reservation that was made, and the books with it."""

    books: AdapterBooks
    reservation: Reservation


def reserve(
    books: AdapterBooks, spec: SliceSpec, *, holder: str = "", request: str = "",
    reclaim: bool = True,
) -> Promise | Refusal:  # fmt: skip
    """Promise a new slice. Victims stay until it is committed."""
    choice = choose_slice(books, spec, reclaim=reclaim)
    if isinstance(choice, Refusal):
        return choice
    number = books.serials + 1
    made = Slice(SliceId(f"slice-{number}"), spec, choice.seat, holder, request)
    return _promise(books, made, choice.victims, replaces=False)


def reserve_change(
    books: AdapterBooks, name: SliceId, spec: SliceSpec, *, request: str = ""
) -> Promise | Refusal:
    """Promise a slice other amounts. Nobody makes way for that.

    A slice in use keeps its lanes, its capability, and where it stays what it has; one that nobody
    uses gets a new seat.
    """
    one = books.slices.get(name)
    if one is None:
        return _no_slice(name)
    promised = _fixed(books, name)
    if promised is not None:
        return promised
    seat = _changed_seat(books, one, spec)
    if isinstance(seat, Refusal):
        return seat
    changed = replace(one, spec=spec, seat=seat, request=request or one.request)
    return _promise(books, changed, (), replaces=True)


def _changed_seat(books: AdapterBooks, one: Slice, spec: SliceSpec) -> Seat | Refusal:
    name = one.id
    if one.holder:
        for field_name in ("lanes", "capability"):
            if getattr(spec, field_name) != getattr(one.spec, field_name):
                return Refusal(
                    Reason.DEVICE_IN_USE,
                    f"{name}: {field_name} of a slice in use cannot change; release it first",
                )
        seat = choose_other_seat(free_of(books), spec, one.seat)
    else:
        unknown = _unknown(books, spec)
        if unknown is not None:
            return unknown
        seat = choose_seat(free_of(books, without={name}), spec)
    if seat is None:
        need, room = need_of(spec), free_of(books, without={name}).vector(spec.capability)
        where = "" if not fits(need, room) else "; not where it is without moving it"
        detail = f"{name}: {describe_shortage(need, room)}{where}"
        return Refusal(Reason.NO_CAPACITY, detail, would_fit(room))
    return seat


def _promise(
    books: AdapterBooks, one: Slice, victims: tuple[SliceId, ...], *, replaces: bool
) -> Promise:
    number = books.serials + 1
    reservation = Reservation(ReservationId(f"reservation-{number}"), one, victims, replaces)
    reservations = {**books.reservations, reservation.id: reservation}
    return Promise(books.changed(reservations=reservations, serials=number), reservation)


def commit(books: AdapterBooks, name: ReservationId) -> AdapterBooks | Refusal:
    """Make a promise true: victims end, the slice is there."""
    reservation = books.reservations.get(name)
    if reservation is None:
        return Refusal(Reason.UNKNOWN_ID, f"there is no reservation {name!r}")
    one = reservation.slice
    if reservation.replaces:
        one = replace(one, holder=books.slices[one.id].holder)
    slices = _rest(books, reservation.victims)
    promises = _promises_without(books, reservation.victims)
    del promises[name]
    return books.changed(slices={**slices, one.id: one}, reservations=promises)


def abort(books: AdapterBooks, name: ReservationId) -> AdapterBooks | Refusal:
    """Take a promise back; nobody had to leave for it."""
    if name not in books.reservations:
        return Refusal(Reason.UNKNOWN_ID, f"there is no reservation {name!r}")
    return books.changed(reservations={n: r for n, r in books.reservations.items() if n != name})


def release(books: AdapterBooks, name: SliceId) -> AdapterBooks | Refusal:
    """End a slice; a change that was promised to it goes with it."""
    if name not in books.slices:
        return _no_slice(name)
    return books.changed(
        slices=_rest(books, (name,)), reservations=_promises_without(books, (name,))
    )


def assign(books: AdapterBooks, name: SliceId, holder: str) -> AdapterBooks | Refusal:
    """Give a slice to somebody, or (empty) take it back from its holder."""
    one = books.slices.get(name)
    if one is None:
        return _no_slice(name)
    if holder and one.holder not in ("", holder):
        return Refusal(Reason.DEVICE_IN_USE, f"{name} is with {one.holder}")
    promised = _fixed(books, name)
    if holder != one.holder and promised is not None:
        return promised
    return books.changed(slices={**books.slices, name: replace(one, holder=holder)})


def _no_slice(name: str) -> Refusal:
    return Refusal(Reason.UNKNOWN_ID, f"there is no slice {name!r}")


def _fixed(books: AdapterBooks, name: SliceId) -> Refusal | None:
    """Why a slice cannot change now: a promise stands that counts on it as it is."""
    for reservation in books.reservations.values():
        if name in reservation.victims or (reservation.replaces and reservation.slice.id == name):
            return Refusal(Reason.BUSY, f"{name}: {reservation.id} waits for its commit or abort")
    return None


def _rest(books: AdapterBooks, ended: Collection[SliceId]) -> dict[SliceId, Slice]:
    return {name: one for name, one in books.slices.items() if name not in ended}


def _promises_without(
    books: AdapterBooks, ended: Collection[SliceId]
) -> dict[ReservationId, Reservation]:
    """All promises but changes of slices that end."""
    return {
        name: promise for name, promise in books.reservations.items()
        if not (promise.replaces and promise.slice.id in ended)
    }  # fmt: skip
