"""Allocation and release: from a caller's words to a job that is conducted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.intake import parse_request
from virtfabric.daemon.sliceprelude import SlicePrelude
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.daemon.views import plan_view
from virtfabric.model.amounts import CPU_KEY
from virtfabric.model.capability import device_key
from virtfabric.model.errors import Reason, Refusal, RefusedError, VirtfabricError
from virtfabric.model.ids import GrantId
from virtfabric.model.want import Mode
from virtfabric.policy.arbiter import choose_release

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.daemon.api import Caller
    from virtfabric.daemon.authority import Authority
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.undertaking import Caps, Choose, Outcome
    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import Grant, HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.ports import Cards, Clock

    Json = dict[str, Any]


LEASE: Final = "lease"
"""Who releases a grant whose lease is over."""


class Allocation:
    """Starts allocations, previews and releases."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        jobs: Jobs,
        notices: Notices,
        authority: Authority,
        deadline_s: Callable[[], float],
        cards: Cards,
        clock: Clock,
        settle_cards_soon: Callable[[], None],
        choose: Choose,
        idle_slices: Callable[[], Sequence[str]],
    ) -> None:
        """Wire it; nothing is asked yet.

        `settle_cards_soon` has cards brought to what the books say; it must not block. `choose`
        decides what a guest that runs is to have, whoever does. `idle_slices` says which slices
        of cards nobody would miss.
        """
        self._idle_slices = idle_slices
        self._choose = choose
        self._cards = cards
        self._clock = clock
        self._settle_cards_soon = settle_cards_soon
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._notices = notices
        self._authority = authority
        self._deadline_s = deadline_s
        self._by_key: dict[tuple[int, str], Json] = {}

    def find(self, name: str) -> GuestState:
        """A guest by name or UUID.

        Raises:
            RefusedError: unknown.
        """
        found = self._observatory.find(name)
        if found is None:
            known = ", ".join(sorted(g.name for g in self._observatory.guests.values())) or "none"
            raise RefusedError(
                Refusal(Reason.UNKNOWN_GUEST, f"there is no guest {name!r}; known are: {known}")
            )
        return found

    def _request(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Request:
        state = self.find(guest)
        request = parse_request(
            new_request(),
            state.uuid,
            caller.principal,
            wants,
            default_deadline_s=self._deadline_s(),
        )
        self._check_ceiling(caller, request)
        if request.devices:
            self._observatory.glance_at_devices(request.devices)
        return request

    def _check_ceiling(self, caller: Caller, request: Request) -> None:
        holding = self._ledger.view().books.holdings.get(request.guest)
        if holding is None:
            return
        after = holding.amounts
        wants = [(CPU_KEY, request.cpu), (request.memory_key, request.memory)]
        wants += [(device_key(c), want) for c, want in request.devices.items()]
        for key, want in wants:
            if want is not None:
                value = want.value + (holding.amounts[key] if want.mode is Mode.BY else 0)
                after = after.with_value(key, value)
        self._authority.check_amounts(caller, after)

    def _undertaking(self, request: Request, name: str) -> Undertaking:
        def decide(snapshot: HostSnapshot, caps: Caps) -> Decision | Refusal:
            return self._choose(snapshot, request, caps)

        return Undertaking(
            request.id,
            f"allocation for {name}",
            self._conductor.place_decision(request.deadline_s),
            decide,
            grants=True,
            lease_s=request.lease_s,
            deadline_s=request.deadline_s,
            prelude=self._prelude(request) if request.devices and self._cards.views() else None,
            body={"asked": request.to_json(), "name": name},
        )

    def _prelude(self, request: Request) -> SlicePrelude:
        return SlicePrelude(
            request, self._cards, self._observatory, self._ledger, self._clock, self._idle_slices
        )

    def preview(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """The decision and the exact steps, nothing changed.

        Raises:
            RefusedError, InvalidValueError
        """
        request = self._request(caller, guest, wants)
        self._observatory.refresh([request.guest])
        answer = self._conductor.consider(self._undertaking(request, self.find(guest).name))
        if isinstance(answer, Refusal):
            raise RefusedError(answer)
        snapshot, decision, plan = answer
        assert decision is not None
        return plan_view(snapshot, decision, plan)

    def start(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """Start an allocation job; a repeated key answers with the first one.

        Raises:
            RefusedError, InvalidValueError
        """
        request = self._request(caller, guest, wants)
        key = (caller.uid, request.key)
        if request.key and key in self._by_key:
            return self._by_key[key]
        name = self.find(guest).name

        def run(_: Job, progress: Progress) -> Json:
            work = self._undertaking(request, name)
            try:
                outcome = self._conductor.conduct(work, progress)
            except VirtfabricError:
                if work.prelude is not None:
                    self._settle_cards_soon()  # of what a lost card could not undo
                raise
            if outcome.grant:
                body = outcome.grant.to_json() | {"name": name}
                self._notices.publish("grant.made", body)
            return self.result(request.id, outcome)

        job = self._jobs.start(f"allocation for {name}", run, uid=caller.uid)
        answer = {"job": job.id, "request": request.id}
        if request.key:
            self._by_key[key] = answer
        return answer

    def result(self, request: str, outcome: Outcome) -> Json:
        """An outcome in the documented shape of a job's result."""
        decision = outcome.decision
        guests = self._observatory.guests

        def entry(guest: Any, amounts: Any) -> Json:
            name = guests[guest].name if guest in guests else guest
            return {"guest": guest, "name": name, "amounts": amounts.to_json()}

        return {
            "request": request, "txn": outcome.txn,
            "grant": outcome.grant.id if outcome.grant else None,
            "delta": decision.delta.to_json() if decision else {},
            "paid": [entry(t.victim, t.amounts) for t in decision.takes] if decision else [],
            "returned": [entry(r.victim, r.amounts) for r in decision.returns] if decision else [],
            "residues": [
                r.to_json() | {"name": guests[r.guest].name if r.guest in guests else r.guest}
                for r in outcome.residues
            ],
            "considered": [str(c) for c in decision.considered] if decision else [],
            "decided_by": decision.by if decision else "",
            "reclaimed": [one.to_json() for one in outcome.reclaimed],
            "steps": list(outcome.steps), "took_s": round(outcome.took_s, 4),
            "agent_s": round(outcome.agent_s, 4),
        }  # fmt: skip

    # -- the end of a grant -----------------------------------------------------------------

    def release(self, grant: str, *, uid: int, by: str) -> Job:
        """Start the job that ends a grant; its loans go home.

        Raises:
            RefusedError: no such grant.
        """
        found = self._ledger.view().books.grants.get(GrantId(grant))
        if found is None:
            raise RefusedError(
                Refusal(Reason.UNKNOWN_ID, f"there is no open grant {grant!r} (virtfabric grants)")
            )
        work = self._release(found, by)

        def run(_: Job, progress: Progress) -> Json:
            outcome = self._conductor.conduct(work, progress)
            if found.id not in self._ledger.view().books.grants:
                self._notices.publish("grant.ended", found.to_json() | {"by": by})
            return self.result(work.request, outcome)

        return self._jobs.start(f"release of {grant}", run, uid=uid)

    def _release(self, grant: Grant, by: str) -> Undertaking:
        """All or nothing for a person; of a lease that is over, what comes is taken."""
        request, deadline_s = new_request(), self._deadline_s()

        def decide(snapshot: HostSnapshot, caps: Caps) -> Decision | Refusal:
            if grant.id not in snapshot.books.grants:
                # released twice at once, or its lease ended: what the guest has left is not of it
                return Refusal(Reason.UNKNOWN_ID, f"grant {grant.id} has ended meanwhile")
            decision = choose_release(snapshot, request, grant, caps=caps)
            if caps and not decision.delta:
                detail = "it gave nothing of it"
                return Refusal(Reason.GUEST_UNCOOPERATIVE, detail)
            return decision

        return Undertaking(
            request,
            f"release of {grant.id}",
            self._conductor.place_decision(deadline_s),
            decide,
            ends=grant,
            deadline_s=deadline_s * 2,
            yields=by == LEASE,
            body={"grant": grant.id, "guest": grant.guest, "by": by},
        )
