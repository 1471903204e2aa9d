"""What a card is told of this host, and asked about it: `ports.CardArbiter` over any wire.

It sends a picture when the card has another one, and believes nothing: an answer is a proposal.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from virtfabric.model.decision import Proposal
from virtfabric.model.errors import CardError, Reason, Refusal
from virtfabric.protocol import messages as m
from virtfabric.protocol.hostpicture import split_picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.adapters.cardlink.wire import Wire
    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.amounts import Amounts
    from virtfabric.model.decision import Course
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.protocol.messages import Message

_TRIES: Final = 2
"""The card may have started anew since it got the picture, and says so once."""


class HostLink:
    """Implements `ports.CardArbiter`; the base of a card's link."""

    def __init__(self, serial: AdapterId, wire: Wire) -> None:
        self._serial = serial
        self._wire = wire
        self._asking = threading.Lock()
        """One picture at a time: a request is about the one that was sent last."""
        self._shown = ""

    def show(self, snapshot: HostSnapshot, *, deadline_s: float) -> None:
        """Have the card know this host; what it knows already is not said again."""
        with self._asking:
            self._show(split_picture(snapshot), deadline_s)

    def propose(
        self, snapshot: HostSnapshot, request: Request, caps: Mapping[GuestId, Amounts], *,
        deadline_s: float,
    ) -> Proposal | Refusal:  # fmt: skip
        """Ask the card to decide."""
        parts = split_picture(snapshot)
        asked = m.HostRequest(
            parts[0].picture, request.id, request.guest, request.cpu, request.memory,
            request.tier, request.partial, caps,
        )  # fmt: skip
        with self._asking:
            for _ in range(_TRIES):
                self._show(parts, deadline_s)
                answer = self._wire.ask(asked, deadline_s=deadline_s)
                if not isinstance(answer, m.Error) or answer.reason != Reason.STALE:
                    break
                self._shown = ""
        return self._read(answer)

    def measured(self, readings: Mapping[str, Mapping[str, int]], *, deadline_s: float) -> None:
        """Tell the card figures."""
        told = tuple(m.Reading(subject, values) for subject, values in readings.items())
        self._tell_card(m.Telemetry(round(time.monotonic() * 1000), told), deadline_s)

    def report(self, request: RequestId, course: Course, detail: str, *, deadline_s: float) -> None:
        """Tell the card what became of a request."""
        self._tell_card(m.HostOutcome(request, course, detail), deadline_s)

    def _show(self, parts: tuple[m.HostPicture, ...], deadline_s: float) -> None:
        if parts[0].picture == self._shown:
            return
        self._shown = ""
        for part in parts:
            self._tell_card(part, deadline_s)
        self._shown = parts[0].picture

    def _tell_card(self, message: Message, deadline_s: float) -> None:
        answer = self._wire.ask(message, deadline_s=deadline_s)
        if isinstance(answer, m.Error):
            raise self._failure(answer)

    def _read(self, answer: Message) -> Proposal | Refusal:
        by = f"card {self._serial}"
        match answer:
            case m.HostDecision():
                return Proposal(by, answer.delta, answer.takes)
            case m.HostRefusal() if answer.reason in set(Reason):
                detail = f"{by}: {answer.detail}"
                return Refusal(Reason(answer.reason), detail, answer.would_fit, answer.considered)
            case m.HostRefusal():
                raise CardError(f"{by} refused without a reason that is known: {answer.reason}")
            case m.Error():
                raise self._failure(answer)
        raise AssertionError(f"the witness let {answer} pass")

    def _failure(self, error: m.Error) -> CardError:
        reason = f" ({error.reason})" if error.reason else ""
        return CardError(f"card {self._serial}: {error.code}{reason}: {error.detail}")
