"""One handler for each step type that changes slices of cards.

An undo never fails: what cannot be undone since the card is lost stays there under a key that no
books know, and is withdrawn when the card is back (`policy.sliceplans.plan_settling`). A promise
ends by itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from virtfabric.model.adapter import Slice
from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence
from virtfabric.model.errors import (
    CardError,
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.model.adapter import AdapterBooks, Reservation, SliceSpec
    from virtfabric.model.step import Step
    from virtfabric.ports import Card, Cards, StepContext, StepHandler

S = TypeVar("S", BringSlice, AssignSlice)
log = logging.getLogger(__name__)


class BringSliceHandler:
    """Implements `ports.StepHandler`. No guest has a say in it."""

    kind = BringSlice.kind

    def __init__(self, cards: Cards) -> None:
        """Change slices of these cards."""
        self._cards = cards

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = _own(step, BringSlice)
        context.progress(0.0, own.describe())
        card = self._cards.reach(own.card)
        if own.after is SlicePresence.ABSENT:
            card.withdraw(own.key)
        else:
            found = _promise(card, own)
            if own.after is SlicePresence.GRANTED and not isinstance(found, Slice):
                _insist(card.commit(found))
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """Ask the card."""
        own = _own(step, BringSlice)
        books = _books(self._cards.reach(own.card))
        found = presence_of(books, own.key)
        if found is not own.after:
            raise VerificationError(f"{own}: the card has it as {found}")
        one = slice_of(books, own.key)
        if one is not None and one.spec != own.spec:
            raise VerificationError(f"{own}: {one.id} is otherwise than asked for")

    def undo(self, step: Step) -> int:
        """Restore `step.before`, as far as the card can be asked."""
        own = _own(step, BringSlice)
        try:
            self._bring_back(self._cards.reach(own.card), own)
        except (CardError, RefusedError) as error:
            log.warning("%s: not undone yet, settled when the card is back: %s", own, error)
        return 0

    def _bring_back(self, card: Card, step: BringSlice) -> None:
        if step.before is SlicePresence.GRANTED:
            _make(card, step.key, step.spec, step.holder)
            return
        card.withdraw(step.key)
        if step.before is SlicePresence.PROMISED:
            # gives nobody anything: where others were faster, the undo of the promise comes next
            card.reserve(step.spec, request=step.key, holder=step.holder, reclaim=False)
            return
        for victim in step.victims:
            if slice_of(_books(card), victim.key) is None:
                _make(card, victim.key, victim.part, "")


class AssignSliceHandler:
    """Implements `ports.StepHandler`."""

    kind = AssignSlice.kind

    def __init__(self, cards: Cards) -> None:
        """Change slices of these cards."""
        self._cards = cards

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = _own(step, AssignSlice)
        card = self._cards.reach(own.card)
        one = slice_of(_books(card), own.key)
        if one is None:
            detail = f"card {own.card} has no slice of {own.key}"
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, detail))
        _give(card, one, own.after)
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """Ask the card."""
        own = _own(step, AssignSlice)
        one = slice_of(_books(self._cards.reach(own.card)), own.key)
        if one is None or one.holder != own.after:
            found = "not there" if one is None else f"with {one.holder or 'nobody'}"
            raise VerificationError(f"{own}: it is {found}")

    def undo(self, step: Step) -> int:
        """Restore `step.before`, as far as the card can be asked."""
        own = _own(step, AssignSlice)
        try:
            card = self._cards.reach(own.card)
            one = slice_of(_books(card), own.key)
            if one is not None:
                _give(card, one, own.before)
        except (CardError, RefusedError) as error:
            log.warning("%s: not undone yet, settled when the card is back: %s", own, error)
        return 0


def card_handlers(cards: Cards) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    return BringSliceHandler(cards), AssignSliceHandler(cards)


def presence_of(books: AdapterBooks, key: str) -> SlicePresence:
    """How far the slice of a request is there."""
    if slice_of(books, key) is not None:
        return SlicePresence.GRANTED
    promised = any(r.slice.request == key for r in books.reservations.values())
    return SlicePresence.PROMISED if promised else SlicePresence.ABSENT


def slice_of(books: AdapterBooks, key: str) -> Slice | None:
    """The slice that a request made."""
    return next((one for one in books.slices.values() if one.request == key), None)


def _promise(card: Card, step: BringSlice) -> Reservation | Slice:
    """The promise under the step's key, made anew where it ended; the slice where it is granted.

    Raises:
        RefusedError: the card refuses, or somebody would end for it who was not meant to.
    """
    found = card.reserve(
        step.spec, request=step.key, holder=step.holder, reclaim=bool(step.victims)
    )  # fmt: skip
    if isinstance(found, Refusal):
        raise RefusedError(found)
    if isinstance(found, Slice):
        return found
    unmeant = set(found.victims) - {victim.slice for victim in step.victims}
    if unmeant:
        card.withdraw(step.key)
        raise RefusedError(_stale(step, unmeant))
    return found


def _stale(step: BringSlice, unmeant: Iterable[str]) -> Refusal:
    names = ", ".join(sorted(unmeant))
    detail = f"card {step.card}: {names} would end for it, which was not planned; plan anew"
    return Refusal(Reason.STALE, detail)


def _make(card: Card, key: str, spec: SliceSpec, holder: str) -> None:
    """A slice that was there before; nobody makes way for it.

    Raises:
        RefusedError: there is no room for it any more.
    """
    found = card.reserve(spec, request=key, holder=holder, reclaim=False)
    if isinstance(found, Refusal):
        raise RefusedError(found)
    if not isinstance(found, Slice):
        _insist(card.commit(found))


def _give(card: Card, one: Slice, holder: str) -> None:
    if one.holder == holder:
        return
    if one.holder and holder:
        _insist(card.assign(one.id, ""))
    _insist(card.assign(one.id, holder))


def _insist(answer: Slice | Refusal | None) -> None:
    if isinstance(answer, Refusal):
        raise RefusedError(answer)


def _books(card: Card) -> AdapterBooks:
    books = card.refresh().books
    if books is None:
        raise CardError(f"card {card.serial} does not say what it has")
    return books


def _own(step: Step, kind: type[S]) -> S:
    if not isinstance(step, kind):
        raise InvalidValueError("step.kind", step.kind, f"is not {kind.kind}")
    return step
