"""The witness: remembers what one card said, and catches it where it contradicts that. Pure.

A card may be broken, replaced by somebody, or hostile; it must not get a guest anything that was
not decided, nor take from one. Other hosts may change the same card, so what is new is no lie by
itself: a lie is what no honest card could say to anybody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.adapter import AdapterBooks, Reservation, ReservationId, SliceId
from virtfabric.model.errors import VirtfabricError
from virtfabric.policy.slicecheck import find_faults
from virtfabric.protocol import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from virtfabric.model.adapter import AdapterId, Slice
    from virtfabric.protocol.messages import Message


class LieError(VirtfabricError):
    """The card said what cannot be true."""


class Witness:
    """Of one card, in the order in which it speaks.

    Attributes:
        books: of the last inventory; None before the first.
        badges: codes of slices that have PCI functions, of the same inventory.
        boot: of its last greeting.
    """

    def __init__(self, serial: AdapterId) -> None:
        self._serial = serial
        self.books: AdapterBooks | None = None
        self.boot = ""
        self._generation = 0
        self._promises: dict[ReservationId, Reservation] = {}
        self._gone: set[SliceId] = set()
        self._ended: dict[ReservationId, set[SliceId]] = {}
        """Slices that ended before the promise did for which they were to."""
        self.badges: dict[SliceId, str] = {}

    def greeted(self, hello: m.Hello, inventory: m.Inventory) -> bool:
        """A new link; whether the card has started anew since the last one.

        Raises:
            LieError
        """
        restarted = bool(self.boot) and hello.boot != self.boot
        self.boot = hello.boot
        self._inventory(inventory, restarted=restarted)
        return restarted

    def answered(self, asked: Message, answer: Message) -> None:
        """An answer.

        Raises:
            LieError
        """
        if isinstance(answer, m.Error):
            return
        check = self._CHECKS.get((type(asked), type(answer)))
        if check is None:
            said, wanted = type(answer).__name__, type(asked).__name__
            raise LieError(f"it answered {wanted} with {said}")
        check(self, asked, answer)

    def told(self, message: Message) -> None:
        """Something that nobody asked for.

        Raises:
            LieError: a card never says that by itself.
        """
        if not isinstance(message, m.Event | m.Telemetry | m.Progress | m.Heartbeat | m.Error):
            raise LieError(f"it sent a {type(message).__name__} that nobody had asked for")

    # -- inventories --------------------------------------------------------------------------

    def _inventory(self, told: m.Inventory, *, restarted: bool = False) -> None:
        if told.adapter.serial != self._serial:
            raise LieError(f"its inventory is of {told.adapter.serial!r}")
        _check_names("slice", (report.slice.id for report in told.slices))
        _check_names("reservation", (promise.id for promise in told.reservations))
        books = AdapterBooks(
            told.adapter,
            {report.slice.id: report.slice for report in told.slices},
            {promise.id: promise for promise in told.reservations},
            told.generation,
        )
        faults = find_faults(books)
        if faults:
            raise LieError(f"its inventory cannot be: {'; '.join(faults[:3])}")
        self._compare(books, restarted=restarted)
        self._take_badges(told, restarted=restarted)
        self.books = books
        self._promises = {n: p for n, p in self._promises.items() if n in books.reservations}
        self._ended = {n: names for n, names in self._ended.items() if n in self._promises}

    def _take_badges(self, told: m.Inventory, *, restarted: bool) -> None:
        """A badge is one slice's, and stays until the card starts anew."""
        badges = {report.slice.id: report.badge for report in told.slices if report.badge}
        _check_names("badge", badges.values())
        for name, badge in badges.items():
            if not restarted and self.badges.get(name, badge) != badge:
                raise LieError(f"{name} has another badge than before")
        self.badges = badges

    def _compare(self, books: AdapterBooks, *, restarted: bool) -> None:
        """With what it said before."""
        back = self._gone & books.slices.keys()
        if back:
            raise LieError(f"{min(back)} ended, and is there again")
        for name, promise in self._promises.items():
            if books.reservations.get(name, promise) != promise:
                raise LieError(f"{name} is not what was promised any more")
            if name in books.reservations:
                self._check_victims(promise, books)
        self._check_generation(books.generation)
        before = self.books
        if before is None:
            return
        if books.generation == before.generation and _content(books) != _content(before):
            raise LieError(f"it changed without a new generation, {books.generation}")
        if books.adapter != before.adapter and not restarted:
            raise LieError("it has other parts than before, and was not started anew")

    def _check_generation(self, now: int) -> None:
        if now < self._generation:
            raise LieError(f"its generation went back from {self._generation} to {now}")
        self._generation = now

    def _check_victims(self, promise: Reservation, books: AdapterBooks) -> None:
        """Those who would end are or were there, and have to make way for this one.

        Several promises may wait for the end of the same slice: the first that is granted ends it.
        """
        before = self.books.slices if self.books else {}
        ended = self._ended.setdefault(promise.id, set())
        for name in promise.victims:
            victim = books.slices.get(name)
            if victim is None and (name in ended or name in before):
                ended.add(name)
                continue
            if victim is None:
                raise LieError(f"{name} would end, a slice that it never had")
            if not victim.spec.reclaimable or victim.spec.priority >= promise.slice.spec.priority:
                raise LieError(
                    f"{name} (priority {victim.spec.priority}) would end for priority "
                    f"{promise.slice.spec.priority}"
                )

    # -- slices -------------------------------------------------------------------------------

    def _decision(self, asked: m.AllocationRequest, decision: m.Decision) -> None:
        """What of a promise shows at once; the inventory that follows it shows the rest.

        What others have may have changed since the last one.
        """
        one, replaces = decision.slice, bool(asked.slice)
        self._check_asked(asked, one)
        known = self._known()
        if replaces and one.id != asked.slice:
            raise LieError(f"asked to change {asked.slice}, it promised {one.id}")
        if not replaces and (one.id in known.slices or one.id in self._gone):
            raise LieError(f"it promised {one.id}, which is or was somebody's")
        _check_names("victim", decision.victims)
        if decision.victims and (replaces or not asked.reclaim):
            raise LieError("slices would end that were not to")
        promise = Reservation(decision.reservation, one, decision.victims, replaces)
        if self._promises.get(promise.id, promise) != promise:
            raise LieError(f"{promise.id} is not what was promised any more")
        faults = find_faults(AdapterBooks(known.adapter, {one.id: one}))
        if faults:
            raise LieError(f"what it promised cannot be: {'; '.join(faults[:3])}")
        self._promises[promise.id] = promise

    def _check_asked(self, asked: m.AllocationRequest, one: Slice) -> None:
        """The slice is the one that was asked for, and its seat is what such a one needs."""
        if one.request != asked.request:
            raise LieError(f"asked for {asked.request}, it answered about {one.request!r}")
        if one.spec != asked.spec:
            raise LieError(f"{one.id} has other amounts than were asked for")
        if one.spec.units and one.seat.capability != one.spec.capability:
            raise LieError(f"{one.id} has accelerators for {one.seat.capability!r}")

    def _granted_before(self, asked: m.AllocationRequest, grant: m.Grant) -> None:
        self._check_asked(asked, grant.slice)
        self._check_generation(grant.generation)
        known = self._known().slices.get(grant.slice.id)
        if known is None or known.request != grant.slice.request:
            raise LieError(f"it granted {grant.slice.id} before, a slice that it never had")

    def _grant(self, asked: m.Commit, grant: m.Grant) -> None:
        promise = self._promises.pop(ReservationId(asked.reservation), None)
        if promise is None:
            raise LieError(f"it granted {grant.slice.id}, which it had never promised")
        meant, known = promise.slice, self._known()
        if promise.replaces and meant.id in known.slices:
            meant = replace(meant, holder=known.slices[meant.id].holder)
        if grant.slice not in (promise.slice, meant):
            raise LieError(f"it granted {grant.slice.id} otherwise than it had promised")
        if grant.generation <= known.generation:
            raise LieError(f"its generation did not grow with a grant: {grant.generation}")
        self._check_generation(grant.generation)
        self._gone |= set(promise.victims)

    def _end(self, asked: m.Release, _done: m.Done) -> None:
        """It says that this slice ended: it can never be there again."""
        self._gone.add(SliceId(asked.slice))

    def _abort(self, asked: m.Abort, _done: m.Done) -> None:
        self._promises.pop(ReservationId(asked.reservation), None)

    def _progress(self, asked: m.Configure | m.ImageData, progress: m.Progress) -> None:
        if progress.slice != asked.slice:
            raise LieError(f"asked about {asked.slice}, it answered about {progress.slice}")
        if progress.done > progress.total:
            raise LieError(f"{progress.slice}: {progress.done} bytes of {progress.total}")

    def _decided(self, asked: m.HostRequest, answer: m.HostDecision | m.HostRefusal) -> None:
        """It is the answer to this; whether it may be done is not for the link to say."""
        if (answer.picture, answer.request) != (asked.picture, asked.request):
            raise LieError(f"asked about {asked.request}, it decided {answer.request!r}")

    def _beat(self, asked: m.Heartbeat, answer: m.Heartbeat) -> None:
        if asked != answer:
            raise LieError(f"it answered heartbeat {asked.beat} with {answer.beat}")

    def _known(self) -> AdapterBooks:
        if self.books is None:
            raise LieError("it answered before it said what it has")
        return self.books

    _CHECKS: Final[dict[tuple[type[Message], type[Message]], Callable[..., None]]] = {
        (m.InventoryRequest, m.Inventory): lambda self, _, told: self._inventory(told),
        (m.AllocationRequest, m.Decision): _decision,
        (m.AllocationRequest, m.Grant): _granted_before,
        (m.Commit, m.Grant): _grant,
        (m.Release, m.Done): _end,
        (m.Abort, m.Done): _abort,
        (m.Assign, m.Done): lambda *_: None,
        (m.Telemetry, m.Done): lambda *_: None,
        (m.Configure, m.Progress): _progress,
        (m.ImageData, m.Progress): _progress,
        (m.Heartbeat, m.Heartbeat): _beat,
        (m.HostPicture, m.Done): lambda *_: None,
        (m.HostRequest, m.HostDecision): _decided,
        (m.HostRequest, m.HostRefusal): _decided,
        (m.HostOutcome, m.Done): lambda *_: None,
    }
    """By what was asked, what may answer it."""


def _content(books: AdapterBooks) -> object:
    return books.slices, books.reservations


def _check_names(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise LieError(f"{what} {name} is there twice")
        seen.add(name)
