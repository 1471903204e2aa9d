"""Who decides about allocations: the agent's own arbiter, or in *carded* mode a card.

A card decides amounts, and is believed nothing: what it decides is checked (`policy.proposals`)
before anything is planned. What comes of a card that is away, hung or wrong is the configuration's
to say: the agent decides by itself, or refuses. Starts and stops of guests, releases and functions
are the agent's in both modes; the card hears of them by the next picture.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.card import CardNewsKind, Fallback
from virtfabric.model.decision import Course
from virtfabric.model.errors import CardError, InvalidValueError, Reason, Refusal
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.proposals import check_proposal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.undertaking import Caps
    from virtfabric.model.card import Carded, CardNews
    from virtfabric.model.decision import Decision, Proposal
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.ports import AuditLog, Cards

    Json = dict[str, Any]
    Figures = Mapping[str, Mapping[str, float]]

log = logging.getLogger(__name__)

_TOPIC: Final = "arbiter"
_REMEMBERED: Final = 256
"""Requests that a card decided and whose end it has not heard of yet; of more, the oldest is not
told."""
_AWAY: Final = (CardNewsKind.LOST, CardNewsKind.DISTRUSTED)


class Arbitration:
    """Decides, or has it decided. Thread-safe; called from threads of jobs, with no lock held."""

    def __init__(
        self, carded: Carded | None, *, cards: Cards, audit: AuditLog, notices: Notices,
        look: Callable[[], HostSnapshot],
    ) -> None:  # fmt: skip
        """`look` says how the host is now; None for `carded`: the agent decides."""
        self._carded = carded
        self._cards = cards
        self._audit = audit
        self._notices = notices
        self._look = look
        self._lock = threading.Lock()
        self._why = "not connected yet"
        self._told_away = False
        self._rejected: tuple[RequestId, str] | None = None
        self._asked: OrderedDict[RequestId, None] = OrderedDict()

    def choose(
        self, snapshot: HostSnapshot, request: Request, caps: Caps | None = None
    ) -> Decision | Refusal:
        """Grow or shrink a running guest; as `arbiter.choose_allocation`, whoever decides."""
        caps = caps or {}
        if self._carded is None:
            return choose_allocation(snapshot, request, caps=caps)
        if request.devices:
            return self._own(snapshot, request, caps, "functions are not for a card to give")
        answer = self._ask(self._carded, snapshot, request, caps)
        if isinstance(answer, str):
            return self._do_without(self._carded, snapshot, request, caps, answer)
        return answer

    def _ask(
        self, carded: Carded, snapshot: HostSnapshot, request: Request, caps: Caps
    ) -> Decision | Refusal | str:
        """The card's decision; in words why there is none."""
        try:
            card = self._cards.reach(carded.card)
            proposal = card.propose(snapshot, request, caps, deadline_s=carded.answer_s)
        except (CardError, InvalidValueError) as error:
            self._is_away(carded, str(error))
            return str(error)
        if isinstance(proposal, Refusal):
            self._is_there(carded)
            return proposal
        self._remember(request.id)
        decision = check_proposal(snapshot, request, proposal, caps=caps)
        if isinstance(decision, Refusal):
            self._reject(carded, request.id, proposal, decision.detail)
            return decision.detail
        self._is_there(carded)
        return replace(decision, by=proposal.by)

    def _reject(self, carded: Carded, request: RequestId, proposal: Proposal, why: str) -> None:
        """Told once for each request and reason: a request is decided again while others run."""
        with self._lock:
            known, self._rejected = (request, why) == self._rejected, (request, why)
        self._is_away(carded, why)
        self.report(request, Course.REJECTED, why)
        if known:
            return
        body = {
            "card": carded.card, "request": request, "why": why,
            "delta": proposal.delta.to_json(),
            "takes": [{"victim": t.victim, **t.amounts.to_json()} for t in proposal.takes],
        }  # fmt: skip
        self._audit.append("decision.rejected", [request, carded.card], body)
        self._notices.publish("decision.rejected", body)

    def _do_without(
        self, carded: Carded, snapshot: HostSnapshot, request: Request, caps: Caps, why: str
    ) -> Decision | Refusal:
        if carded.fallback is Fallback.OWN:
            return self._own(snapshot, request, caps, why)
        return Refusal(
            Reason.NO_ARBITER, f'{why}; and cards.fallback = "refuse": nobody else decides'
        )

    def _own(
        self, snapshot: HostSnapshot, request: Request, caps: Caps, why: str
    ) -> Decision | Refusal:
        answer, by = choose_allocation(snapshot, request, caps=caps), f"the agent ({why})"
        if isinstance(answer, Refusal):
            return answer._replace(considered=(*answer.considered, f"decided by {by}"))
        return replace(answer, by=by)

    # -- what became of it --------------------------------------------------------------------

    def _remember(self, request: RequestId) -> None:
        with self._lock:
            self._asked[request] = None
            while len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)

    def report(self, request: RequestId, course: Course, detail: str = "") -> None:
        """Something that was conducted has ended; the card hears of what it decided."""
        with self._lock:
            known = request in self._asked
            self._asked.pop(request, None)
        if self._carded is None or not known:
            return
        try:
            card = self._cards.reach(self._carded.card)
            card.report(request, course, detail, deadline_s=self._carded.answer_s)
        except CardError as error:
            log.warning("%s was not told what became of %s: %s", self._carded.card, request, error)

    def measured(self, figures: Figures) -> None:
        """The host and its guests were measured: the card that decides hears of it."""
        if self._carded is None or not self.is_deciding:
            return
        whole = {
            subject: {name: max(0, round(value)) for name, value in values.items()}
            for subject, values in figures.items()
        }
        try:
            card = self._cards.reach(self._carded.card)
            card.measured(whole, deadline_s=self._carded.answer_s)
        except (CardError, InvalidValueError) as error:
            log.debug("figures did not reach %s: %s", self._carded.card, error)

    # -- the card comes and goes --------------------------------------------------------------

    @property
    def is_deciding(self) -> bool:
        """Whether the card decides, as far as is known."""
        with self._lock:
            return self._carded is not None and not self._why

    def heed(self, news: CardNews) -> None:
        """Something happened to a card; one that comes back is shown the host as it is now."""
        carded = self._carded
        if carded is None or news.serial != carded.card:
            return
        if news.kind in _AWAY:
            self._is_away(carded, f"card {news.serial} is {news.kind}: {news.detail}")
        elif news.kind is CardNewsKind.CONNECTED:
            try:
                card = self._cards.reach(carded.card)
                card.show(self._look(), deadline_s=carded.answer_s)
            except (CardError, InvalidValueError) as error:
                self._is_away(carded, str(error))
            else:
                self._is_there(carded)

    def _is_away(self, carded: Carded, why: str) -> None:
        with self._lock:
            first, self._told_away, self._why = not self._told_away, True, why
        course = {
            Fallback.OWN: "the agent decides by itself",
            Fallback.REFUSE: "allocations are refused",
        }[carded.fallback]
        self._notices.alert(_TOPIC, f"card {carded.card} does not decide ({why}): {course}")
        if first:
            self._tell("arbiter.away", carded, {"why": why, "fallback": carded.fallback.value})

    def _is_there(self, carded: Carded) -> None:
        with self._lock:
            changed = bool(self._why)
            self._why, self._told_away = "", False
        if changed:
            self._notices.settle(_TOPIC)
            self._tell("arbiter.deciding", carded, {})

    def _tell(self, kind: str, carded: Carded, body: Json) -> None:
        body = {"card": carded.card} | body
        self._audit.append(kind, [carded.card], body)
        self._notices.publish(kind, body)

    def view(self) -> Json:
        """Who decides, for `status` and `cards`."""
        if self._carded is None:
            return {"mode": "own", "card": None, "fallback": None, "deciding": False, "why": ""}
        with self._lock:
            return {
                "mode": "carded", "card": self._carded.card,
                "fallback": self._carded.fallback.value, "deciding": not self._why,
                "why": self._why,
            }  # fmt: skip
