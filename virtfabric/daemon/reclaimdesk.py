"""The memory of a CXL node called home from all guests that have it: one plan a guest, one report.

Each guest gives in a transaction of its own, so that what one gave stays given whatever the next
one does. `policy.homecall` says who is asked for what, and is asked again after each of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.intake import MAX_DEADLINE_S, parse_flag
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.model.amounts import CXL_KEY, Amounts, Tier
from virtfabric.model.decision import Decision
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    StepCancelledError,
    VirtfabricError,
)
from virtfabric.model.reclaim import Claim, Recall, Yield
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import Bytes
from virtfabric.model.want import Mode, Want, parse_duration
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.homecall import plan_homecall, size_on, waiting_for
from virtfabric.policy.standing import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.hostwatch import HostWatch
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.reclaimer import Reclaimer
    from virtfabric.daemon.undertaking import Caps, Outcome
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.reclaim import MemoryReport
    from virtfabric.policy.homecall import Homecall
    from virtfabric.ports import AuditLog

    Json = dict[str, Any]

WORDS: Final = ("node", "size", "detach", "deadline")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Call:
    """One call under way.

    Attributes:
        left: bytes of the claim that have not come yet.
        freed, asked, why: by guest.
        stuck: as `Recall.stuck`.
        given_up: guests that are not asked again.
        tried: empty devices that were asked to leave.
        kept: sentences about those that did not leave.
        gone: devices that left, by guest and alias.
    """

    request: RequestId
    claim: Claim
    left: int
    names: dict[GuestId, str] = field(default_factory=dict)
    asked: dict[GuestId, int] = field(default_factory=dict)
    freed: dict[GuestId, int] = field(default_factory=dict)
    why: dict[GuestId, str] = field(default_factory=dict)
    stuck: dict[tuple[GuestId, str], int] = field(default_factory=dict)
    given_up: set[GuestId] = field(default_factory=set)
    tried: set[tuple[GuestId, str]] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)
    gone: list[tuple[GuestId, str]] = field(default_factory=list)

    @property
    def recall(self) -> Recall:
        """For plans."""
        assert self.claim.node is not None
        return Recall(frozenset({self.claim.node}), self.claim.detach, dict(self.stuck))

    def yields(self) -> list[Yield]:
        """What came of each guest that was asked."""
        return [
            Yield(guest, self.names[guest], CXL_KEY, asked, self.freed.get(guest, 0),
                  self.why.get(guest, ""))
            for guest, asked in self.asked.items()
        ]  # fmt: skip


class ReclaimDesk:
    """Starts the jobs, and shows what they would do."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        conductor: Conductor,
        jobs: Jobs,
        hostwatch: HostWatch,
        reclaimer: Reclaimer,
        audit: AuditLog,
        deadline_s: Callable[[], float],
    ) -> None:
        self._observatory = observatory
        self._conductor = conductor
        self._jobs = jobs
        self._hostwatch = hostwatch
        self._reclaimer = reclaimer
        self._audit = audit
        self._deadline_s = deadline_s

    def preview(self, wants: Mapping[str, str]) -> Json:
        """Who would be asked for what; nothing changed.

        Raises:
            RefusedError, InvalidValueError
        """
        call = self._open(wants)
        home = self._look(call)
        names = {uuid: state.name for uuid, state in self._observatory.guests.items()}
        return home.plan.to_json() | {
            "empty": [{"name": names[guest], "alias": alias} for guest, alias in home.empty],
            "others": list(home.others),
        }

    def start(self, wants: Mapping[str, str], *, uid: int, by: str) -> Job:
        """Start the job. Nothing is granted of the node meanwhile.

        Raises:
            RefusedError, InvalidValueError: nothing was begun.
        """
        call = self._open(wants)
        node = call.claim.node
        assert node is not None
        title = f"memory of node {node} called home"

        def run(_: Job, progress: Progress) -> Json:
            try:
                with self._hostwatch.withhold([node], "it is being called home"):
                    others = self._carry_out(call, progress)
            except StepCancelledError:
                self._report(call, by, title, ("cancelled; what came home until then stays",))
                raise
            return self._report(call, by, title, others)

        return self._jobs.start(title, run, uid=uid)

    def _open(self, wants: Mapping[str, str]) -> _Call:
        claim = parse_claim(wants, default_deadline_s=self._deadline_s())
        node = claim.node
        assert node is not None
        topology = self._observatory.topology
        if node not in topology.cxl_nodes:
            known = ", ".join(map(str, sorted(topology.cxl_nodes))) or "none"
            what = "is of DRAM" if node in topology.nodes else "is not there"
            detail = f"node: {node} {what}; the CXL nodes of the host are: {known}"
            raise RefusedError(Refusal(Reason.UNKNOWN_TIER, detail))
        self._observatory.refresh_all()
        size = claim.size or size_on(self._observatory.snapshot(), node)
        return _Call(new_request(), replace(claim, size=size), size)

    def _look(self, call: _Call) -> Homecall:
        """Who is asked now, for what is left."""
        snapshot = replace(self._observatory.snapshot(), recall=call.recall)
        claim = replace(call.claim, size=call.left)
        reports: dict[GuestId, MemoryReport | None] = {}
        while True:
            home = plan_homecall(snapshot, claim, reports, given_up=call.given_up, freed=call.freed)
            asked = {part.guest for part in home.plan.parts} - reports.keys()
            if not asked:
                return home
            reports |= self._reclaimer.read(sorted(asked))

    def _carry_out(self, call: _Call, progress: Progress) -> tuple[str, ...]:
        """Guest after guest; why the rest cannot be asked."""
        while True:
            home = self._look(call)
            waiting = [part.guest for part in home.plan.parts]
            waiting += [guest for guest, alias in home.empty if (guest, alias) not in call.tried]
            if not waiting:
                return (*home.others, *home.plan.notes)
            self._ask(call, home, waiting[0], progress)

    def _ask(self, call: _Call, home: Homecall, guest: GuestId, progress: Progress) -> None:
        before = self._observatory.guest(guest)
        assert before is not None
        gift = home.plan.gift(guest)
        call.names[guest] = before.name
        aliases = {part.alias for part in home.plan.parts if part.guest == guest}
        call.tried |= {one for one in home.empty if one[0] == guest}
        waiting = waiting_for(before, self._observatory.snapshot()) if gift else 0
        if gift:
            call.asked[guest] = call.freed.get(guest, 0) + gift
        try:
            outcome = self._conductor.conduct(
                self._undertaking(call, guest, gift, waiting), progress
            )
        except StepCancelledError:
            raise
        except VirtfabricError as error:
            call.why[guest] = str(error)
            call.given_up.add(guest)
            return
        assert outcome.decision is not None
        freed = max(0, -outcome.decision.delta[CXL_KEY] - waiting)
        self._note(call, before, (gift, freed), aliases, outcome)

    def _note(
        self,
        call: _Call,
        before: GuestState,
        came: tuple[int, int],
        aliases: set[str],
        outcome: Outcome,
    ) -> None:
        """`came`: what it was asked for, and what it gave."""
        guest, (gift, freed) = before.uuid, came
        call.freed[guest] = call.freed.get(guest, 0) + freed
        call.left -= freed
        for one in outcome.reclaimed:
            call.why[guest] = one.why
        now = self._observatory.guest(guest)
        devices = {d.alias: int(d.requested) for d in now.virtio_mem} if now else {}
        call.gone += [(guest, d.alias) for d in before.virtio_mem if d.alias not in devices]
        call.tried |= {(guest, alias) for alias in devices}
        call.kept += outcome.skipped
        if freed < gift:
            call.stuck |= {(guest, alias): devices.get(alias, 0) for alias in aliases}
            if not freed:
                call.given_up.add(guest)

    def _undertaking(self, call: _Call, guest: GuestId, gift: int, waiting: int) -> Undertaking:
        def decide(snapshot: HostSnapshot, caps: Caps) -> Decision | Refusal:
            state = snapshot.guests[guest]
            granule = line_of(state, CXL_KEY, snapshot).granule
            most = min(gift, caps[guest][CXL_KEY]) if guest in caps else gift
            if most < granule:
                return Decision(call.request, guest, snapshot.generation, Amounts())
            want = Want(Mode.BY, -(most // granule * granule) - waiting)
            request = Request(
                call.request, guest, AGENT, Origin.AGENT, memory=want, tier=Tier.CXL
            )  # fmt: skip
            return choose_allocation(snapshot, request)

        node, name = call.claim.node, call.names[guest]
        return Undertaking(
            call.request,
            f"memory of node {node} called home from {name}",
            self._conductor.place_decision(call.claim.deadline_s),
            decide,
            deadline_s=call.claim.deadline_s,
            recall=call.recall,
            yields=True,
            body={"node": node, "name": name, "asked": gift},
        )

    def _report(self, call: _Call, by: str, title: str, others: tuple[str, ...]) -> Json:
        claim = call.claim
        yields = call.yields()
        freed = sum(one.freed for one in yields)
        result = {
            "request": call.request, "node": claim.node, "asked": claim.size, "freed": freed,
            "out": max(0, claim.size - freed),
            "guests": [
                one.to_json() | {"text": str(one)} for one in yields
            ],
            "detached": [{"name": call.names[g], "alias": alias} for g, alias in call.gone],
            "kept": call.kept, "others": list(others),
        }  # fmt: skip
        subjects = [call.request, *call.names]
        self._audit.append("memory.called-home", subjects, result | {"title": title, "by": by})
        return result


def parse_claim(wants: Mapping[str, str], *, default_deadline_s: float) -> Claim:
    """The words of a call; size 0 is for all that guests have of the node.

    Raises:
        InvalidValueError: names the word and its value.
    """
    for name in wants:
        if name not in WORDS:
            raise InvalidValueError(name, wants[name], f"is not known; known: {', '.join(WORDS)}")
    text = wants.get("node", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 5):
        raise InvalidValueError("node", text, "is not a number of a NUMA node")
    size = int(Bytes.parse(wants["size"], field="size")) if "size" in wants else 0
    if "size" in wants and size <= 0:
        raise InvalidValueError("size", wants["size"], "asks for nothing")
    deadline = default_deadline_s
    if "deadline" in wants:
        deadline = parse_duration(wants["deadline"], field="deadline")
        if deadline > MAX_DEADLINE_S:
            raise InvalidValueError("deadline", wants["deadline"], "is above 10 minutes")
    detach = parse_flag(wants.get("detach", "no"), field="detach")
    return Claim(CXL_KEY, size, int(text), deadline, detach)
