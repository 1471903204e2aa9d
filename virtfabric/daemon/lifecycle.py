"""Guests that come and go: admission at `prepare`, placement on `started`, release on stop.

The hook edge answers from the ledger and never touches libvirt; whatever needs libvirt is queued
to one worker thread, in order.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.api import JobState
from virtfabric.daemon.undertaking import Undertaking
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.filter import replace_placement
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import (
    HypervisorGoneError,
    InvalidValueError,
    Refusal,
    RefusedError,
    VirtfabricError,
)
from virtfabric.model.guest import RunState
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding
from virtfabric.model.plan import Plan, ResizeVirtioMem, SetBalloon, SetQuota
from virtfabric.model.policy import Placement
from virtfabric.model.units import Bytes
from virtfabric.policy.arbiter import choose_admission, choose_departure
from virtfabric.policy.layout import choose_layout
from virtfabric.policy.loans import depart
from virtfabric.policy.placement import plan_decision
from virtfabric.policy.standing import floor_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.drift import DriftWatch
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.ports import AuditLog, Clock, Event, Journal

log = logging.getLogger(__name__)

RETURNING: Final = "memory is returning, retry"
STRICT: Final = re.compile(r"<[\w.-]*:?policy\b[^>]*\badmission=[\"']strict[\"']")
UNSTARTED_S: Final = 120.0
"""A holding whose guest has not started this long after its admission is released again."""


def new_request() -> RequestId:
    """A fresh request id."""
    return RequestId(f"req-{uuid.uuid4().hex[:12]}")


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
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lifecycle", daemon=True)
        self._admitted_at: dict[GuestId, float] = {}
        self._leaving: set[GuestId] = set()
        self._unplaced: set[GuestId] = set()
        self._detained: set[GuestId] = set()

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

    def admit(self, xml: str, wait_s: float) -> str:
        """Answer `prepare`: "" to let the guest start, else the line that virsh shows."""
        try:
            guest = _starting(parse_domain(xml, None))
        except InvalidValueError as error:
            log.warning("prepare hook: %s", error)
            return f"virtfabric: {error}"
        if guest.policy is None:
            return self._admit_unmanaged(guest, xml)
        if guest.uuid in self._leaving and not self._flush(wait_s):
            return f"virtfabric: {guest.name}: its last run is still being settled, retry"
        held = self._ledger.view().books.holdings.get(guest.uuid)
        if held is not None:
            self._admitted_at[guest.uuid] = self._clock.monotonic()
            return ""
        return self._admit_managed(guest, wait_s)

    def _admit_unmanaged(self, guest: GuestState, xml: str) -> str:
        if not guest.policy_error:
            return ""
        text = f"guest {guest.name} has an invalid virtfabric policy: {guest.policy_error}"
        self._audit.append("policy.invalid", [guest.uuid], {"why": text})
        if STRICT.search(xml):
            return f"virtfabric: {text} (admission is strict; mend it with virsh edit)"
        self._notices.alert(f"policy {guest.uuid}", f"{text}; it runs unmanaged")
        return ""

    def _admit_managed(self, guest: GuestState, wait_s: float) -> str:
        work = self._admission(guest, deadline_s=max(wait_s, 0.1) * 6)
        self._admitted_at[guest.uuid] = self._clock.monotonic()
        try:
            job = self._jobs.start(
                work.title, lambda _, progress: self._admission_result(work, progress)
            )
        except RefusedError as error:
            return f"virtfabric: {error.refusal.detail}"
        if not job.ended.wait(wait_s):
            self._audit.append("admission.waits", [guest.uuid, work.request], {"for": job.text})
            return f"virtfabric: {guest.name}: {RETURNING}"
        if job.state is JobState.DONE:
            return ""
        detail = (job.error or {}).get("detail", "the agent failed")
        return f"virtfabric: {guest.name} cannot start: {detail}"

    def _admission(self, guest: GuestState, *, deadline_s: float) -> Undertaking:
        request = new_request()

        def decide(snapshot: HostSnapshot, _: Any) -> Decision | Refusal:
            return choose_admission(snapshot, guest, request)

        def place(snapshot: HostSnapshot, decision: Decision | None) -> Plan | Refusal:
            # memory and caps of victims come down before the guest starts; pins follow on `started`
            assert decision is not None
            plan = plan_decision(snapshot, decision, deadline_s=deadline_s)
            if isinstance(plan, Refusal):
                return plan
            # its own memory is libvirt's to set up now: a call about it would wait for this hook
            steps = tuple(
                step
                for step in plan.steps
                if isinstance(step, ResizeVirtioMem | SetBalloon | SetQuota)
                and step.guest != guest.uuid
            )
            return Plan(plan.request, plan.generation, steps, {}, plan.offers)

        return Undertaking(
            request,
            f"admission of {guest.name}",
            place,
            decide,
            grants=False,
            deadline_s=deadline_s,
            incoming=guest,
            body={"guest": guest.uuid, "name": guest.name, "origin": "hook"},
        )

    def _admission_result(self, work: Undertaking, progress: Progress) -> dict[str, Any]:
        outcome = self._conductor.conduct(work, progress)
        return {"request": work.request, "txn": outcome.txn, "steps": list(outcome.steps)}

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
        """`migrate` and `restore`: pins of another time or host make way for the pool.

        The guest's exact placement follows on `started`, as for any other start.
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

    def retry_detained(self) -> None:
        """Place the guests that a job has kept from it: libvirt does not tell of every end."""
        for guest in sorted(self._detained):
            self.enqueue(partial(self.settle_in, guest))

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
            if (state is None or not state.active) and not self._just_admitted(held):
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

    def _just_admitted(self, guest: GuestId) -> bool:
        since = self._admitted_at.get(guest)
        return since is not None and self._clock.monotonic() - since < UNSTARTED_S

    def settle_in(self, guest: GuestId) -> None:
        """A guest runs: see that it holds what it may and sits where it should."""
        self._observatory.refresh([guest])
        state = self._observatory.guest(guest)
        self._detained.discard(guest)
        if state is None or not state.active:
            return
        self._admitted_at.pop(guest, None)
        if state.managed and state.detained:
            # an incoming migration also: its `started` hook runs long before the guest is here
            self._detained.add(guest)
            return
        held = self._ledger.view().books.holdings.get(guest)
        if not state.managed:
            if held is not None:
                self._forget(guest)
            self._alert_policy(state)
            return
        self._notices.settle(f"policy {guest}")
        if held is None:
            self._adopt(state)
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

    def _adopt(self, state: GuestState) -> None:
        """It runs already (started while we were down, or without hooks): it must be counted."""
        request = new_request()
        work = Undertaking(
            request,
            f"adoption of {state.name}",
            self._conductor.place_decision(10.0),
            lambda snapshot, _: choose_admission(snapshot, state, request),
            deadline_s=10.0,
            body={"guest": state.uuid, "name": state.name, "origin": "agent"},
        )
        job = self._jobs.start(work.title, lambda _, p: self._admission_result(work, p))
        job.ended.wait()
        if job.state is JobState.DONE:
            self._notices.settle(f"overcommit {state.uuid}")
            return
        self._notices.alert(
            f"overcommit {state.uuid}",
            f"guest {state.name} runs although it does not fit "
            f"({(job.error or {}).get('detail', '')}); it holds its floor",
        )
        amounts = self._floor(state)
        self._ledger.commit(
            None, lambda books: _with_holding(books, state.uuid, amounts), self._journal.store_books
        )

    def _floor(self, state: GuestState) -> Amounts:
        floor = floor_of(state, self._observatory.snapshot())
        return Amounts.of(cpu=floor.cpu, memory=max(floor.memory, state.memory_current))

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
        self._admitted_at.pop(guest, None)
        self._unplaced.discard(guest)
        self._detained.discard(guest)
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
            self._conductor.place_departure(15.0),
            lambda snapshot, _: choose_departure(snapshot, guest, request),
            deadline_s=60.0,
            settle_books=lambda books: depart(books, guest, now),
            incoming=state if state and not state.active else None,
            body={"guest": guest, "name": name, "origin": "hook"},
        )
        job = self._jobs.start(work.title, lambda _, p: self._admission_result(work, p))
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


def _starting(guest: GuestState) -> GuestState:
    """A guest as its `prepare` hook means it.

    The XML has an id already and says `<current>` 0, but there is no QEMU yet to change, and it
    will start with what its memory devices request (measured, libvirt 9.0).
    """
    requested = sum(d.requested for d in guest.virtio_mem)
    memory = Bytes(guest.boot_memory + requested) if guest.virtio_mem else guest.memory_current
    return replace(guest, state=RunState.SHUTOFF, memory_current=memory)


def _with_holding(books: Books, guest: GuestId, amounts: Amounts) -> Books:
    holdings = {**books.holdings, guest: Holding(guest, amounts)}
    return Books(books.generation, holdings, books.grants, books.loans, books.residues)
