"""Reclaim: how memory that is wanted back comes home, from whom and by which device.

The arbiter says who may be asked and in which order; this says how much each can really give. A
victim is asked for what it tells that it can spare, before any is pressed for more; one that tells
nothing is asked for all above its floor. By which device: virtio-mem, in whole blocks; a balloon
where a guest has nothing else. It takes no memory itself and reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from virtfabric.model.amounts import CPU_KEY, MEMORY_KEYS, Amounts, Key
from virtfabric.model.decision import Verdict
from virtfabric.model.policy import Escalation, GuestPolicy
from virtfabric.model.reclaim import Push, ReclaimPart, ReclaimPlan, Yield
from virtfabric.model.units import MIB, Bytes
from virtfabric.policy.sources import sources_of
from virtfabric.policy.standing import held_of, line_of
from virtfabric.policy.tiers import node_rooms, part_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from virtfabric.model.decision import Decision
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.memorysteps import AttachDimm, AttachMemory
    from virtfabric.model.plan import ResizeVirtioMem, SetBalloon
    from virtfabric.model.reclaim import Claim, MemoryReport
    from virtfabric.policy.sources import Source

    Reports = Mapping[GuestId, MemoryReport | None]
    Names = Mapping[GuestId, str]
    Stopped = Mapping[tuple[GuestId, Key], tuple[int, str]]

UNLIMITED: Final = 1 << 60
"""Of anything: more than a host has."""
MARGIN: Final = 32 * MIB
"""Bytes of what a guest tells as usable that are left to it: the telling is some seconds old."""
LEAST_WAIT_S: Final = 3.0
"""Shortest time for one device: QEMU tells of a size once a second at most."""

_S = TypeVar("_S", bound="ResizeVirtioMem | SetBalloon | AttachMemory | AttachDimm")


# -- victims ------------------------------------------------------------------------------------


class Victim(NamedTuple):
    """A guest that may be asked, as far as one kind of memory goes.

    Attributes:
        most: bytes above its floor in all, those of `given` included.
        given: what of these it does not have any more: it gave before, or lost them.
        spare: what it can do without; None where it tells nothing.
        granule: whole ones are asked for.
        told: what it told, in words.
    """

    guest: GuestId
    name: str
    most: int
    given: int
    spare: int | None
    presses: bool
    granule: int
    sources: tuple[Source, ...]
    told: str


def victim_of(
    state: GuestState,
    key: Key,
    snapshot: HostSnapshot,
    report: MemoryReport | None,
    *,
    asked: bool = True,
    most: int = UNLIMITED,
    node: int | None = None,
    spent: int = 0,
) -> Victim:
    """One guest.

    Args:
        state: of a running, managed guest.
        key: the kind of memory.
        snapshot: the host.
        report: what it told; None for nothing, or nothing lately.
        asked: whether it was asked at all; until then it may be able to spare anything.
        most: what may be taken of it, above what its floor allows.
        node: devices with memory of this one only.
        spent: what it is asked for already of another kind, or gave since: what it told is of
            all together.
    """
    policy = (state.policy or GuestPolicy()).memory
    line = line_of(state, key, snapshot)
    part = part_of(state, key, snapshot.topology.cxl_nodes)
    sources = [
        source
        for source in sources_of(state, key, snapshot, node_rooms(snapshot))
        if node is None or node in source.nodes
    ]
    # by what is requested: what a guest has beyond that is a residue, which the books count
    has = int(part.boot) + sum(int(device.requested) for device in part.devices)
    has = has if part.devices else int(part.current)
    given = 0 if node is not None else max(0, held_of(snapshot, state.uuid)[key] - has)
    presses = policy.escalate is Escalation.PRESS
    spare, told = None, "tells nothing of its memory"
    if report is not None:
        spare = max(0, report.usable - MARGIN - spent)
        told = f"tells that {Bytes(report.usable)} are usable"
    elif asked and not presses:
        spare = 0
    return Victim(
        state.uuid, state.name, max(0, min(line.slack, most)), given, spare, presses,
        line.granule, tuple(sources), told,
    )  # fmt: skip


# -- the plan -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """What one victim is asked for so far."""

    victim: Victim
    taken: int = 0
    given: int = 0
    used: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[Source, int, Push]] = field(default_factory=list)

    def limit(self, push: Push) -> int:
        """The most that it may be asked for in all, in whole granules."""
        one = self.victim
        most = one.most
        if push is Push.SPARE and one.spare is not None:
            # what it told may be of before it gave: nothing is counted twice
            most = min(most, max(one.given, one.spare))
        elif push is Push.PRESSED and not one.presses:
            most = self.taken
        return most // one.granule * one.granule

    def take(self, need: int, push: Push) -> int:
        """Ask it for `need` bytes more; how many come of that."""
        granule = self.victim.granule
        goal = max(0, min(self.limit(push) - self.taken, -(-need // granule) * granule))
        before = self.taken
        given = min(goal, self.victim.given - self.given)
        self.given += given
        self.taken += given
        goal -= given
        for source in self.victim.sources:
            part = min(goal, source.room - self.used.get(source.alias, 0))
            part = part // source.block * source.block
            if part > 0:
                self.used[source.alias] = self.used.get(source.alias, 0) + part
                self.asked.append((source, part, push))
                self.taken += part
                goal -= part
        return self.taken - before


def plan_reclaim(claim: Claim, victims: Sequence[Victim]) -> ReclaimPlan:
    """Who gives how much, by which device.

    Everybody is asked for what can be spared before anybody is pressed; in each round the earlier
    victim gives all that it can before the next one is asked.

    Args:
        claim: what is wanted.
        victims: in the arbiter's order.
    """
    drafts = [_Draft(victim) for victim in victims]
    need = claim.size
    for push in Push:
        for draft in drafts:
            if need > 0:
                need -= draft.take(need, push)
    parts = [part for draft in drafts for part in _parts_of(claim, draft)]
    notes = [note for draft in drafts if (note := _note(claim, draft, short=need > 0))]
    given = {d.victim.guest: d.given for d in drafts if d.given}
    return ReclaimPlan(claim, tuple(parts), given, tuple(notes))


def _parts_of(claim: Claim, draft: _Draft) -> Iterable[ReclaimPart]:
    """Its time is shared among its devices; one that is empty in the end may leave the guest."""
    times = dict(zip(draft.used, _share([*draft.used.values()], claim.deadline_s), strict=True))
    last = {source.alias: index for index, (source, _, _) in enumerate(draft.asked)}
    for index, (source, size, push) in enumerate(draft.asked):
        empty = draft.used[source.alias] == source.has and last[source.alias] == index
        called = claim.detach and claim.node is not None and claim.node in source.nodes
        yield ReclaimPart(
            draft.victim.guest, draft.victim.name, source.mechanism, source.alias,
            min(source.nodes, default=None), size, push, times[source.alias],
            detach=empty and called,
        )  # fmt: skip


def _note(claim: Claim, draft: _Draft, *, short: bool) -> str:
    """Why a victim is asked for less than the arbiter would let it pay."""
    victim, words = draft.victim, claim.key.words
    if not victim.sources and not victim.given:
        return f"{victim.name}: {words}: nothing of it can give any"
    kept = victim.most - draft.taken
    held_back = draft.limit(Push.SPARE) < victim.most and (short or draft.taken < victim.most)
    if kept <= 0 or not held_back:
        return ""
    end = "" if victim.presses else ", and its policy says escalate='no'"
    return f"{victim.name}: {words}: keeps {Bytes(kept)} above its floor: {victim.told}{end}"


# -- time ---------------------------------------------------------------------------------------


def _share(sizes: Sequence[int], whole_s: float) -> list[float]:
    total = sum(sizes)
    least = min(LEAST_WAIT_S, whole_s)
    return [max(least, whole_s * size / total) for size in sizes]


def share_time(steps: Sequence[_S], whole_s: float) -> list[_S]:
    """The steps by which one guest gives memory, with its time shared among them by size."""
    times = _share([step.before - step.after for step in steps], whole_s)
    return [replace(s, deadline_s=t) for s, t in zip(steps, times, strict=True)]


# -- with the arbiter ---------------------------------------------------------------------------


def payers_of(decision: Decision, key: Key) -> dict[GuestId, int]:
    """Who could pay memory of one kind by the arbiter, in its order, and how much at most."""
    return {
        one.guest: one.held - one.floor
        for one in decision.considered
        if one.key == key and one.verdict in (Verdict.PAYS, Verdict.NOT_NEEDED)
    }


def plan_payment(
    snapshot: HostSnapshot,
    decision: Decision,
    reports: Reports,
    caps: Mapping[GuestId, Amounts],
    claims: Collection[Claim],
) -> tuple[ReclaimPlan, ...]:
    """How the memory comes home that victims pay by a decision: one plan for each claim."""
    plans: list[ReclaimPlan] = []
    for claim in claims:
        victims = []
        for guest, most in payers_of(decision, claim.key).items():
            state = snapshot.guests.get(guest)
            if state is None:
                continue
            cap = caps[guest][claim.key] if guest in caps else UNLIMITED
            spent = sum(plan.gift(guest) - plan.given.get(guest, 0) for plan in plans)
            victims.append(
                victim_of(
                    state, claim.key, snapshot, reports.get(guest), asked=guest in reports,
                    most=min(most, cap), spent=spent,
                )
            )  # fmt: skip
        plans.append(plan_reclaim(claim, victims))
    return tuple(plans)


def memory_paid(decision: Decision) -> dict[Key, int]:
    """Bytes that victims pay by a decision, by kind of memory."""
    keys = MEMORY_KEYS.values()
    paid = {key: sum(take.amounts[key] for take in decision.takes) for key in keys}
    return {key: size for key, size in paid.items() if size}


def limits_of(
    decision: Decision, plans: Iterable[ReclaimPlan], caps: Mapping[GuestId, Amounts]
) -> dict[GuestId, Amounts]:
    """The most that each victim is to pay, as `arbiter.choose_allocation` takes it.

    Who comes after the last one that pays has no such bound, unless all is not enough.
    """
    keys = {one.key for one in decision.considered} | {CPU_KEY, *MEMORY_KEYS.values()}
    limits = dict(caps)
    for plan in plans:
        key = plan.claim.key
        payers = [*payers_of(decision, key)]
        last = max((n for n, guest in enumerate(payers) if plan.gift(guest)), default=-1)
        for guest in payers if plan.short else payers[: last + 1]:
            old = limits.get(guest, Amounts(dict.fromkeys(keys, UNLIMITED)))
            limits[guest] = old.with_value(key, min(old[key], plan.gift(guest)))
    return limits


# -- what came of it ----------------------------------------------------------------------------


def sum_up(decision: Decision, stopped: Stopped, names: Names) -> tuple[Yield, ...]:
    """What each victim was asked for, what came, what is still out and why.

    Args:
        decision: the last one: what was taken in the end.
        stopped: victims that stopped short, with the bytes that they had been asked for, and why.
        names: of guests.
    """
    freed = {
        (take.victim, key): take.amounts[key]
        for take in decision.takes
        for key in MEMORY_KEYS.values()
        if take.amounts[key]
    }
    freed |= {who: -decision.delta[who[1]] for who in stopped if who[0] == decision.guest}
    told = []
    for who in dict.fromkeys((*freed, *stopped)):
        guest, key = who
        came = freed.get(who, 0)
        asked, why = stopped.get(who, (came, ""))
        told.append(Yield(guest, names.get(guest, guest), key, max(asked, came), came, why))
    return tuple(told)
