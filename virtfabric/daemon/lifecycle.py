"""Guests that come and go: placement on `started`, release on stop; what hooks and events mean.

The hook edge answers from the ledger and never touches libvirt; whatever needs libvirt is queued
to one worker thread, in order.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.admission import Admission
from virtfabric.daemon.api import JobState
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.filter import replace_placement
from virtfabric.model.errors import (
    HypervisorGoneError,
    Refusal,
    VirtfabricError,
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
        self.admission = Admission(
            observatory=observatory, ledger=ledger, conductor=conductor, jobs=jobs,
            notices=notices, journal=journal, audit=audit, clock=clock,
            settled=self._last_run_settled,
        )  # fmt: skip
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lifecycle", daemon=True)
        self._leaving: set[GuestId] = set()
        self._unplaced: set[GuestId] = set()

    def start(self) -> None:
        """Begin working off what hooks and events queue."""
        self._thread.start()

    def close(self) -> None:
        """Finish what is queued and stop."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do this in the worker, after what is there already."""
        self._queue.put(work)

    def _flush(self, wait_s: float) -> bool:
        """Wait until the worker has done all that is queued now."""
        done = threading.Event()
        self.enqueue(done.set)
        return done.wait(wait_s)

    def _last_run_settled(self, guest: GuestId, wait_s: float) -> bool:
        return guest not in self._leaving or self._flush(wait_s)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except HypervisorGoneError as error:
                log.warning("libvirt is away: %s; everything is read again when it is back", error)
            except VirtfabricError as error:
                log.warning("lifecycle: %s", error)
            except Exception:
                # one bad event must not end the thread that all others need
                log.exception("lifecycle work failed")

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
            self.enqueue(lambda: self.depart(guest.uuid))
        elif operation in ("started", "reconnect"):
            self.enqueue(lambda: self.settle_in(guest.uuid))

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
                self.enqueue(lambda: self.resync(place=True))
            case "disconnected":
                self._notices.publish("agent.disconnected", {"why": event.detail})
            case "stopped" if event.guest:
                guest = event.guest
                self._observatory.mark_stopped(guest)
                self.enqueue(lambda: self.depart(guest))
            case "started" | "resumed" if event.guest:
                guest = event.guest
                self.enqueue(lambda: self.settle_in(guest))
            case "metadata" if event.detail == MARK_NAMESPACE:
                pass  # our own hand: each placement may write the mark
            case _ if event.guest:
                guest = event.guest
                self.enqueue(lambda: self._look_again(guest))

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

    # -- coming -----------------------------------------------------------------------------

    def resync(self, *, place: bool = False) -> None:
        """Read everything; guests that came or went while we were away are settled.

        Args:
            place: bring every guest to where it should be, also those that were here before: what
                happened to them while nobody looked is unknown. Otherwise what somebody changed
                on them is drift, which their policy may want to be reported only.
        """
        before = self._observatory.guests
        self._observatory.refresh_all()
        guests = self._observatory.guests
        for held in list(self._ledger.view().books.holdings):
            state = guests.get(held)
            if (state is None or not state.active) and not self.admission.is_recent(held):
                self.depart(held)
        for state in guests.values():
            if state.active and (place or not self._is_settled(before.get(state.uuid), state)):
                self.settle_in(state.uuid)

    def _is_settled(self, before: GuestState | None, now: GuestState) -> bool:
        """Whether it is the same run of the guest, under the same policy, and was placed."""
        if before is None or before.pid != now.pid or before.policy != now.policy:
            return False
        held = now.uuid in self._ledger.view().books.holdings
        return held == now.managed and now.uuid not in self._unplaced

    def settle_in(self, guest: GuestId) -> None:
        """A guest runs: see that it holds what it may and sits where it should."""
        self._observatory.refresh([guest])
        state = self._observatory.guest(guest)
        if state is None or not state.active:
            return
        self.admission.forget(guest)
        held = self._ledger.view().books.holdings.get(guest)
        if not state.managed:
            if held is not None:
                self._forget(guest)
            self._alert_policy(state)
            return
        self._notices.settle(f"policy {guest}")
        if held is None:
            self.admission.adopt(state)
            self._notices.publish("guest.started", {"guest": guest, "name": state.name})
        self._place(state)

    def _alert_policy(self, state: GuestState) -> None:
        if state.policy_error:
            self._notices.alert(
                f"policy {state.uuid}",
                f"guest {state.name} has an invalid policy: {state.policy_error}; "
                "it runs unmanaged",
            )

    def _forget(self, guest: GuestId) -> None:
        """A running guest became unmanaged by somebody else's hand: its holding ends."""
        self._ledger.commit(
            None,
            lambda books: depart(books, guest, self._clock.now()),
            self._journal.store_books,
        )
        self._drift.forget(guest)

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
                return {"request": request, "steps": [], "residues": []}
            outcome = self._conductor.conduct(work, progress)
            self._drift.check(guests)
            return {
                "request": request, "steps": list(outcome.steps),
                "residues": [r.to_json() for r in outcome.residues],
            }  # fmt: skip

        return self._jobs.start(title, run, uid=uid)

    # -- going ------------------------------------------------------------------------------

    def depart(self, guest: GuestId) -> None:
        """A guest stopped: its grants end, what it borrowed goes home."""
        self._leaving.discard(guest)
        self.admission.forget(guest)
        self._unplaced.discard(guest)
        self._drift.forget(guest)
        view = self._ledger.view()
        if guest not in view.books.holdings:
            return
        state = self._observatory.guest(guest)
        name = state.name if state else guest
        request = new_request()
        now = self._clock.now()
        work = Undertaking(
            request,
            f"departure of {name}",
            self._conductor.place_decision(15.0),
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
            self._forget(guest)
        self._notices.publish("guest.stopped", {"guest": guest, "name": name})
        self._rearrange(f"pool after {name} left")

    def _rearrange(self, title: str) -> None:
        """The dedicated set may have changed: the pool follows."""
        self.converge(None, title).ended.wait()
