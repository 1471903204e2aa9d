"""What the arbiter answers: who gets, who pays, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import Amounts, Key, format_amount

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.ids import GuestId, LoanId, RequestId
    from virtfabric.model.reclaim import ReclaimPlan


class Verdict(StrEnum):
    """What the arbiter made of one guest, for one resource."""

    PAYS = "pays"
    NOT_NEEDED = "not-needed"
    AT_FLOOR = "at-floor"
    PRIORITY = "priority-not-lower"
    BUSY = "busy"
    UNMANAGED = "unmanaged"
    NO_MECHANISM = "not-reclaimable"
    GIVES_NO_MORE = "gives-no-more"
    """It stopped short before, or tells that it can spare nothing."""
    REQUESTER = "requester"


class Course(StrEnum):
    """What became of a request that a card decided. Published; never renamed."""

    DONE = "done"
    UNDONE = "undone"
    """It was tried, and nothing of it is left."""
    REJECTED = "rejected"
    """The host did not take the decision: it would have broken an invariant."""


@dataclass(frozen=True, slots=True)
class Consideration:
    """Why one guest paid for one resource or did not."""

    guest: GuestId
    name: str
    key: Key
    verdict: Verdict
    priority: int = 0
    held: int = 0
    floor: int = 0
    pays: int = 0

    def __str__(self) -> str:
        floor = format_amount(self.key, self.floor)
        held = f"holds {format_amount(self.key, self.held)}, floor {floor}"
        pays = f" {format_amount(self.key, self.pays)}" if self.pays else ""
        what = f"{self.key.words}: {self.verdict}{pays}"
        return f"{self.name} (priority {self.priority}, {held}): {what}"

    def to_json(self) -> dict[str, Any]:
        """For journal, audit and clients."""
        return {
            "guest": self.guest, "name": self.name, "resource": str(self.key),
            "verdict": self.verdict.value, "priority": self.priority, "held": self.held,
            "floor": self.floor, "pays": self.pays,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Take:
    """What one victim gives up, above its floor only."""

    victim: GuestId
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Return:
    """What goes home to a victim from a loan."""

    loan: LoanId
    victim: GuestId
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Proposal:
    """What somebody else's arbiter would have: not to be believed before it was checked.

    Attributes:
        by: who proposes; for people (`card C-1`).
        delta: what the guest of the request would gain, or give up.
        takes: who would pay for it.
    """

    by: str
    delta: Amounts
    takes: tuple[Take, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Amounts only; `placement` turns it into a plan.

    Attributes:
        delta: what the requesting guest gains (positive) or gives up (negative).
        from_free: the part of the gain that came from free capacity.
        takes: one entry per victim, in the order they were drained.
        returns: loans that go home with this decision.
        holdings: amounts held afterwards, of every guest whose amounts change.
        considered: one entry per guest and contended resource.
        reclaim: how the memory that victims pay comes home.
        by: who decided, in *carded* mode; empty in any other.
    """

    request: RequestId
    guest: GuestId
    generation: int
    delta: Amounts
    from_free: Amounts = Amounts()
    takes: tuple[Take, ...] = ()
    returns: tuple[Return, ...] = ()
    holdings: Mapping[GuestId, Amounts] | None = None
    considered: tuple[Consideration, ...] = ()
    reclaim: tuple[ReclaimPlan, ...] = ()
    by: str = ""

    def to_json(self) -> dict[str, Any]:
        """For journal, audit and clients."""
        return {
            "request": self.request, "guest": self.guest, "generation": self.generation,
            "delta": self.delta.to_json(), "from_free": self.from_free.to_json(),
            "takes": [{"victim": t.victim, "amounts": t.amounts.to_json()} for t in self.takes],
            "returns": [
                {"loan": r.loan, "victim": r.victim, "amounts": r.amounts.to_json()}
                for r in self.returns
            ],
            "holdings": {g: a.to_json() for g, a in (self.holdings or {}).items()},
            "considered": [c.to_json() for c in self.considered],
            "reclaim": [plan.to_json() for plan in self.reclaim],
            "by": self.by,
        }  # fmt: skip
