"""Who may hold: a guest's admission at `prepare`, and the adoption of one that runs already.

It answers the hook's question from the ledger and never touches the guest that asks.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.api import JobState
from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.domxml.domain import parse_domain
from virtfabric.model.amounts import Amounts
from virtfabric.model.capability import capability_of
from virtfabric.model.devicesteps import AttachFunction, ResetFunction
from virtfabric.model.errors import InvalidValueError, Reason, Refusal, RefusedError
from virtfabric.model.guest import RunState
from virtfabric.model.hugepages import MakeHugePages
from virtfabric.model.ledger import Holding
from virtfabric.model.plan import Plan, ResizeVirtioMem, SetBalloon, SetQuota
from virtfabric.model.policy import Admission as AdmissionRule
from virtfabric.model.units import Bytes
from virtfabric.policy.arbiter import choose_admission
from virtfabric.policy.placement import plan_decision
from virtfabric.policy.portbudget import describe_shortage, missing_ports
from virtfabric.policy.standing import owed_to

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.handmade import Handmade
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.ports import AuditLog, Clock, Journal

log = logging.getLogger(__name__)

_BEFORE_START: Final = (ResizeVirtioMem, SetBalloon, SetQuota, AttachFunction, ResetFunction)
"""Steps that make room for a guest that starts; the rest follows when it runs."""
RETURNING: Final = "memory is returning"
STRICT: Final = re.compile(r"<[\w.-]*:?policy\b[^>]*\badmission=[\"']strict[\"']")
UNSTARTED_S: Final = 120.0
"""A holding whose guest has not started this long after its admission is released again."""


class Admission:
    """Admits guests that start, adopts those that were not asked about."""

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
        surveyed: threading.Event,
        settled: Callable[[GuestId, float], bool],
        handmade: Handmade,
    ) -> None:
        """Wire it.

        `surveyed` is set when the books count every guest that ran when the agent started;
        `settled` tells whether a guest's last run is settled, after waiting so many seconds.
        """
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._notices = notices
        self._journal = journal
        self._audit = audit
        self._clock = clock
        self._surveyed = surveyed
        self._settled = settled
        self._handmade = handmade
        self._admitted_at: dict[GuestId, float] = {}
        self._admissions: dict[GuestId, Job] = {}

    def is_recent(self, guest: GuestId) -> bool:
        """Whether it was admitted so lately that it need not run yet."""
        since = self._admitted_at.get(guest)
        return since is not None and self._clock.monotonic() - since < UNSTARTED_S

    def forget(self, guest: GuestId) -> None:
        """It runs now, or is gone: its admission is over."""
        self._admitted_at.pop(guest, None)

    # -- before it starts -------------------------------------------------------------------

    def admit(self, xml: str, wait_s: float) -> str:
        """Answer `prepare`: "" to let the guest start, else the line that virsh shows."""
        answer = self._answer_prepare(xml, wait_s)
        if answer:
            log.info("hook: prepare refused: %s", answer.removeprefix("virtfabric: "))
        return answer

    def _answer_prepare(self, xml: str, wait_s: float) -> str:
        try:
            guest = _starting(parse_domain(xml, None))
        except InvalidValueError as error:
            return f"virtfabric: {error}"
        if guest.policy is None:
            return self._admit_unmanaged(guest, xml)
        if refusal := self._check_ports(guest, guest.policy):
            return refusal
        until = self._clock.monotonic() + wait_s
        if not self._surveyed.wait(wait_s):
            return "virtfabric: the agent is starting, retry"
        wait_s = max(0.0, until - self._clock.monotonic())
        if not self._settled(guest.uuid, wait_s):
            return f"virtfabric: {guest.name}: its last run is still being settled, retry"
        return self._admit_managed(guest, wait_s) or self._handmade.bind(
            guest, max(0.1, until - self._clock.monotonic())
        )

    def _admit_unmanaged(self, guest: GuestState, xml: str) -> str:
        if not guest.policy_error:
            return ""
        text = f"guest {guest.name} has an invalid virtfabric policy: {guest.policy_error}"
        self._audit.append("policy.invalid", [guest.uuid], {"why": text})
        if STRICT.search(xml):
            return f"virtfabric: {text} (admission is strict; mend it with virsh edit)"
        self._notices.alert(f"policy {guest.uuid}", f"{text}; it runs unmanaged")
        return ""

    def _check_ports(self, guest: GuestState, policy: GuestPolicy) -> str:
        """A function without a port cannot be attached as long as the guest runs."""
        topic = f"ports {guest.uuid}"
        missing = missing_ports(policy, guest.free_ports)
        if not missing:
            self._notices.settle(topic)
            return ""
        text = describe_shortage(guest.name, missing)
        if policy.admission is AdmissionRule.STRICT:
            self._audit.append("admission.no-ports", [guest.uuid], {"why": text})
            return f"virtfabric: {Reason.NO_FREE_PORT}: {text} (admission is strict)"
        self._notices.alert(topic, text)
        return ""

    def _admit_managed(self, guest: GuestState, wait_s: float) -> str:
        if guest.uuid in self._ledger.view().books.holdings:
            self._admitted_at[guest.uuid] = self._clock.monotonic()
            return ""
        try:
            job = self._start_admission(guest, deadline_s=max(wait_s, 0.1) * 6)
        except RefusedError as error:
            return f"virtfabric: {error.refusal.detail}"
        if not job.ended.wait(wait_s):
            why = _why_late(job)
            self._audit.append("admission.waits", [guest.uuid], {"for": why, "job": job.id})
            return f"virtfabric: {guest.name}: {why}, retry"
        self._admissions.pop(guest.uuid, None)
        if job.state is JobState.DONE:
            return ""
        detail = (job.error or {}).get("detail", "the agent failed")
        return f"virtfabric: {guest.name} cannot start: {detail}"

    def _start_admission(self, guest: GuestState, *, deadline_s: float) -> Job:
        """Start to admit it, or go on with what an earlier `virsh start` did not wait for."""
        self._admitted_at[guest.uuid] = self._clock.monotonic()
        running = self._admissions.get(guest.uuid)
        if running is not None and not running.ended.is_set():
            return running
        work = self._admission(guest, deadline_s=deadline_s)
        job = self._jobs.start(
            work.title, lambda _, p: summary(work, self._conductor.conduct(work, p))
        )
        self._admissions[guest.uuid] = job
        return job

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
            # its functions are reserved now, and attached when it runs
            steps = tuple(
                step
                for step in plan.steps
                if (isinstance(step, _BEFORE_START) and step.guest != guest.uuid)
                or isinstance(step, MakeHugePages)
            )
            return replace(plan, steps=steps, orders={})

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

    # -- it runs already --------------------------------------------------------------------

    def adopt(self, state: GuestState) -> bool:
        """It runs already (started while we were down, or without hooks): it must be counted.

        Returns:
            Whether it is; not where it stopped or lost its policy since `state` was read.
        """
        request = new_request()

        def decide(snapshot: HostSnapshot, _: Any) -> Decision | Refusal:
            now = snapshot.guests.get(state.uuid)
            if now is None or not _is_managed(now):
                return Refusal(Reason.STALE, f"{state.name} stopped or became unmanaged meanwhile")
            return choose_admission(snapshot, now, request)

        work = Undertaking(
            request,
            f"adoption of {state.name}",
            self._conductor.place_decision(10.0),
            decide,
            deadline_s=10.0,
            body={"guest": state.uuid, "name": state.name, "origin": "agent"},
        )
        job = self._jobs.start(
            work.title, lambda _, p: summary(work, self._conductor.conduct(work, p))
        )
        job.ended.wait()
        if job.state is JobState.DONE:
            self._notices.settle(f"overcommit {state.uuid}")
            return True
        self._observatory.refresh([state.uuid])
        now = self._observatory.guest(state.uuid)
        if now is None or not _is_managed(now):
            return False
        self._notices.alert(
            f"overcommit {state.uuid}",
            f"guest {state.name} runs although it does not fit "
            f"({(job.error or {}).get('detail', '')}); it holds its floor",
        )
        amounts = self._floor(now)
        self._ledger.commit(
            None, lambda books: _with_holding(books, state.uuid, amounts), self._journal.store_books
        )
        return True

    def _floor(self, state: GuestState) -> Amounts:
        owed = owed_to(state, self._observatory.snapshot())
        return Amounts({k: v for k, v in owed.items() if capability_of(k) is None})


def _why_late(job: Job) -> str:
    """What an admission that has not ended waits for: memory only where it is called home now."""
    if job.progress is None:
        return "the agent is busy with other jobs"
    step = job.progress.step
    if isinstance(step, ResizeVirtioMem | SetBalloon) and step.after < step.before:
        return RETURNING
    return job.progress.doing


def _starting(guest: GuestState) -> GuestState:
    """A guest as its `prepare` hook means it.

    The XML has an id already and says `<current>` 0, but there is no QEMU yet to change, and it
    will start with what its memory devices request (measured, libvirt 9.0).
    """
    requested = sum(d.requested for d in guest.virtio_mem)
    memory = Bytes(guest.boot_memory + requested) if guest.virtio_mem else guest.memory_current
    devices = tuple(replace(d, current=d.requested) for d in guest.virtio_mem)
    return replace(guest, state=RunState.SHUTOFF, memory_current=memory, virtio_mem=devices)


def _is_managed(guest: GuestState) -> bool:
    return guest.active and guest.managed


def _with_holding(books: Books, guest: GuestId, amounts: Amounts) -> Books:
    holdings = {**books.holdings, guest: Holding(guest, amounts)}
    return replace(books, holdings=holdings)
