"""The interposer in a card: decides about CPU and memory of hosts that show themselves to it.

It decides by `policy.arbiter`, the agent's own, on the picture that a host sent last. It keeps none
of it through loss of power: a host whose picture it does not have sends it again. What a host does
with a decision is its own to check, and it tells what came of it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError, Reason, Refusal
from virtfabric.model.ids import RequestId
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.protocol import messages as m
from virtfabric.protocol.hostpicture import PictureFrame

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.protocol.messages import Message

MAX_HOSTS: Final = 16
"""Whose pictures are kept; of one more, that of the host that was silent longest is forgotten."""


class HostDesk:
    """All hosts that a card decides for.

    Attributes:
        counts: of decisions, refusals, and what came of them.
        measured: what each host measured last, by subject.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.measured: dict[str, dict[str, dict[str, int]]] = {}
        self._frames: OrderedDict[str, PictureFrame] = OrderedDict()

    def handle(self, message: Message, host: str, size: int) -> Message | None:
        """The answer to a host's message; None where it is not about hosts.

        Args:
            message: what it said.
            host: who it is, as its certificate proved.
            size: bytes of the message's body.
        """
        handler = self._HANDLERS.get(type(message))
        if handler is None:
            return None
        more = (size,) if isinstance(message, m.HostPicture) else ()
        return handler(self, message, host, *more)

    def _frame(self, host: str) -> PictureFrame:
        frame = self._frames.pop(host, None) or PictureFrame()
        self._frames[host] = frame
        while len(self._frames) > MAX_HOSTS:
            forgotten, _ = self._frames.popitem(last=False)
            self.measured.pop(forgotten, None)
        return frame

    def _take_picture(self, part: m.HostPicture, host: str, size: int) -> Message:
        try:
            self._frame(host).add(part, size)
        except InvalidValueError as error:
            return m.Error(
                m.ErrorCode.REFUSED, str(error), error.field, reason=Reason.INVALID_ARGUMENT
            )
        return m.Done()

    def _decide(self, asked: m.HostRequest, host: str) -> Message:
        frame = self._frame(host)
        if frame.whole is None or frame.name != asked.picture:
            detail = f"picture {asked.picture} is not the one that is here"
            return m.Error(m.ErrorCode.REFUSED, detail, "picture", reason=Reason.STALE)
        request = Request(
            RequestId(asked.request), asked.guest, AGENT, Origin.CARD, asked.cpu, asked.memory,
            partial=asked.partial, tier=asked.tier,
        )  # fmt: skip
        answer = choose_allocation(frame.whole, request, caps=asked.caps)
        if isinstance(answer, Refusal):
            self.counts["refused"] += 1
            return m.HostRefusal(
                asked.picture, asked.request, answer.reason, answer.detail, answer.would_fit,
                answer.considered,
            )  # fmt: skip
        self.counts["decided"] += 1
        return m.HostDecision(asked.picture, asked.request, answer.delta, answer.takes)

    def _hear_outcome(self, outcome: m.HostOutcome, _host: str) -> Message:
        self.counts[outcome.course] += 1
        return m.Done()

    def _take_telemetry(self, told: m.Telemetry, host: str) -> Message:
        self._frame(host)
        self.measured[host] = {reading.subject: dict(reading.values) for reading in told.readings}
        return m.Done()

    _HANDLERS: Final[dict[type[Message], Callable[..., Message]]] = {
        m.HostPicture: _take_picture, m.HostRequest: _decide, m.HostOutcome: _hear_outcome,
        m.Telemetry: _take_telemetry,
    }  # fmt: skip
