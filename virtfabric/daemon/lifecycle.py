"""Guests that come and go: placement on `started`, release on stop; what hooks and events mean.

The hook edge answers from the ledger and never touches libvirt; whatever needs libvirt is an
errand, in order for each guest.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.admission import Admission
from virtfabric.daemon.api import JobState
from virtfabric.daemon.custody import departed
from virtfabric.daemon.devicewatch import DeviceWatch
from virtfabric.daemon.errands import Errands
from virtfabric.daemon.handmade import Handmade
from virtfabric.daemon.pagekeeper import PageKeeper
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.filter import replace_placement
from virtfabric.model.errors import (
    Refusal,
)
from virtfabric.model.mark import MARK_NAMESPACE
from virtfabric.model.policy import Placement
from virtfabric.policy.arbiter import choose_departure
from virtfabric.policy.layout import choose_layout
from virtfabric.policy.loans import depart

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.drift import DriftWatch
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.ports import AuditLog, Clock, Event, Journal

log = logging.getLogger(__name__)

_POOL: Final = "pool"
"""The key of errands that place what is left for all."""
PLANS_S: Final = 30.0
"""Longest wait for other plans that work on a guest which is to be settled."""


class Lifecycle:
    """Turns hooks and events into admissions, placements and departures."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        jobs: Jobs,
        notices: Notices,
        journal: Journal,
        audit: AuditLog,
        clock: Clock,
        drift: DriftWatch,
    ) -> None:
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._notices = notices
        self._journal = journal
        self._audit = audit
        self._clock = clock
        self._drift = drift
        self._surveyed = threading.Event()
        self._handmade = Handmade(
            conduct=conductor.conduct, jobs=jobs, ledger=ledger, journal=journal, clock=clock
        )
        self.admission = Admission(
            observatory=observatory, ledger=ledger, conductor=conductor, jobs=jobs,
            notices=notices, journal=journal, audit=audit, clock=clock,
            surveyed=self._surveyed, settled=self._last_run_settled, handmade=self._handmade,
        )  # fmt: skip
        self._errands = Errands()
        self.pages = PageKeeper(
            observatory=observatory, conductor=conductor, jobs=jobs, notices=notices
        )
        self.devices = DeviceWatch(
            observatory=observatory, ledger=ledger, conductor=conductor, jobs=jobs,
            notices=notices, journal=journal, audit=audit, clock=clock, errands=self._errands,
            await_plans=self._await_plans,
        )  # fmt: skip
        self._leaving: set[GuestId] = set()
        self._unplaced: set[GuestId] = set()
        self._detained: set[GuestId] = set()

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._errands.close()

    def enqueue(self, work: Callable[[], None], guest: GuestId | None = None) -> threading.Event:
        """Do this after what is queued for the same guest; None is for the host as a whole.

        What is answered is set when it is done.
        """
        return self._errands.put(guest, work)

    def _last_run_settled(self, guest: GuestId, wait_s: float) -> bool:
        return guest not in self._leaving or self._errands.flush(guest, wait_s)

    # -- hooks ------------------------------------------------------------------------------

    def notify(self, name: str, operation: str, xml: str) -> None:
        """`started`, `release`, `reconnect`: queued; the hook does not wait.

        Raises:
            InvalidValueError: the XML is not a domain.
        """
        guest = parse_domain(xml, None)
        log.info("hook: %s %s", operation, name)
        if operation == "release":
            self._observatory.mark_stopped(guest.uuid)
            self._leaving.add(guest.uuid)
            self.enqueue(partial(self.depart, guest.uuid), guest.uuid)
        elif operation in ("started", "reconnect"):
            self.enqueue(partial(self.settle_in, guest.uuid), guest.uuid)

    def filter(self, operation: str, xml: str) -> str:
        """`migrate` and `restore`: our pins of another time or host make way for the pool.

        The operator's pins stay. The exact placement follows on `started`, as for any other start.
        """
        guest = parse_domain(xml, None)
        if guest.policy is None:
            return ""
        log.info("hook: %s of %s: stale pins replaced", operation, guest.name)
        snapshot = self._observatory.snapshot()
        amounts = {g: h.amounts for g, h in snapshot.books.holdings.items()}
        layout = choose_layout(snapshot, amounts)
        if isinstance(layout, Refusal):
            return replace_placement(xml, None, None, None)
        pins = dict.fromkeys(range(guest.vcpus_max), layout.pool)
        return replace_placement(xml, pins, layout.housekeeping, None)

    # -- events -----------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """An event of libvirt (from its thread): queue what it means."""
        match event.kind.value:
            case "connected":
                self._notices.publish("agent.connected", {})
                self.enqueue(partial(self.resync, place=True))
            case "disconnected":
                self._notices.publish("agent.disconnected", {"why": event.detail})
            case _ if event.guest:
                self._on_guest_event(event, event.guest)

    def _on_guest_event(self, event: Event, guest: GuestId) -> None:
        match event.kind.value:
            case "stopped":
                self._observatory.mark_stopped(guest)
                self.enqueue(partial(self.depart, guest), guest)
            case "started" | "resumed":
                self.enqueue(partial(self.settle_in, guest), guest)
            case "device-removed":
                self.enqueue(partial(self.devices.removed, guest, event.detail), guest)
            case "suspended":
                self.enqueue(partial(self._look_again, guest), guest)
                self.enqueue(partial(self.devices.paused, guest), guest)
            case "metadata" if event.detail == MARK_NAMESPACE:
                pass  # our own hand: each placement may write the mark
            case _:
                self.enqueue(partial(self._look_again, guest), guest)

    def _look_again(self, guest: GuestId) -> None:
        before = self._observatory.guest(guest)
        self._observatory.refresh([guest])
        after = self._observatory.guest(guest)
        if after is None or not after.active:
            return
        if before is None or before.policy != after.policy:
            self.settle_in(guest)
        else:
            self._drift.check([guest])
            self._conductor.residues.review([guest])

    def retry_detained(self) -> None:
        """Place the guests that a job has kept from it: libvirt does not tell of every end."""
        for guest in sorted(self._detained):
            self.enqueue(partial(self.settle_in, guest), guest)

    # -- coming -----------------------------------------------------------------------------

    def resync(self, *, place: bool = False) -> None:
        """Read everything; guests that came or went while we were away are settled.

        Waits for their errands, so it must not be one of them: it is the host's.

        Args:
            place: bring every guest to where it should be, also those that were here before: what
                happened to them while nobody looked is unknown. Otherwise what somebody changed
                on them is drift, which their policy may want to be reported only.
        """
        before = self._observatory.guests
        self._observatory.refresh_all()
        guests = self._observatory.guests
        held = self._ledger.view().books.holdings
        gone = [
            g for g in held if not _is_active(guests.get(g)) and not self.admission.is_recent(g)
        ]
        unsettled = [
            g.uuid
            for g in guests.values()
            if g.active and (place or not self._is_settled(before.get(g.uuid), g))
        ]
        for guest in gone:
            self.enqueue(partial(self.depart, guest), guest).wait()
        # who gets what must not depend on who is quicker: those that hold nothing, one by one
        for guest in (g for g in unsettled if g not in held):
            self.enqueue(partial(self.settle_in, guest), guest).wait()
        settling = [
            self.enqueue(partial(self.settle_in, guest), guest)
            for guest in unsettled
            if guest in held
        ]
        for done in settling:
            done.wait()
        self._surveyed.set()

    def _is_settled(self, before: GuestState | None, now: GuestState) -> bool:
        """Whether it is the same run of the guest, under the same policy, and was placed."""
        if before is None or before.pid != now.pid or before.policy != now.policy:
            return False
        held = now.uuid in self._ledger.view().books.holdings
        return held == now.managed and now.uuid not in self._unplaced

    def settle_in(self, guest: GuestId) -> None:
        """A guest runs: see that it holds what it may and sits where it should."""
        self._await_plans(guest)
        self._observatory.refresh([guest])
        state = self._observatory.guest(guest)
        self._detained.discard(guest)
        if state is None or not state.active:
            return
        self.admission.forget(guest)
        if state.managed and state.detained:
            # an incoming migration also: its `started` hook runs long before the guest is here
            self._detained.add(guest)
            return
        held = self._ledger.view().books.holdings.get(guest)
        if not state.managed:
            if held is not None:
                self._forget(guest, f"{state.name} became unmanaged while it had it")
            self._alert_policy(state)
            return
        self._notices.settle(f"policy {guest}")
        if held is None:
            if not self.admission.adopt(state):
                return
            self._notices.publish("guest.started", {"guest": guest, "name": state.name})
        self._place(state)
        self.devices.paused(guest)
        if state.policy is not None and state.policy.devices:
            self.devices.satisfy_soon()

    def _await_plans(self, guest: GuestId) -> None:
        """A plan that works on the guest may be changing its very policy: that is its to settle."""
        until = self._clock.monotonic() + PLANS_S
        while self._clock.monotonic() < until:
            view = self._ledger.view()
            if guest not in view.busy:
                return
            self._ledger.wait_change(view.generation, 1.0)

    def _alert_policy(self, state: GuestState) -> None:
        if state.policy_error:
            self._notices.alert(
                f"policy {state.uuid}",
                f"guest {state.name} has an invalid policy: {state.policy_error}; "
                "it runs unmanaged",
            )

    def _forget(self, guest: GuestId, why: str) -> None:
        """A guest's holding ends without a plan: what it has of functions nobody else may have."""
        self._ledger.commit(
            None,
            lambda books: departed(books, guest, why, self._clock.now()),
            self._journal.store_books,
        )
        self._drift.forget(guest)
        self.devices.satisfy_soon()

    def _place(self, state: GuestState) -> None:
        """Pins, quota and the rest follow what the books say."""
        dedicated = state.policy is not None and state.policy.cpu.placement is Placement.DEDICATED
        job = self.converge(None if dedicated else [state.uuid], f"placement of {state.name}")
        job.ended.wait()
        if job.state is JobState.DONE:
            self._unplaced.discard(state.uuid)
            self._notices.settle(f"placement {state.uuid}")
            self._notices.publish("guest.placed", {"guest": state.uuid, "name": state.name})
        else:
            self._unplaced.add(state.uuid)
            self._notices.alert(
                f"placement {state.uuid}",
                f"guest {state.name} could not be placed: {(job.error or {}).get('detail', '')}",
            )

    def converge(self, guests: list[GuestId] | None, title: str, *, uid: int = 0) -> Job:
        """Start a job that brings what is found to what the books say; None for every guest."""
        request = new_request()
        work = Undertaking(
            request,
            title,
            self._conductor.place_convergence(request, guests),
            deadline_s=30.0,
            body={"guests": guests or "all", "origin": "agent"},
        )

        def run(_: Job, progress: Progress) -> dict[str, Any]:
            answer = self._conductor.consider(work)
            if not isinstance(answer, Refusal) and not answer[2].steps and not answer[2].orders:
                self._await_detained()
                self._conductor.residues.review(guests)
                return {"request": request, "steps": [], "residues": []}
            outcome = self._conductor.conduct(work, progress)
            self._await_detained()
            self._drift.check(guests)
            return {
                "request": request, "steps": list(outcome.steps),
                "residues": [r.to_json() for r in outcome.residues],
            }  # fmt: skip

        return self._jobs.start(title, run, uid=uid)

    def _await_detained(self) -> None:
        """Whoever a job detains was left out of the plan just made."""
        guests = self._observatory.guests.values()
        self._detained |= {g.uuid for g in guests if g.managed and g.active and g.detained}

    # -- going ------------------------------------------------------------------------------

    def depart(self, guest: GuestId) -> None:
        """A guest stopped: its grants end, what it borrowed goes home."""
        self._leaving.discard(guest)
        self.admission.forget(guest)
        self._unplaced.discard(guest)
        self._detained.discard(guest)
        self._drift.forget(guest)
        self._notices.settle(f"ports {guest}")
        view = self._ledger.view()
        if guest not in view.books.holdings:
            return
        state = self._observatory.guest(guest)
        name = state.name if state else guest
        self._handmade.release(guest, name)
        request = new_request()
        now = self._clock.now()
        work = Undertaking(
            request,
            f"departure of {name}",
            self._conductor.place_departure(15.0),
            lambda snapshot, _: choose_departure(snapshot, guest, request),
            deadline_s=60.0,
            settle_books=lambda books: depart(books, guest, now),
            incoming=state if state and not state.active else None,
            body={"guest": guest, "name": name, "origin": "hook"},
        )
        job = self._jobs.start(
            work.title, lambda _, p: summary(work, self._conductor.conduct(work, p))
        )
        job.ended.wait()
        if job.state is not JobState.DONE:
            detail = (job.error or {}).get("detail", "")
            log.warning("%s left, but its loans cannot go home now: %s", name, detail)
            self._forget(guest, f"{name} left, and it could not be given back: {detail}")
        if view.books.holdings[guest].pages:
            self.pages.sweep()
        self._notices.publish("guest.stopped", {"guest": guest, "name": name})
        # not the guest's errand: this waits for whoever is busy, and the guest may be back before
        self._errands.put(_POOL, partial(self._rearrange, f"pool after {name} left"))

    def _rearrange(self, title: str) -> None:
        """The dedicated set may have changed: the pool follows."""
        self.converge(None, title).ended.wait()


def _is_active(guest: GuestState | None) -> bool:
    return guest is not None and guest.active
