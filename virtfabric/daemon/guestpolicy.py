"""`policy show | set | clear`: the metadata of a guest, and what a change of it leads to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.intake import parse_policy_changes
from virtfabric.daemon.lifecycle import new_request
from virtfabric.daemon.undertaking import Undertaking
from virtfabric.domxml.policy import format_policy
from virtfabric.model.amounts import CPU, MEMORY, Key
from virtfabric.model.errors import Reason, Refusal, RefusedError
from virtfabric.model.policy import Placement
from virtfabric.model.request import AGENT, Mode, Origin, Request, Want
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.loans import depart
from virtfabric.policy.placement import plan_lift
from virtfabric.policy.standing import ceiling_of, floor_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.lifecycle import Lifecycle
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.amounts import Amounts
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.ports import Clock, PolicyWriter

    Json = dict[str, Any]


def policy_view(guest: GuestState) -> Json:
    """As documented in docs/dbus-api.md."""
    policy = asdict(guest.policy) if guest.policy else None
    return {
        "uuid": guest.uuid, "name": guest.name, "managed": guest.managed,
        "policy_error": guest.policy_error, "policy": policy,
        "xml": format_policy(guest.policy) if guest.policy else "", "job": None,
    }  # fmt: skip


class PolicyDesk:
    """Writes policies and has guests follow them."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        jobs: Jobs,
        lifecycle: Lifecycle,
        writer: PolicyWriter,
        clock: Clock,
    ) -> None:
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._writer = writer
        self._clock = clock

    def prepare(self, guest: GuestState, changes: Mapping[str, str]) -> GuestPolicy:
        """The policy as it would be.

        Raises:
            InvalidValueError: names the field.
        """
        return parse_policy_changes(guest.policy, changes)

    def set(self, guest: GuestState, policy: GuestPolicy, *, uid: int) -> Json:
        """Write it; a running guest is brought inside its new bounds and placed.

        Raises:
            RefusedError: BUSY, UNKNOWN_GUEST.
        """
        self._check_free(guest)
        self._writer.write_policy(guest.uuid, policy)
        self._observatory.refresh([guest.uuid])
        after = self._observatory.guest(guest.uuid)
        if after is None:
            raise RefusedError(Refusal(Reason.UNKNOWN_GUEST, f"{guest.name} went away"))
        answer = policy_view(after)
        if after.active:
            title = f"new policy of {after.name}"
            job = self._jobs.start(title, lambda j, p: self._follow(after.uuid, j, p), uid=uid)
            answer["job"] = job.id
        return answer

    def _check_free(self, guest: GuestState) -> None:
        """Metadata is a change like any other.

        Raises:
            RefusedError: BUSY, a job of libvirt is in the way.
        """
        self._observatory.refresh([guest.uuid])
        now = self._observatory.guest(guest.uuid)
        if now is not None and now.detained:
            raise RefusedError(Refusal(Reason.BUSY, f"{now.name} has a job running: {now.job}"))

    def _follow(self, guest: GuestId, _: Job, progress: Progress) -> Json:
        if guest not in self._ledger.view().books.holdings:
            self._lifecycle.settle_in(guest)
            return {"steps": []}
        request = self._correction(guest)
        if request is not None:
            work = Undertaking(
                request.id,
                "bounds of a new policy",
                self._conductor.place_decision(30.0),
                lambda snapshot, caps: choose_allocation(snapshot, request, caps=caps),
                body={"asked": request.to_json()},
            )
            self._conductor.conduct(work, progress)
        job = self._lifecycle.converge(None, "placement after a new policy")
        job.ended.wait()
        if job.error:
            raise RefusedError(Refusal(Reason.NO_PLACEMENT, job.error["detail"]))
        return job.result or {}

    def _correction(self, guest: GuestId) -> Request | None:
        """What brings the holding between floor and ceiling; None where it is there already."""
        snapshot = self._observatory.snapshot()
        state = snapshot.guests[guest]
        held = snapshot.books.holdings[guest].amounts
        target = self._clamp(state, held, floor_of(state, snapshot), ceiling_of(state, snapshot))
        if target == held:
            return None
        cpu, memory = Key(CPU), Key(MEMORY)
        return Request(
            new_request(), guest, AGENT, Origin.AGENT,
            cpu=Want(Mode.TO, target[cpu]) if target[cpu] != held[cpu] else None,
            memory=Want(Mode.TO, target[memory]) if target[memory] != held[memory] else None,
        )  # fmt: skip

    def _clamp(self, state: GuestState, held: Amounts, floor: Amounts, ceiling: Amounts) -> Amounts:
        target = held
        for resource in (CPU, MEMORY):
            key = Key(resource)
            value = max(floor[key], min(held[key], ceiling[key]))
            target = target.with_value(key, value)
        dedicated = state.policy is not None and state.policy.cpu.placement is Placement.DEDICATED
        if dedicated:
            target = target.with_value(Key(CPU), target.cpu.whole * 1000)
        return target

    def clear(self, guest: GuestState, *, uid: int) -> Json:
        """Make it unmanaged: caps and pins lifted, books closed, metadata removed.

        Raises:
            RefusedError: BUSY.
        """
        self._check_free(guest)
        answer = policy_view(guest) | {"policy": None, "xml": "", "managed": False}
        if not guest.active or guest.uuid not in self._ledger.view().books.holdings:
            self._writer.write_policy(guest.uuid, None)
            self._observatory.refresh([guest.uuid])
            return answer
        job = self._jobs.start(
            f"lift of {guest.name}", lambda _, progress: self._lift(guest, progress), uid=uid
        )
        return answer | {"job": job.id}

    def _lift(self, guest: GuestState, progress: Progress) -> Json:
        request = new_request()
        now = self._clock.now()
        work = Undertaking(
            request,
            f"lift of {guest.name}",
            lambda snapshot, _: plan_lift(snapshot, guest.uuid, request),
            settle_books=lambda books: depart(books, guest.uuid, now),
            body={"guest": guest.uuid, "name": guest.name},
        )
        outcome = self._conductor.conduct(work, progress)
        self._writer.write_policy(guest.uuid, None)
        self._observatory.refresh([guest.uuid])
        self._lifecycle.converge(None, f"pool after {guest.name} was cleared").ended.wait()
        return {"request": request, "steps": list(outcome.steps)}
