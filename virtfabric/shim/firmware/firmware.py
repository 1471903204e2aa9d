"""The firmware: what a card does with what hosts say. One message in, its answers out.

Every change is on the flash (`statelog`) before it is answered. It decides by `policy.slicing`, and
knows neither links nor bytes. Time is an argument: what takes time goes on in `tick`.
"""

from __future__ import annotations

import hmac
from collections import Counter
from typing import TYPE_CHECKING, Final

from virtfabric.model.adapter import AdapterBooks, ReservationId, SliceId
from virtfabric.model.badge import BADGE_DIGITS
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.image import Phase
from virtfabric.policy import slicing
from virtfabric.policy.seating import free_of
from virtfabric.policy.slicecheck import AccessFault, check_access
from virtfabric.protocol import messages as m
from virtfabric.shim.firmware.hostdesk import HostDesk
from virtfabric.shim.firmware.programming import (
    MAX_IMAGE,
    PATIENCE_S,
    ConfigurationError,
    Programming,
)
from virtfabric.shim.firmware.state import CardState, form_of_state, read_state
from virtfabric.shim.firmware.statelog import StateError
from virtfabric.trust.images import is_signed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.model.adapter import Adapter, Reservation
    from virtfabric.model.image import ImageManifest
    from virtfabric.ports import Clock
    from virtfabric.protocol.messages import Message
    from virtfabric.shim.firmware.programming import ConfigurationPort
    from virtfabric.shim.firmware.statelog import StateLog

PROMISE_S: Final = 30.0
"""How long a reservation waits for its commit."""
TELEMETRY_S: Final = 1.0
_REFUSED: Final = "dma_refused"


class Firmware:
    """One card. Not for several threads at once.

    Attributes:
        hosts: for whose CPU and memory it decides.
    """

    def __init__(
        self, adapter: Adapter, log: StateLog, *, clock: Clock, port: ConfigurationPort,
        signers: Sequence[bytes] = (), secret: bytes = b"",
    ) -> None:  # fmt: skip
        """Power on: the state of before, without images that were on their way.

        Args:
            adapter: what the card has.
            log: its flash.
            clock: its time; the wall clock is asked for the end date of images.
            port: writes into its accelerators.
            signers: public keys (PEM) of those whose images it takes.
            secret: what its slices' badges are made of; empty where they have no PCI functions.

        Raises:
            StateDamagedError: the flash holds something else than a state of this card.
        """
        self.hosts = HostDesk()
        self._log = log
        self._clock = clock
        self._port = port
        self._signers = tuple(signers)
        self._secret = secret
        self._state = (
            CardState(AdapterBooks(adapter))
            if log.state is None
            else read_state(log.state, adapter)
        )
        self._programming: dict[SliceId, Programming] = {}
        now = clock.monotonic()
        self._began = now
        # a promise outlives loss of power, or two-phase work over several cards could be cut in
        # half; how long it had waited is not known any more, so it waits anew
        self._expires = dict.fromkeys(self.books.reservations, now + PROMISE_S)
        self._faults: Counter[str] = Counter()
        self._refused_dma: Counter[SliceId] = Counter()
        self._first_fault: dict[str, AccessFault] = {}
        self._figures: dict[SliceId, dict[str, int]] = {}
        self._told = now
        self._events: list[Message] = []
        if log.state is not None:
            count = len(self.books.slices)
            self._tell(m.EventKind.STATE_RESTORED, f"{count} slices, {len(self._expires)} promises")

    @property
    def books(self) -> AdapterBooks:
        """Slices and promises as they are now."""
        return self._state.books

    def phase(self, name: SliceId) -> Phase:
        """How far the accelerators of a slice are."""
        if name in self._programming:
            return self._programming[name].phase
        return self._settled(name)

    def badge(self, name: SliceId) -> str:
        """The code that a slice's function shows; empty for a card without functions.

        Only who is told by this card knows it, so no other card's function can show it.
        """
        if not self._secret:
            return ""
        return hmac.digest(self._secret, name.encode(), "sha256").hex()[:BADGE_DIGITS]

    def handle(self, message: Message, host: str = "", size: int = 0) -> list[Message]:
        """The answers to a host's message; none to what needs none.

        What cannot be kept on the flash has not happened, and is answered with `internal`.

        Args:
            message: what it said.
            host: who said it, as its certificate proved.
            size: bytes of its body.
        """
        answer = self.hosts.handle(message, host, size)
        if answer is not None:
            return [answer]
        handler = self._HANDLERS.get(type(message))
        if handler is None:
            return []
        try:
            return handler(self, message)
        except StateError as error:
            return [m.Error(m.ErrorCode.INTERNAL, str(error))]

    def tick(self) -> list[Message]:
        """Let time pass: what all hosts are to hear."""
        now = self._clock.monotonic()
        self._expire(now)
        told: list[Message] = [
            progress for name in tuple(self._programming) for progress in self._advance(name, now)
        ]
        self._tell_faults()
        told += self._events
        self._events = []
        if now - self._told >= TELEMETRY_S:
            self._told = now
            told.append(self._telemetry(now))
        return told

    def access(self, key: int, start: int, size: int) -> AccessFault | None:
        """An access to the card's memory, as the protection sees it; None: it goes through."""
        fault = check_access(self.books, key, start, size)
        if fault is not None:
            self.note_fault(fault)
        return fault

    def note_fault(self, fault: AccessFault, count: int = 1) -> None:
        """The protection stopped accesses of a slice: counted, and told once a tick.

        A guest must not drown the link in its own faults.

        Args:
            fault: the first of them.
            count: how many there were.
        """
        self._faults[fault.slice] += count
        self._first_fault.setdefault(fault.slice, fault)

    def measure(self, name: SliceId, values: Mapping[str, int]) -> None:
        """Figures of a slice, for telemetry; the latest count.

        DMA that was refused meanwhile (`dma_refused`) is told once a tick.
        """
        before = self._figures.get(name, {}).get(_REFUSED, 0)
        refused = values.get(_REFUSED, 0) - before
        if refused > 0:
            self._refused_dma[name] += refused
        self._figures[name] = dict(values)

    # -- slices -------------------------------------------------------------------------------

    def _inventory(self, _message: m.InventoryRequest) -> list[Message]:
        reports = tuple(
            m.SliceReport(one, self.phase(name), self._state.images.get(name, ""), self.badge(name))
            for name, one in self.books.slices.items()
        )
        promises = tuple(self.books.reservations.values())
        return [m.Inventory(self.books.adapter, reports, promises, self.books.generation)]

    def _allocate(self, message: m.AllocationRequest) -> list[Message]:
        known = self._known(message)
        if known is not None:
            return [known]
        if message.slice:
            name = SliceId(message.slice)
            if name in self._programming:
                return [_refused(Refusal(Reason.BUSY, f"{name} is being programmed"))]
            promise = slicing.reserve_change(
                self.books, name, message.spec, request=message.request
            )
        else:
            promise = slicing.reserve(
                self.books, message.spec, holder=message.holder, request=message.request,
                reclaim=message.reclaim,
            )  # fmt: skip
        if isinstance(promise, Refusal):
            return [_refused(promise)]
        self._keep(self._state.with_books(promise.books))
        self._expires[promise.reservation.id] = self._clock.monotonic() + PROMISE_S
        return [self._decision(promise.reservation)]

    def _known(self, message: m.AllocationRequest) -> Message | None:
        """The answer to a request that was made before."""
        for promise in self.books.reservations.values():
            if promise.slice.request == message.request:
                same = promise.slice.spec == message.spec
                return self._decision(promise) if same else _reused(message.request)
        for one in self.books.slices.values():
            if one.request == message.request:
                same = one.spec == message.spec
                return m.Grant(one, self.books.generation) if same else _reused(message.request)
        return None

    def _decision(self, promise: Reservation) -> m.Decision:
        left = self._expires.get(promise.id, 0.0) - self._clock.monotonic()
        left_ms = max(0, round(left * 1000))
        return m.Decision(promise.id, promise.slice, promise.victims, left_ms)

    def _commit(self, message: m.Commit) -> list[Message]:
        name = ReservationId(message.reservation)
        promise = self.books.reservations.get(name)
        books = slicing.commit(self.books, name)
        if isinstance(books, Refusal):
            return [_refused(books)]
        assert promise is not None
        gone = [victim for victim in promise.victims if victim in self.books.slices]
        self._keep(self._state.with_books(books))
        for victim in gone:
            detail = f"for {promise.slice.id}, priority {promise.slice.spec.priority}"
            self._tell(m.EventKind.SLICE_RECLAIMED, detail, victim)
        return [m.Grant(self.books.slices[promise.slice.id], self.books.generation)]

    def _abort(self, message: m.Abort) -> list[Message]:
        return self._change(slicing.abort(self.books, ReservationId(message.reservation)))

    def _assign(self, message: m.Assign) -> list[Message]:
        return self._change(slicing.assign(self.books, SliceId(message.slice), message.holder))

    def _release(self, message: m.Release) -> list[Message]:
        return self._change(slicing.release(self.books, SliceId(message.slice)))

    def _change(self, books: AdapterBooks | Refusal) -> list[Message]:
        if isinstance(books, Refusal):
            return [_refused(books)]
        self._keep(self._state.with_books(books))
        return [m.Done()]

    def _heartbeat(self, message: m.Heartbeat) -> list[Message]:
        return [message]

    # -- images -------------------------------------------------------------------------------

    def _configure(self, message: m.Configure) -> list[Message]:
        name = SliceId(message.slice)
        image = message.manifest
        refusal = self._objection(name, image) or self._doubt(image, message.signature)
        if refusal is not None:
            return [_refused(refusal)]
        now = self._clock.monotonic()
        self._programming[name] = Programming(name, image, now)
        return [self._progress(name)]

    def _objection(self, name: SliceId, image: ImageManifest) -> Refusal | None:
        """What is against programming this slice with such an image."""
        one = self.books.slices.get(name)
        if one is None:
            return Refusal(Reason.UNKNOWN_ID, f"there is no slice {name!r}")
        if name in self._programming:
            return Refusal(Reason.BUSY, f"{name} is being programmed")
        if any(p.replaces and p.slice.id == name for p in self.books.reservations.values()):
            return Refusal(Reason.BUSY, f"{name}: a change of it waits for its commit or abort")
        if one.holder and self.phase(name) == Phase.READY:
            return Refusal(Reason.DEVICE_IN_USE, f"{name} works for {one.holder}")
        if image.capability != one.spec.capability:
            wanted = one.spec.capability or "nothing that an image could do"
            return _bad_image(f"is for {image.capability}; {name} is for {wanted}")
        return None

    def _doubt(self, image: ImageManifest, signature: str) -> Refusal | None:
        """What is wrong with the image itself."""
        if image.size > MAX_IMAGE:
            return _bad_image(f"has {image.size} bytes; a bank holds {MAX_IMAGE}")
        if not is_signed(image, signature, self._signers):
            return _bad_image("is not signed by anybody whom this card knows")
        if self._clock.now() >= image.not_after:
            return _bad_image("is past its end date")
        return None

    def _load(self, message: m.ImageData) -> list[Message]:
        name = SliceId(message.slice)
        programming = self._programming.get(name)
        if programming is None:
            return [_refused(Refusal(Reason.UNKNOWN_ID, f"no image is on its way into {name!r}"))]
        problem = programming.load(message.offset, message.data, self._clock.monotonic())
        return [self._roll_back(name, problem)] if problem else [self._progress(name)]

    def _advance(self, name: SliceId, now: float) -> list[Message]:
        programming = self._programming[name]
        if programming.phase == Phase.LOADING:
            late = now - programming.touched > PATIENCE_S
            return [self._roll_back(name, "its bytes stopped coming")] if late else []
        try:
            if programming.advance(self._port, now):
                self._keep(self._state.with_image(name, programming.manifest.name))
                del self._programming[name]
        except (ConfigurationError, StateError) as error:
            return [self._roll_back(name, str(error))]
        return [self._progress(name)]

    def _progress(self, name: SliceId, detail: str = "") -> m.Progress:
        programming = self._programming.get(name)
        if programming is None:
            return m.Progress(name, self._settled(name), 0, 0, detail)
        size = programming.manifest.size
        return m.Progress(name, programming.phase, programming.done, size, detail)

    def _roll_back(self, name: SliceId, problem: str) -> m.Progress:
        """What ran before runs on: the new image was in the other bank."""
        image = self._programming.pop(name).manifest.name
        return self._progress(name, f"image {image}: {problem}")

    def _settled(self, name: SliceId) -> Phase:
        return Phase.READY if name in self._state.images else Phase.BLANK

    # -- what happens by itself ---------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for name in [n for n, at in self._expires.items() if at <= now]:
            books = slicing.abort(self.books, name)
            if isinstance(books, Refusal):
                continue
            try:
                self._keep(self._state.with_books(books))
            except StateError:
                return  # tried again at the next tick
            self._tell(m.EventKind.RESERVATION_EXPIRED, f"{name} was not committed in time")

    def _tell_faults(self) -> None:
        for name, count in self._faults.items():
            more = f" (and {count - 1} more)" if count > 1 else ""
            self._tell(m.EventKind.ACCESS_FAULT, f"{self._first_fault[name]}{more}", name)
        self._faults.clear()
        self._first_fault.clear()
        for name, count in self._refused_dma.items():
            detail = f"{count} DMA accesses outside of the memory that its host mapped for it"
            self._tell(m.EventKind.DMA_REFUSED, detail, name)
        self._refused_dma.clear()

    def _telemetry(self, now: float) -> m.Telemetry:
        free = slicing.would_fit(free_of(self.books).vector(""))
        slices = (m.Reading(name, values) for name, values in self._figures.items())
        decided = dict(self.hosts.counts)
        arbiter = (m.Reading("arbiter", decided),) if decided else ()
        return m.Telemetry(self._ms(now), (m.Reading("adapter", free), *arbiter, *slices))

    def _tell(self, what: m.EventKind, detail: str, name: str = "") -> None:
        self._events.append(m.Event(what, self._ms(self._clock.monotonic()), detail, name))

    def _ms(self, now: float) -> int:
        return max(0, round((now - self._began) * 1000))

    def _keep(self, state: CardState) -> None:
        """Make a state the card's: on the flash first.

        Raises:
            StateError: it stays as it was.
        """
        self._log.append(form_of_state(state))
        self._state = state
        self._expires = {n: at for n, at in self._expires.items() if n in self.books.reservations}
        for name in [n for n in self._programming if n not in self.books.slices]:
            del self._programming[name]
        for name in [n for n in self._figures if n not in self.books.slices]:
            del self._figures[name]

    _HANDLERS: Final[dict[type[Message], Callable[..., list[Message]]]] = {
        m.InventoryRequest: _inventory, m.AllocationRequest: _allocate, m.Commit: _commit,
        m.Abort: _abort, m.Assign: _assign, m.Release: _release, m.Configure: _configure,
        m.ImageData: _load, m.Heartbeat: _heartbeat,
    }  # fmt: skip


def _refused(refusal: Refusal) -> m.Error:
    return m.Error(
        m.ErrorCode.REFUSED, refusal.detail, reason=refusal.reason, would_fit=refusal.would_fit
    )


def _bad_image(problem: str) -> Refusal:
    return Refusal(Reason.IMAGE_REFUSED, f"the image {problem}")


def _reused(request: str) -> m.Error:
    detail = f"request {request!r} was made before, for other amounts"
    return _refused(Refusal(Reason.INVALID_ARGUMENT, detail))
