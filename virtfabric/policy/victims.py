"""Who pays when free capacity does not reach: the survey of all guests and the order of the drain.

Owns the order (lowest priority; most held above the floor per share; UUID) and the reason why each
guest pays or does not. It must not decide how much is needed (arbiter).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import CPU, CXL_KEY, MEMORY, MEMORY_KEY, Amounts, Key, format_amount
from virtfabric.model.decision import Consideration, Take, Verdict
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.policy.deviceterms import wish_of
from virtfabric.policy.standing import (
    Tally,
    cpu_bounds,
    far_bounds,
    held_of,
    line_of,
    memory_bounds,
)
from virtfabric.policy.stock import Stock
from virtfabric.policy.tiers import part_of
from virtfabric.policy.tierterms import grows_by_dimm, reachable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot

_PRESSURE_BITS: Final = 64
"""Fractions a/b and c/d differ by at least 1/bd; with shares below 2^32 the scaled integers are
in the exact order of the fractions, and far cheaper to compare than `Fraction`."""

# Names for the inner loops: looking a member up on its enum costs as much as the comparison.
_UNMANAGED: Final = Verdict.UNMANAGED
_PRIORITY: Final = Verdict.PRIORITY
_AT_FLOOR: Final = Verdict.AT_FLOOR
_BUSY: Final = Verdict.BUSY
_PAYS: Final = Verdict.PAYS
_NOT_NEEDED: Final = Verdict.NOT_NEEDED
_VIRTIO_MEM: Final = MemoryMechanism.VIRTIO_MEM
_BALLOON: Final = MemoryMechanism.BALLOON
_RUNNING: Final = RunState.RUNNING


class Candidate(NamedTuple):
    """A guest that may pay; the tuple's order is the order of the drain."""

    priority: int
    pressure: int
    uuid: GuestId
    name: str
    held: int
    floor: int
    granule: int
    give: int


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
        for priority, _, uuid, name, held, floor, granule, give in self.candidates:
            gift, verdict = 0, _NOT_NEEDED
            if need > 0:
                gift, verdict = min(give, -(-need // granule) * granule), _PAYS
                need -= gift
                gifts.append((uuid, gift))
            considered.append(
                Consideration(uuid, name, self.key, verdict, priority, held, floor, gift)
            )
        return gifts, considered + self.others

    def lines(self) -> tuple[str, ...]:
        """One line for each guest, when all of it was not enough."""
        key = self.key
        could = (
            f"{c.name} (priority {c.priority}, holds {format_amount(key, c.held)}, floor "
            f"{format_amount(key, c.floor)}): {key.words}: could pay {format_amount(key, c.give)}, "
            "not enough"
            for c in self.candidates
        )
        return (*could, *(str(other) for other in self.others))


def survey(
    snapshot: HostSnapshot,
    counted: Tally,
    borrower: GuestState,
    key: Key,
    caps: Mapping[GuestId, Amounts],
) -> Survey:
    """Look at every guest but the borrower that runs or holds something.

    Args:
        snapshot: the host.
        counted: all its guests.
        borrower: only strictly lower priorities than its own pay.
        key: the contended resource.
        caps: as for `arbiter.choose_allocation`.
    """
    if key.resource not in (CPU, MEMORY):
        return _survey_functions(snapshot, counted, borrower, key, caps)
    highest = borrower.policy.priority if borrower.policy else 0
    lends, is_memory = snapshot.lend_ballooned, key.resource == MEMORY
    bounds = _bounds_by(key, snapshot)
    candidates: list[Candidate] = []
    others: list[Consideration] = []
    for guest, held in zip(counted.guests, counted.held[key], strict=True):
        uuid, policy = guest.uuid, guest.policy
        if uuid == borrower.uuid:
            continue
        floor, _, granule = bounds(guest)
        verdict, priority = _exclusion(guest, highest, counted.engaged)
        give = 0
        if verdict is None:
            verdict = _withheld(guest, lends=lends) if is_memory else None
            give = (held - floor) // granule * granule if verdict is None else 0
        if give > 0 and uuid in caps:
            give, verdict = min(give, caps[uuid][key] // granule * granule), Verdict.GIVES_NO_MORE
        if give > 0 and policy is not None:
            shares = (policy.memory if is_memory else policy.cpu).shares
            pressure = pressure_of(held - floor, shares)
            candidates.append(
                Candidate(priority, pressure, uuid, guest.name, held, floor, granule, give)
            )
        else:
            why = verdict or _AT_FLOOR
            others.append(Consideration(uuid, guest.name, key, why, priority, held, floor, 0))
    candidates.sort()
    return Survey(key, candidates, others)


def pressure_of(above: int, shares: int) -> int:
    """What orders guests of one priority: most held above the floor for each share goes first."""
    return -((above << _PRESSURE_BITS) // (shares or 1))


def _bounds_by(key: Key, snapshot: HostSnapshot) -> Callable[[GuestState], tuple[int, int, int]]:
    """What says floor, ceiling and granule of a guest, for one coordinate."""
    cxl, lends = snapshot.topology.cxl_nodes, snapshot.lend_ballooned
    if key.resource == CPU:
        return cpu_bounds
    if key == CXL_KEY:
        return lambda guest: far_bounds(guest, part_of(guest, CXL_KEY, cxl))
    return lambda guest: memory_bounds(guest, part_of(guest, MEMORY_KEY, cxl), lends=lends)


def _survey_functions(
    snapshot: HostSnapshot,
    counted: Tally,
    borrower: GuestState,
    key: Key,
    caps: Mapping[GuestId, Amounts],
) -> Survey:
    """As `survey`: taking a function is disruptive, so only where the victim's policy allows it."""
    highest = borrower.policy.priority if borrower.policy else 0
    stock = Stock(snapshot)
    candidates: list[Candidate] = []
    others: list[Consideration] = []
    for guest in counted.guests:
        uuid, line = guest.uuid, line_of(guest, key, snapshot)
        if uuid == borrower.uuid:
            continue
        verdict, priority = _exclusion(guest, highest, counted.engaged)
        give = 0
        if verdict is None and line.held:
            give, verdict = _detachable(stock, guest, key)
            give = min(give, line.slack, caps[uuid][key] if uuid in caps else give)
        if give > 0:
            held, floor = line.held, line.floor
            candidates.append(
                Candidate(priority, floor - held, uuid, guest.name, held, floor, 1, give)
            )
        else:
            others.append(
                Consideration(
                    uuid, guest.name, key, verdict or _AT_FLOOR, priority, line.held, line.floor, 0
                )
            )
    candidates.sort()
    return Survey(key, candidates, others)


def _detachable(stock: Stock, guest: GuestState, key: Key) -> tuple[int, Verdict | None]:
    """How many functions it may be asked for; why none can be had."""
    wish = wish_of(guest, key)
    if wish is None or not wish.reclaimable:
        return 0, Verdict.NO_MECHANISM
    if guest.state is not _RUNNING:
        return 0, _BUSY
    count = stock.detachable(guest.uuid, key)
    return count, None if count else Verdict.NO_MECHANISM


def _exclusion(
    guest: GuestState, highest: int, engaged: Container[GuestId]
) -> tuple[Verdict | None, int]:
    """Why a guest is not asked at all, None when it may be; and its priority."""
    policy = guest.policy
    if policy is None:
        return _UNMANAGED, 0
    if policy.priority >= highest:
        return _PRIORITY, policy.priority
    return (_BUSY if guest.uuid in engaged else None), policy.priority


def _withheld(guest: GuestState, *, lends: bool) -> Verdict | None:
    """Why its memory cannot be had; None when it can."""
    if guest.mechanism is not _VIRTIO_MEM and not (lends and guest.mechanism is _BALLOON):
        return Verdict.NO_MECHANISM
    if guest.on_huge_pages:
        return Verdict.NO_MECHANISM  # what it gives goes to their pool, and is no good to others
    # Only a guest that runs can let go of memory; a paused one still loses CPU by its quota.
    return None if guest.state is _RUNNING else _BUSY


@dataclass(slots=True)
class Market:
    """What one borrower can have: free capacity, then what others pay.

    Attributes:
        counted: all guests; what is free may be below zero, nothing is granted from that then.
        gifts: what each victim gives, in the order of the drain.
        considered: of every resource that free capacity did not cover.
    """

    snapshot: HostSnapshot
    borrower: GuestState
    caps: Mapping[GuestId, Amounts]
    counted: Tally
    gifts: dict[GuestId, dict[Key, int]] = field(default_factory=dict)
    considered: list[Consideration] = field(default_factory=list)
    _surveys: dict[Key, Survey] = field(default_factory=dict)
    _stock: Stock | None = None

    @property
    def stock(self) -> Stock:
        """The functions that nobody holds."""
        if self._stock is None:
            self._stock = Stock(self.snapshot)
        return self._stock

    def free_of(self, key: Key) -> int:
        """What free capacity has of it for this borrower, at least 0."""
        free = self.counted.free[key]
        if key == CXL_KEY and free > 0 and self.counted.without is None:
            free = min(free, reachable(self.borrower, self.snapshot))
        if free > 0 and key.resource not in (CPU, MEMORY):
            own = self.counted.without == self.borrower.uuid
            held = held_of(self.snapshot, self.borrower.uuid)[key] if own else 0
            free = min(free, held + len(self.stock.open_to(self.borrower.uuid, key)))
        return max(0, free)

    def survey(self, key: Key) -> Survey:
        """Every other guest, looked at once."""
        if key == CXL_KEY and grows_by_dimm(self.borrower):
            return Survey(key, [], [])  # it could never give the loan back
        if key not in self._surveys:
            self._surveys[key] = survey(self.snapshot, self.counted, self.borrower, key, self.caps)
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
