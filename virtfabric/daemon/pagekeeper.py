"""Gives back the huge pages that were made for guests which have no use for them any more.

Most go back with the plan that ends or shrinks their guest. Some were in use at that moment, or a
crash came in between: of these it takes care here, whenever somebody looks. What another guest
counts on by now stays until that one has no use for it either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.model.plan import Plan
from virtfabric.policy.hugepages import returnable, strays

if TYPE_CHECKING:
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot

_ALERT: Final = "huge pages"


class PageKeeper:
    """Every transaction of it is of one guest's pages."""

    def __init__(
        self, *, observatory: Observatory, conductor: Conductor, jobs: Jobs, notices: Notices
    ) -> None:
        self._observatory = observatory
        self._conductor = conductor
        self._jobs = jobs
        self._notices = notices

    def sweep(self) -> None:
        """Give back what can be; say what cannot yet. Cheap when there is nothing."""
        free = returnable(self._look(self._observatory.snapshot()))
        for guest in sorted({step.guest for step in free}):
            self._start(self._return_of(guest)).ended.wait()
        left = strays(self._look(self._observatory.snapshot()))
        if left:
            text = "; ".join(
                f"{step.before - step.after} {step.pool}, made for {step.name}" for step in left
            )
            self._notices.alert(
                _ALERT, f"used or counted on by others, given back as soon as free: {text}"
            )
        else:
            self._notices.settle(_ALERT)

    def _start(self, work: Undertaking) -> Job:
        return self._jobs.start(
            work.title, lambda _, progress: summary(work, self._conductor.conduct(work, progress))
        )

    def _look(self, snapshot: HostSnapshot) -> HostSnapshot:
        return self._observatory.look_at_pages(snapshot, always=True)

    def _return_of(self, guest: GuestId) -> Undertaking:
        request = new_request()

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan:
            steps = tuple(s for s in returnable(self._look(snapshot)) if s.guest == guest)
            return Plan(request, snapshot.generation, steps)

        state = self._observatory.guest(guest)
        name = state.name if state else guest
        return Undertaking(
            request,
            f"huge pages of {name} go back",
            place,
            incoming=state if state and not state.active else None,
            body={"guest": guest, "name": name, "origin": "agent"},
        )
