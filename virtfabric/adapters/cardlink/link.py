"""A card as the agent has it: `ports.Card` over any wire, with the witness between the two."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.cardlink.hostlink import HostLink
from virtfabric.adapters.cardlink.witness import Witness
from virtfabric.model.adapter import Reservation, SliceId
from virtfabric.model.card import CardCondition, CardNews, CardNewsKind, CardView, SliceProgram
from virtfabric.model.errors import (
    CardError,
    Reason,
    Refusal,
    RefusedError,
    StepCancelledError,
)
from virtfabric.model.image import Phase
from virtfabric.protocol import messages as m
from virtfabric.protocol.frames import MAX_TAIL

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.cardlink.wire import Wire
    from virtfabric.model.adapter import AdapterId, Slice, SliceSpec
    from virtfabric.model.card import SignedImage
    from virtfabric.ports import StepContext
    from virtfabric.protocol.messages import Message

LOADED: Final = 0.6
"""Share of the progress of a programming that is the loading of its image."""
_LOOK_S: Final = 0.25
"""Without a word of the card so long, it is asked how far it is."""


class WitnessedCard(HostLink):
    """Implements `ports.Card`, and hears its wire (`WireListener`)."""

    def __init__(self, serial: AdapterId, wire: Wire) -> None:
        super().__init__(serial, wire)
        self._witness = Witness(serial)
        self._turn = threading.Condition()
        self._view = CardView(serial)
        self._progress: dict[SliceId, m.Progress] = {}
        self._tell: Callable[[CardNews], None] = lambda _news: None

    # -- CardLink -----------------------------------------------------------------------------

    @property
    def serial(self) -> AdapterId:
        """Which card it is."""
        return self._serial

    def view(self) -> CardView:
        """As last told."""
        with self._turn:
            return self._view

    def refresh(self) -> CardView:
        """Ask it for all that it has."""
        answer = self._wire.ask(m.InventoryRequest())
        if isinstance(answer, m.Error):
            raise self._failure(answer)
        return self.view()

    def watch(self, changed: Callable[[CardNews], None]) -> None:
        """Connect, and tell of what happens."""
        self._tell = changed
        self._wire.start(self)

    def trust(self) -> None:
        """Believe it anew."""
        with self._turn:
            if self._view.condition is CardCondition.DISTRUSTED:
                self._witness = Witness(self._serial)
                self._view = CardView(self._serial, why="trusted anew, not connected yet")
        self._wire.start(self)

    def close(self) -> None:
        """End the link."""
        self._wire.close()

    # -- CardSlices ---------------------------------------------------------------------------

    def reserve(
        self, spec: SliceSpec, *, request: str, holder: str = "", reclaim: bool = True,
        change: SliceId | None = None,
    ) -> Reservation | Slice | Refusal:  # fmt: skip
        """Promise a slice, or other amounts of one."""
        self.refresh()  # what it is to be compared with
        asked = m.AllocationRequest(request, spec, holder, change or "", reclaim)
        answer = self._wire.ask(asked)
        if isinstance(answer, m.Error):
            return self._refusal(answer)
        self.refresh()  # what shows only together with all else
        if isinstance(answer, m.Grant):
            return answer.slice
        assert isinstance(answer, m.Decision)
        return Reservation(
            answer.reservation, answer.slice, answer.victims, replaces=change is not None
        )

    def commit(self, promise: Reservation) -> Slice | Refusal:
        """Make a promise true."""
        answer = self._wire.ask(m.Commit(promise.id))
        if isinstance(answer, m.Error):
            return self._refusal(answer)
        self.refresh()
        assert isinstance(answer, m.Grant)
        return answer.slice

    def withdraw(self, request: str) -> None:
        """See to it that nothing is there of this request."""
        books = self.refresh().books
        assert books is not None
        for promise in books.reservations.values():
            if promise.slice.request == request:
                self._say(m.Abort(promise.id))
        for one in books.slices.values():
            if one.request == request:
                self._say(m.Release(one.id))
        self.refresh()

    def assign(self, name: SliceId, holder: str) -> Refusal | None:
        """Give a slice to a holder, or take it back."""
        return self._do(m.Assign(name, holder))

    def release(self, name: SliceId) -> Refusal | None:
        """End a slice."""
        return self._do(m.Release(name))

    def _do(self, message: Message) -> Refusal | None:
        answer = self._wire.ask(message)
        if isinstance(answer, m.Error):
            return self._refusal(answer)
        self.refresh()
        return None

    def _say(self, message: Message) -> None:
        answer = self._wire.ask(message)
        if isinstance(answer, m.Error):
            refusal = self._refusal(answer)
            if refusal.reason is not Reason.UNKNOWN_ID:  # it ended by itself
                raise RefusedError(refusal)

    # -- CardImages ---------------------------------------------------------------------------

    def program(
        self, name: SliceId, image: SignedImage, context: StepContext, *, deadline_s: float
    ) -> Refusal | None:
        """Load an image, and wait until the slice can do what it is for."""
        until = time.monotonic() + deadline_s
        with self._turn:
            self._progress.pop(name, None)
        answer = self._wire.ask(m.Configure(name, image.manifest, image.signature))
        if isinstance(answer, m.Error):
            return self._refusal(answer)
        problem = self._load(name, image, context)
        if problem is not None:
            return problem
        return self._await_program(name, image, context, until)

    def _load(self, name: SliceId, image: SignedImage, context: StepContext) -> Refusal | None:
        size = len(image.data)
        for first in range(0, size, MAX_TAIL):
            if context.cancelled.is_set():
                raise StepCancelledError("cancelled while the image was loaded")
            part = image.data[first : first + MAX_TAIL]
            answer = self._wire.ask(m.ImageData(name, first, part))
            if isinstance(answer, m.Error):
                return self._refusal(answer)
            assert isinstance(answer, m.Progress)
            if answer.phase in (Phase.READY, Phase.BLANK):
                return self._bad_image(name, answer.detail)
            done = first + len(part)
            context.progress(LOADED * done / size, f"{name}: loading, {done} of {size} bytes")
        return None

    def _await_program(
        self, name: SliceId, image: SignedImage, context: StepContext, until: float
    ) -> Refusal | None:
        while time.monotonic() < until:
            with self._turn:
                self._turn.wait_for(lambda: name in self._progress, _LOOK_S)
                progress = self._progress.pop(name, None)
            if progress is None:
                self.refresh()
                program = self.view().programs.get(name)
                if program is None:
                    return Refusal(Reason.UNKNOWN_ID, f"{name} ended while it was programmed")
                if program.phase in (Phase.LOADING, Phase.PROGRAMMING):
                    continue
                return self._judge(name, image, "")
            if progress.phase in (Phase.READY, Phase.BLANK):
                self.refresh()
                return self._judge(name, image, progress.detail)
            share = progress.done / max(1, progress.total)
            text = f"{name}: programming, {progress.done} of {progress.total} bytes"
            context.progress(LOADED + (1 - LOADED) * share, text)
        raise CardError(f"card {self._serial}: {name} was not programmed in time")

    def _judge(self, name: SliceId, image: SignedImage, detail: str) -> Refusal | None:
        program = self.view().programs.get(name, SliceProgram())
        if detail or (program.phase, program.image) != (Phase.READY, image.manifest.name):
            return self._bad_image(name, detail or "it does not run it")
        return None

    def _bad_image(self, name: SliceId, why: str) -> Refusal:
        return Refusal(Reason.IMAGE_REFUSED, f"card {self._serial}: {name}: {why}")

    # -- WireListener -------------------------------------------------------------------------

    def greeted(self, hello: m.Hello, inventory: m.Inventory) -> None:
        """A link is up."""
        restarted = self._witness.greeted(hello, inventory)
        view = CardView(
            self._serial, CardCondition.CONNECTED, "", hello.boot, hello.software
        )  # fmt: skip
        with self._turn:
            self._view = view
        self._adopt(inventory)
        if restarted:
            self._news(CardNewsKind.RESTARTED, f"it has started anew ({hello.boot})")
        self._news(CardNewsKind.CONNECTED, hello.software)

    def answered(self, asked: Message, answer: Message) -> None:
        """An answer came."""
        self._witness.answered(asked, answer)
        if isinstance(answer, m.Inventory):
            self._adopt(answer)

    def told(self, message: Message) -> None:
        """The card said something by itself."""
        self._witness.told(message)
        match message:
            case m.Telemetry():
                readings = {reading.subject: reading.values for reading in message.readings}
                with self._turn:
                    self._view = replace(self._view, readings=readings)
            case m.Progress():
                with self._turn:
                    # one that waits for it takes it; others are only those of this card's slices
                    if self._view.books and message.slice in self._view.books.slices:
                        self._progress[message.slice] = message
                    self._turn.notify_all()
            case m.Event():
                self._news(CardNewsKind.EVENT, message.detail, message.what, SliceId(message.slice))

    def refused(self, why: str) -> None:
        """A frame of it could not be taken."""
        self._news(CardNewsKind.REFUSED, why)

    def lost(self, why: str) -> None:
        """The link ended; it is tried again."""
        with self._turn:
            self._view = replace(self._view, condition=CardCondition.LOST, why=why)
        self._news(CardNewsKind.LOST, why)

    def lied(self, why: str) -> None:
        """What it said cannot be true."""
        with self._turn:
            self._view = replace(self._view, condition=CardCondition.DISTRUSTED, why=why)
        self._news(CardNewsKind.DISTRUSTED, why)

    def _adopt(self, inventory: m.Inventory) -> None:
        programs = {
            report.slice.id: SliceProgram(report.phase, report.image)
            for report in inventory.slices
        }  # fmt: skip
        with self._turn:
            self._view = replace(
                self._view, books=self._witness.books, programs=programs,
                badges=dict(self._witness.badges),
            )  # fmt: skip

    def _news(self, kind: CardNewsKind, detail: str, what: str = "", name: str = "") -> None:
        self._tell(CardNews(self._serial, kind, detail, what, name))

    # -- refusals -----------------------------------------------------------------------------

    def _refusal(self, error: m.Error) -> Refusal:
        if error.code != m.ErrorCode.REFUSED or error.reason not in set(Reason):
            raise self._failure(error)
        detail = f"card {self._serial}: {error.detail}"
        return Refusal(Reason(error.reason), detail, error.would_fit)
