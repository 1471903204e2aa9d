"""What is conducted, and what came of it: the values around `daemon.conductor`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from virtfabric.model.ids import RequestId
from virtfabric.model.reclaim import Recall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.executor import Progress
    from virtfabric.model.amounts import Amounts
    from virtfabric.model.decision import Decision
    from virtfabric.model.errors import Refusal
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, TransactionId
    from virtfabric.model.ledger import Books, Grant, HostSnapshot, Residue
    from virtfabric.model.plan import Plan
    from virtfabric.model.reclaim import Yield
    from virtfabric.model.request import Request
    from virtfabric.model.step import Step

    Caps = Mapping[GuestId, Amounts]
    Decide = Callable[[HostSnapshot, Caps], Decision | Refusal]
    Choose = Callable[[HostSnapshot, Request, Caps], Decision | Refusal]
    Place = Callable[[HostSnapshot, Decision | None], Plan | Refusal]


class Prelude(Protocol):
    """What an undertaking does before its plan can be made exactly, in the same transaction.

    `foresee` is asked with each decision until the steps are done.
    """

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has to be done first, as `foresee` found last; none: nothing."""

    def foresee(self, snapshot: HostSnapshot) -> HostSnapshot:
        """The host as it will be when the steps are done."""

    def explain(self, refusal: Refusal) -> Refusal:
        """A refusal on that host, with what could not be done before."""

    def before(self, plan: Plan) -> Plan:
        """Its steps, then those of the plan."""

    def finish(self, progress: Progress) -> None:
        """Wait until the host is as foreseen.

        Raises:
            VirtfabricError: it does not become so.
        """

    def settle(self, books: Books) -> Books:
        """The books with what was done."""


@dataclass(slots=True)
class Undertaking:
    """What is to be conducted.

    Attributes:
        decide: makes the decision from a snapshot; None for a plan that moves no amounts.
        place: turns it into steps.
        ends: the grant that this ends, if any.
        grants: whether a gain becomes a grant of its own (with loans for what victims paid).
        settle_books: a last change of the books, after the decision's.
        incoming: a guest that is starting, as its hook showed it. It is never read through
            libvirt: calls on it block until its hook returns.
        recall: how memory that leaves guests is to leave them.
        yields: whether the guest that it is about may give less than it is asked for.
        prelude: what is done before, if anything.
        body: request and such, for journal and audit.
    """

    request: RequestId
    title: str
    place: Place
    decide: Decide | None = None
    ends: Grant | None = None
    grants: bool = False
    lease_s: float | None = None
    deadline_s: float = 30.0
    settle_books: Callable[[Books], Books] | None = None
    incoming: GuestState | None = None
    recall: Recall = field(default_factory=Recall)
    yields: bool = False
    prelude: Prelude | None = None
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> frozenset[GuestId]:
        """Guests that must not be read: the incoming one."""
        return frozenset({self.incoming.uuid} if self.incoming else ())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an undertaking led to."""

    txn: TransactionId
    decision: Decision | None
    grant: Grant | None
    steps: tuple[str, ...]
    residues: tuple[Residue, ...]
    offers: tuple[dict[str, Any], ...]
    took_s: float
    agent_s: float
    reclaimed: tuple[Yield, ...] = ()
    skipped: tuple[str, ...] = ()


def new_request() -> RequestId:
    """A fresh request id."""
    return RequestId(f"req-{uuid.uuid4().hex[:12]}")


def summary(work: Undertaking, outcome: Outcome) -> dict[str, Any]:
    """What the result of a job says of it."""
    return {"request": work.request, "txn": outcome.txn, "steps": list(outcome.steps)}
