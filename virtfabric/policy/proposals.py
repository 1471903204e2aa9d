"""Proposals: whether what somebody else's arbiter would have may be done on this host.

Owns the invariants that no decision may break, whoever made it. It chooses nothing: how much within
a request, and who of those that may be asked pays, is for whoever proposes. CPUs, nodes and
functions are never proposed; placement has them, here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import Amounts, Key, format_amount
from virtfabric.model.decision import Consideration, Verdict
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy.arbiter import settle_terms
from virtfabric.policy.changes import check_ceilings, check_request, check_subject, wanted_changes
from virtfabric.policy.standing import tally
from virtfabric.policy.victims import Market

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from virtfabric.model.decision import Decision, Proposal
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.policy.changes import Change

_SHOWN = 5
"""Problems that a rejection names."""


class _Terms(NamedTuple):
    """What is proposed, beside what it is measured by."""

    snapshot: HostSnapshot
    request: Request
    market: Market
    changes: Sequence[Change]
    proposal: Proposal

    @property
    def guest(self) -> GuestState:
        return self.market.borrower


def check_proposal(
    snapshot: HostSnapshot,
    request: Request,
    proposal: Proposal,
    *,
    caps: Mapping[GuestId, Amounts] | None = None,
) -> Decision | Refusal:
    """The decision, if it may be done: all of it, or nothing of it.

    Args:
        snapshot: the host that it was proposed for.
        request: what it answers.
        proposal: not to be believed.
        caps: as for `arbiter.choose_allocation`.

    Returns:
        A refusal (`decision-rejected`) that says what it would break.
    """
    guest = check_subject(snapshot, request.guest)
    if isinstance(guest, Refusal):
        return _rejected(proposal, [guest.detail])
    changes = wanted_changes(snapshot, guest, request)
    market = Market(snapshot, guest, caps or {}, tally(snapshot))
    terms = _Terms(snapshot, request, market, changes, proposal)
    problems = [*_bars(terms), *_amount_problems(terms)]
    if not problems:
        problems = list(_payment_problems(terms))
    return _rejected(proposal, problems) if problems else _decide(terms)


def _rejected(proposal: Proposal, problems: Sequence[str]) -> Refusal:
    more = f"; {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    detail = f"{proposal.by} decided what cannot be: {'; '.join(problems[:_SHOWN])}{more}"
    return Refusal(Reason.DECISION_REJECTED, detail)


def _bars(terms: _Terms) -> Iterator[str]:
    """What bars the request itself, whatever is proposed."""
    problem = check_request(terms.snapshot, terms.guest, terms.request, terms.changes)
    growing = [change for change in terms.changes if change.grows]
    if problem is None and growing:
        problem = check_ceilings(terms.market, growing)
    if problem is not None:
        yield problem.detail


def _amount_problems(terms: _Terms) -> Iterator[str]:
    """Neither more than was asked for, nor less unless that was allowed, nor anything else."""
    delta, name = terms.proposal.delta, terms.guest.name
    asked = {change.key for change in terms.changes}
    for key in delta.keys() - asked:
        yield f"{key} of {name} would change, which nobody asked for"
    for change in terms.changes:
        amount = delta[change.key]
        if not _is_answer(change, amount, partial=terms.request.partial):
            yield (
                f"{name} would get {_amount(change.key, amount)} of {change.key.words}; asked for "
                f"was {_amount(change.key, change.amount)}"
            )
    wants = any(change.grows and change.amount > 0 for change in terms.changes)
    if wants and not delta.positive():
        yield f"{name} would get nothing"


def _is_answer(change: Change, amount: int, *, partial: bool) -> bool:
    if amount == change.amount:
        return True
    line = change.line
    whole = (line.held + amount - line.origin) % line.granule == 0
    return partial and change.grows and 0 <= amount < change.amount and (whole or not amount)


def _payment_problems(terms: _Terms) -> Iterator[str]:
    """Free capacity is there, and victims are such as may be asked, for what they can give."""
    delta = terms.proposal.delta
    costs = {c.key: 0 if c.line.prepaid else max(0, delta[c.key]) for c in terms.changes}
    for take in terms.proposal.takes:
        if not take.amounts.positive():
            yield f"{_name(terms, take.victim)} would pay nothing"
        for key in take.amounts:
            if not costs.get(key):
                yield f"{_name(terms, take.victim)} would pay {key}, which nobody gains"
    for key, cost in costs.items():
        gifts = {t.victim: t.amounts[key] for t in terms.proposal.takes if t.amounts[key]}
        yield from _victim_problems(terms, key, gifts, cost)
        missing = cost - sum(gifts.values())
        free = terms.market.free_of(key)
        if missing > free:
            yield (
                f"{_amount(key, missing)} of {key.words} would come from free capacity, which has "
                f"{_amount(key, free)}"
            )


def _victim_problems(
    terms: _Terms, key: Key, gifts: Mapping[GuestId, int], cost: int
) -> Iterator[str]:
    if not gifts:
        return
    survey = terms.market.survey(key)
    able = {candidate.uuid: candidate for candidate in survey.candidates}
    why = {other.guest: other.verdict for other in survey.others}
    for victim, gift in gifts.items():
        found, name = able.get(victim), _name(terms, victim)
        if found is None:
            verdict = why.get(victim, "unknown, or does not run")
            yield f"{name} would pay {_amount(key, gift)} of {key.words}, and cannot: {verdict}"
        elif gift > found.give or gift % found.granule:
            yield (
                f"{name} would pay {_amount(key, gift)} of {key.words}; it can give "
                f"{_amount(key, found.give)} in steps of {_amount(key, found.granule)}"
            )
    granules = [able[victim].granule for victim in gifts if victim in able]
    excess = sum(gifts.values()) - cost
    if granules and excess >= max(granules):
        yield f"{_amount(key, excess)} of {key.words} more would be taken than is needed"


def _decide(terms: _Terms) -> Decision:
    """As the arbiter does once it is known who pays what."""
    proposal, market = terms.proposal, terms.market
    growing = [change for change in terms.changes if change.grows]
    if not growing:
        return settle_terms(
            terms.snapshot, terms.request.id, terms.guest, proposal.delta, None, Amounts()
        )
    for take in proposal.takes:
        market.gifts[take.victim] = dict(take.amounts)
    for change in growing:
        took = any(take.amounts[change.key] for take in proposal.takes)
        if took or proposal.delta[change.key] < change.amount:
            market.considered += _considered(terms, change.key)
    taken = sum((take.amounts for take in proposal.takes), Amounts())
    cost = Amounts({c.key: 0 if c.line.prepaid else proposal.delta[c.key] for c in growing})
    return settle_terms(
        terms.snapshot, terms.request.id, terms.guest, proposal.delta, market,
        (cost - taken).positive(),
    )  # fmt: skip


def _considered(terms: _Terms, key: Key) -> list[Consideration]:
    """Who paid or did not, and why, by what is known here: whoever proposes is not asked for it.

    Which guests are asked what they can spare depends on it.
    """
    survey = terms.market.survey(key)
    gifts = {take.victim: take.amounts[key] for take in terms.proposal.takes}
    payers = [
        Consideration(
            c.uuid, c.name, key, Verdict.PAYS if gifts.get(c.uuid) else Verdict.NOT_NEEDED,
            c.priority, c.held, c.floor, gifts.get(c.uuid, 0),
        )
        for c in survey.candidates
    ]  # fmt: skip
    return payers + survey.others


def _name(terms: _Terms, guest: GuestId) -> str:
    state = terms.snapshot.guests.get(guest)
    return state.name if state else guest


def _amount(key: Key, value: int) -> str:
    return format_amount(key, value)
