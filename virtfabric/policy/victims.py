"""Who pays when free capacity does not reach: the survey of all guests and the order of the drain.

Owns the order (lowest priority; most held above the floor per share; UUID) and the reason why each
guest pays or does not. It must not decide how much is needed (arbiter).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import MEMORY, Amounts, Key, format_amount
from virtfabric.model.decision import Consideration, Take, Verdict
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.policy.standing import Line, line_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot

_PRESSURE_BITS: Final = 64
"""Fractions a/b and c/d differ by at least 1/bd; with shares below 2^32 the scaled integers are
in the exact order of the fractions, and far cheaper to compare than `Fraction`."""


class Candidate(NamedTuple):
    """A guest that may pay; the tuple's order is the order of the drain."""

    priority: int
    pressure: int
    uuid: GuestId
    name: str
    line: Line
    give: int

    def consider(self, key: Key, verdict: Verdict, pays: int = 0) -> Consideration:
        """Its entry in the decision."""
        line = self.line
        return Consideration(
            self.uuid, self.name, key, verdict, self.priority, line.held, line.floor, pays
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """Every other guest, for one contended resource.

    Attributes:
        candidates: who may pay, in the order of the drain.
        others: who does not, by UUID.
    """

    key: Key
    candidates: list[Candidate]
    others: list[Consideration]

    @property
    def reclaimable(self) -> int:
        """All that the candidates could give."""
        return sum(candidate.give for candidate in self.candidates)

    def drain(self, need: int) -> tuple[list[tuple[GuestId, int]], list[Consideration]]:
        """Take `need` from the candidates, each to its floor before the next.

        Returns:
            What each victim gives (whole granules, so the last one may give more than is needed),
            and one consideration for each guest.
        """
        gifts: list[tuple[GuestId, int]] = []
        considered: list[Consideration] = []
        for candidate in self.candidates:
            granule = candidate.line.granule
            gift = min(candidate.give, -(-need // granule) * granule) if need > 0 else 0
            need -= gift
            if gift:
                gifts.append((candidate.uuid, gift))
            verdict = Verdict.PAYS if gift else Verdict.NOT_NEEDED
            considered.append(candidate.consider(self.key, verdict, gift))
        return gifts, considered + self.others

    def lines(self) -> tuple[str, ...]:
        """One line for each guest, when all of it was not enough."""
        could = (
            f"{c.consider(self.key, Verdict.NOT_NEEDED)}, not enough: could pay "
            f"{format_amount(self.key, c.give)}"
            for c in self.candidates
        )
        return (*could, *(str(other) for other in self.others))


def survey(
    snapshot: HostSnapshot, borrower: GuestState, key: Key, caps: Mapping[GuestId, Amounts]
) -> Survey:
    """Look at every guest but the borrower that runs or holds something."""
    priority = borrower.policy.priority if borrower.policy else 0
    holdings = snapshot.books.holdings
    candidates: list[Candidate] = []
    others: list[Consideration] = []
    for uuid in sorted(snapshot.guests):
        guest = snapshot.guests[uuid]
        if uuid == borrower.uuid or not (guest.active or uuid in holdings):
            continue
        line = line_of(guest, key, snapshot)
        verdict = _exclusion(snapshot, guest, priority, key)
        own = guest.policy.priority if guest.policy else 0
        give = line.slack
        if verdict is None and give <= 0:
            verdict = Verdict.AT_FLOOR
        if verdict is None and uuid in caps:
            give = min(give, caps[uuid][key] // line.granule * line.granule)
            verdict = Verdict.NO_MECHANISM if give <= 0 else None
        if verdict is None:
            pressure = -(((line.held - line.floor) << _PRESSURE_BITS) // max(1, line.shares))
            candidates.append(Candidate(own, pressure, uuid, guest.name, line, give))
        else:
            others.append(Consideration(uuid, guest.name, key, verdict, own, line.held, line.floor))
    candidates.sort()
    return Survey(key, candidates, others)


def _exclusion(
    snapshot: HostSnapshot, guest: GuestState, priority: int, key: Key
) -> Verdict | None:
    """Why a guest is not asked at all; None when it may be."""
    if guest.policy is None:
        return Verdict.UNMANAGED
    if guest.policy.priority >= priority:
        return Verdict.PRIORITY
    if _is_busy(snapshot, guest):
        return Verdict.BUSY
    if key.resource != MEMORY:
        return None
    lends = guest.mechanism is MemoryMechanism.VIRTIO_MEM or (
        guest.mechanism is MemoryMechanism.BALLOON and snapshot.lend_ballooned
    )
    if not lends:
        return Verdict.NO_MECHANISM
    # Only a guest that runs can let go of memory; a paused one still loses CPU by its quota.
    return None if guest.state is RunState.RUNNING else Verdict.BUSY


def _is_busy(snapshot: HostSnapshot, guest: GuestState) -> bool:
    return (
        guest.uuid in snapshot.busy
        or guest.job is not None
        or not guest.active
        or guest.uuid not in snapshot.books.holdings
    )


@dataclass(slots=True)
class Market:
    """What one borrower can have: free capacity, then what others pay.

    Attributes:
        free: may be below zero; nothing is granted from that then.
        gifts: what each victim gives, in the order of the drain.
        considered: of every resource that free capacity did not cover.
    """

    snapshot: HostSnapshot
    borrower: GuestState
    caps: Mapping[GuestId, Amounts]
    free: Amounts
    gifts: dict[GuestId, dict[Key, int]] = field(default_factory=dict)
    considered: list[Consideration] = field(default_factory=list)
    _surveys: dict[Key, Survey] = field(default_factory=dict)

    def free_of(self, key: Key) -> int:
        """What free capacity has of it, at least 0."""
        return max(0, self.free[key])

    def survey(self, key: Key) -> Survey:
        """Every other guest, looked at once."""
        if key not in self._surveys:
            self._surveys[key] = survey(self.snapshot, self.borrower, key, self.caps)
        return self._surveys[key]

    def available(self, key: Key) -> int:
        """The most that can be had."""
        return self.free_of(key) + self.survey(key).reclaimable

    def buy(self, key: Key, cost: int) -> int:
        """Take `cost`, which is available; returns what free capacity pays of it."""
        from_free = min(cost, self.free_of(key))
        if cost > from_free or key in self._surveys:
            gifts, considered = self.survey(key).drain(cost - from_free)
            self.considered += considered
            for victim, gift in gifts:
                self.gifts.setdefault(victim, {})[key] = gift
        return from_free

    def takes(self) -> tuple[Take, ...]:
        """What was taken, one entry per victim."""
        return tuple(Take(victim, Amounts(gift)) for victim, gift in self.gifts.items())

    def lines(self, keys: Iterable[Key]) -> tuple[str, ...]:
        """One line for each guest and each of these resources, for a refusal."""
        return tuple(line for key in keys for line in self.survey(key).lines())
