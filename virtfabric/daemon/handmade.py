"""Functions that a guest's own XML names: made ready at `prepare`, given back at `release`.

Each is a transaction of its own: journalled, verified, undone as a whole when a step fails.
`policy.handmade` says what is to be done and what is against it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from virtfabric.daemon.api import JobState
from virtfabric.daemon.custody import unnamed
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.model.errors import Refusal, RefusedError
from virtfabric.model.plan import Plan
from virtfabric.policy.handmade import (
    names_functions,
    plan_binding,
    plan_unbinding,
    with_named,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.undertaking import Outcome
    from virtfabric.model.decision import Decision
    from virtfabric.model.device import HeldFunction
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.ports import Clock, Journal

    Conduct = Callable[[Undertaking, Progress], Outcome]

log = logging.getLogger(__name__)

RELEASE_S = 30.0
"""Longest wait for other plans before functions of a guest that ended are given back."""


class Handmade:
    """Binds and gives back. Its guest is managed: of others the hook does not ask."""

    def __init__(
        self, *, conduct: Conduct, jobs: Jobs, ledger: Ledger, journal: Journal, clock: Clock
    ) -> None:
        """`conduct` carries an undertaking out (`Conductor.conduct`)."""
        self._conduct = conduct
        self._jobs = jobs
        self._ledger = ledger
        self._journal = journal
        self._clock = clock

    def bind(self, guest: GuestState, wait_s: float) -> str:
        """Make ready what the XML of a starting guest names; it holds its amounts already.

        Returns:
            "" when it may start, else the line that virsh shows.
        """
        if not names_functions(guest):
            return ""
        try:
            job = self._start(_binding(guest, wait_s))
        except RefusedError as error:
            return f"virtfabric: {error.refusal.detail}"
        if not job.ended.wait(wait_s):
            return f"virtfabric: {guest.name}: its PCI functions are still being bound, retry"
        if job.state is JobState.DONE:
            return ""
        problem = job.error or {}
        why = ": ".join(filter(None, (problem.get("reason"), problem.get("detail"))))
        return f"virtfabric: {guest.name} cannot start: {why or 'the agent failed'}"

    def release(self, guest: GuestId, name: str) -> None:
        """Give back what was bound for a guest that ended; in quarantine where that fails."""
        if not _named(self._ledger.view().books, guest):
            return
        request = new_request()
        work = Undertaking(
            request,
            f"functions named by {name} go back",
            lambda snapshot, _: Plan(
                request, snapshot.generation, plan_unbinding(snapshot, guest, name)
            ),
            deadline_s=RELEASE_S,
            settle_books=lambda books: with_named(books, guest, ()),
            body={"guest": guest, "name": name, "origin": "hook"},
        )
        job = self._start(work)
        job.ended.wait()
        if job.state is not JobState.DONE:
            why = (job.error or {}).get("detail", "the agent failed")
            log.warning("functions of %s cannot be given back: %s", name, why)
            doubt, now = (
                f"it did not go back to the host after {name} ended: {why}",
                self._clock.now(),
            )
            self._ledger.commit(
                None, lambda books: unnamed(books, guest, doubt, now), self._journal.store_books
            )

    def _start(self, work: Undertaking) -> Job:
        return self._jobs.start(
            work.title, lambda _, progress: summary(work, self._conduct(work, progress))
        )


def _binding(guest: GuestState, deadline_s: float) -> Undertaking:
    request = new_request()
    named: tuple[HeldFunction, ...] = ()

    def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
        nonlocal named  # placed anew whenever the host moved meanwhile: the last one is carried out
        answer = plan_binding(snapshot, guest)
        if isinstance(answer, Refusal):
            return answer
        named = answer.named
        return Plan(request, snapshot.generation, answer.steps)

    return Undertaking(
        request,
        f"functions named by {guest.name}",
        place,
        deadline_s=deadline_s,
        settle_books=lambda books: with_named(books, guest.uuid, named),
        incoming=guest,
        body={"guest": guest.uuid, "name": guest.name, "origin": "hook"},
    )


def _named(books: Books, guest: GuestId) -> tuple[HeldFunction, ...]:
    holding = books.holdings.get(guest)
    return holding.named if holding else ()
