"""`policy show | set | clear`: the metadata of a guest, and what a change of it leads to.

For a running guest both are one transaction: the metadata is a step like any other, so that a
plan that is undone, or was cut off, takes it back as well.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.custody import unnamed
from virtfabric.daemon.intake import parse_policy_changes
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.daemon.views import plan_view
from virtfabric.domxml.policy import format_bare_policy, format_policy
from virtfabric.model.amounts import CPU_KEY, MEMORY_KEY, Amounts
from virtfabric.model.capability import device_key
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason, Refusal, RefusedError
from virtfabric.model.plan import Definition, SetPolicy
from virtfabric.model.policy import Placement
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_admission
from virtfabric.policy.loans import depart
from virtfabric.policy.placement import plan_convergence, plan_decision, plan_lift
from virtfabric.policy.standing import ceiling_of, floor_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.lifecycle import Lifecycle
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.undertaking import Caps, Choose, Outcome
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.ports import Clock, PolicyWriter

    Json = dict[str, Any]


def policy_view(guest: GuestState) -> Json:
    """As documented in docs/dbus-api.md."""
    policy = asdict(guest.policy) if guest.policy else None
    return {
        "uuid": guest.uuid, "name": guest.name, "managed": guest.managed,
        "policy_error": guest.policy_error, "policy": policy,
        "xml": format_policy(guest.policy) if guest.policy else guest.policy_text, "job": None,
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
        choose: Choose,
    ) -> None:
        """`choose` decides what a guest that runs is to have, whoever does."""
        self._choose = choose
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
        """Write it; a running guest is brought inside its new bounds and placed, or all is undone.

        Returns:
            The policy as it will be, with the job where the guest runs.

        Raises:
            RefusedError: BUSY.
        """
        now = self._check_free(guest)
        if not now.active:
            self._write_only(guest, policy)
            return policy_view(self._observatory.guest(guest.uuid) or guest)
        job = self._jobs.start(
            f"new policy of {guest.name}",
            lambda _, progress: self._change(guest, policy, progress),
            uid=uid,
        )
        return policy_view(replace(guest, policy=policy, policy_error="")) | {"job": job.id}

    def preview(self, guest: GuestState, policy: GuestPolicy) -> Json:
        """What `set` would do, and for a running guest by which steps (`plan`).

        Raises:
            RefusedError: as `set` or its job.
        """
        now = self._check_free(guest)
        answer = policy_view(replace(now, policy=policy, policy_error="")) | {"plan": None}
        if not now.active:
            return answer
        found = self._conductor.consider(self._undertaking(now, policy, new_request()))
        if isinstance(found, Refusal):
            raise RefusedError(found)
        snapshot, decision, plan = found
        assert decision is not None
        return answer | {"plan": plan_view(snapshot, decision, plan)}

    def _write_only(self, guest: GuestState, policy: GuestPolicy | None) -> None:
        """Nothing of it concerns anybody who runs: one call of libvirt does it all."""
        self._writer.write_policy(guest.uuid, policy)
        self._observatory.refresh([guest.uuid])
        # it may have started meanwhile, and be settled in by its former policy
        self._lifecycle.enqueue(partial(self._lifecycle.settle_in, guest.uuid), guest.uuid)

    def _check_free(self, guest: GuestState) -> GuestState:
        """Metadata is a change like any other.

        Returns:
            The guest as it is now: it may have started or stopped since `guest` was read.

        Raises:
            RefusedError: BUSY, a job of libvirt is in the way.
        """
        self._observatory.refresh([guest.uuid])
        now = self._observatory.guest(guest.uuid) or guest
        if now.detained:
            raise RefusedError(Refusal(Reason.BUSY, f"{now.name} has a job running: {now.job}"))
        return now

    def _change(self, guest: GuestState, policy: GuestPolicy, progress: Progress) -> Json:
        request = new_request()
        work = self._undertaking(guest, policy, request)
        outcome = self._conductor.conduct(work, progress)
        # alerts about the former policy end, and what other guests' plans left undone is done
        self._lifecycle.enqueue(partial(self._lifecycle.settle_in, guest.uuid), guest.uuid)
        return self._result(request, outcome)

    def _result(self, request: RequestId, outcome: Outcome) -> Json:
        return {
            "request": request, "txn": outcome.txn, "steps": list(outcome.steps),
            "residues": [r.to_json() for r in outcome.residues],
        }  # fmt: skip

    def _undertaking(
        self, guest: GuestState, policy: GuestPolicy, request: RequestId
    ) -> Undertaking:
        return Undertaking(
            request,
            f"new policy of {guest.name}",
            lambda snapshot, decision: _place(snapshot, decision, guest.uuid, policy),
            lambda snapshot, caps: _decide(snapshot, caps, guest, policy, request, self._choose),
            body={"guest": guest.uuid, "name": guest.name, "policy": format_bare_policy(policy)},
        )

    def clear(self, guest: GuestState, *, uid: int) -> Json:
        """Make it unmanaged: caps and pins lifted, books closed, metadata removed.

        Raises:
            RefusedError: BUSY.
        """
        guest = self._check_free(guest)
        answer = policy_view(guest) | {"policy": None, "xml": "", "managed": False}
        held = guest.uuid in self._ledger.view().books.holdings
        if not guest.active or not (guest.managed or held):
            self._write_only(guest, None)
            return answer
        job = self._jobs.start(
            f"lift of {guest.name}", lambda _, progress: self._lift(guest, progress), uid=uid
        )
        return answer | {"job": job.id}

    def _lift(self, guest: GuestState, progress: Progress) -> Json:
        request = new_request()
        now, why = self._clock.now(), f"{guest.name} became unmanaged while it had it"

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
            return _writing(plan_lift(snapshot, guest.uuid, request), snapshot, guest.uuid, "")

        work = Undertaking(
            request,
            f"lift of {guest.name}",
            place,
            settle_books=lambda books: depart(
                unnamed(books, guest.uuid, why, now), guest.uuid, now
            ),
            body={"guest": guest.uuid, "name": guest.name},
        )
        outcome = self._conductor.conduct(work, progress)
        self._lifecycle.converge(None, f"pool after {guest.name} was cleared").ended.wait()
        return self._result(request, outcome)


def _under(snapshot: HostSnapshot, guest: GuestId, policy: GuestPolicy) -> HostSnapshot:
    """The host as it would be if the guest had this policy already."""
    state = snapshot.guests.get(guest)
    if state is None:
        return snapshot
    changed = replace(state, policy=policy, policy_error="")
    return replace(snapshot, guests={**snapshot.guests, guest: changed})


def _decide(
    snapshot: HostSnapshot, caps: Caps, asked: GuestState, policy: GuestPolicy, request: RequestId,
    choose: Choose,
) -> Decision | Refusal:  # fmt: skip
    """What the new policy comes to; `asked` is the guest that it was made for, as it was then."""
    guest = asked.uuid
    found = snapshot.guests.get(guest)
    if found is None or not found.active:
        return Refusal(Reason.NOT_RUNNING, f"{asked.name} stopped meanwhile; set its policy again")
    if found.policy_text != asked.policy_text:
        return Refusal(Reason.STALE, f"the policy of {asked.name} changed meanwhile; set it again")
    snapshot = _under(snapshot, guest, policy)
    state = snapshot.guests[guest]
    held = snapshot.books.holdings.get(guest)
    if held is None:
        return choose_admission(snapshot, state, request, caps=caps)
    wanted = _correction(snapshot, state, held.amounts, found.policy, request)
    if wanted is None:
        return Decision(request, guest, snapshot.generation, Amounts())
    return choose(snapshot, wanted, caps)


def _place(
    snapshot: HostSnapshot, decision: Decision | None, guest: GuestId, policy: GuestPolicy
) -> Plan | Refusal:
    assert decision is not None
    then = _under(snapshot, guest, policy)
    plan = (
        plan_decision(then, decision)
        if decision.holdings
        else plan_convergence(then, [guest], decision.request)
    )
    if isinstance(plan, Refusal):
        return plan
    return _writing(plan, snapshot, guest, format_bare_policy(policy))


def _writing(plan: Plan, snapshot: HostSnapshot, guest: GuestId, text: str) -> Plan:
    """The plan, with the metadata written last: until then everybody sees the former policy."""
    state = snapshot.guests[guest]
    found = [(Definition.LIVE, state.policy_text)]
    if state.persistent:
        found.append((Definition.CONFIG, state.config_policy_text))
    writes = tuple(
        SetPolicy(guest=guest, name=state.name, definition=which, before=before, after=text)
        for which, before in found
        if before != text
    )
    return replace(plan, steps=plan.steps + writes)


def _correction(
    snapshot: HostSnapshot,
    state: GuestState,
    held: Amounts,
    old: GuestPolicy | None,
    request: RequestId,
) -> Request | None:
    """What brings the holding between floor and ceiling; None where it is there already."""
    target = _clamp(state, held, floor_of(state, snapshot), ceiling_of(state, snapshot))
    devices = _surplus(snapshot, state, held, old)
    if target == held and not devices:
        return None
    cpu, memory = CPU_KEY, MEMORY_KEY
    return Request(
        request, state.uuid, AGENT, Origin.AGENT,
        cpu=Want(Mode.TO, target[cpu]) if target[cpu] != held[cpu] else None,
        memory=Want(Mode.TO, target[memory]) if target[memory] != held[memory] else None,
        devices=devices,
    )  # fmt: skip


def _surplus(
    snapshot: HostSnapshot, state: GuestState, held: Amounts, old: GuestPolicy | None
) -> dict[str, Want]:
    """Functions to give back: above the count, or no longer asked for nor granted otherwise.

    What a policy newly asks for comes later, as for any wish.
    """
    counts = {wish.capability: wish.count for wish in state.policy.devices} if state.policy else {}
    grants = [g.amounts for g in snapshot.books.grants.values() if g.guest == state.uuid]
    most = {
        wish.capability: sum(amounts[device_key(wish.capability)] for amounts in grants)
        for wish in (old.devices if old else ())
    } | counts
    return {
        capability: Want(Mode.TO, count)
        for capability, count in most.items()
        if held[device_key(capability)] > count
    }


def _clamp(state: GuestState, held: Amounts, floor: Amounts, ceiling: Amounts) -> Amounts:
    target = held
    for key in (CPU_KEY, MEMORY_KEY):
        target = target.with_value(key, max(floor[key], min(held[key], ceiling[key])))
    if state.policy is not None and state.policy.cpu.placement is Placement.DEDICATED:
        target = target.with_value(CPU_KEY, target.cpu.whole * 1000)
    return target
