"""How much each guest gets, and who pays. It must not choose pCPUs or nodes (placement).

Free capacity first, then reclaim from strictly lower priorities in the order of `victims`, never
below a floor, all or nothing. What was reclaimed is a loan and goes home as `loans` says. Telemetry
plays no part: the same books give the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import MEMORY, Amounts, Key, format_amount
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.request import Mode
from virtfabric.policy.loans import Homecoming, consume, newest_first, repay_parts
from virtfabric.policy.standing import (
    CPU_KEY,
    MEMORY_KEY,
    WHOLE_CPU,
    Line,
    charge_of,
    free,
    held_of,
    line_of,
    tally,
)
from virtfabric.policy.victims import Market

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import Grant, HostSnapshot
    from virtfabric.model.request import Request, Want

    Caps = Mapping[GuestId, Amounts]


class _Change(NamedTuple):
    """What one resource of a request comes to: as asked for, and in whole granules."""

    key: Key
    line: Line
    asked: int
    amount: int

    @property
    def cost(self) -> int:
        """What the gain costs of capacity."""
        return 0 if self.line.prepaid else max(0, self.amount)


def choose_allocation(
    snapshot: HostSnapshot, request: Request, *, caps: Caps | None = None
) -> Decision | Refusal:
    """Grow or shrink a running guest.

    Args:
        snapshot: the host.
        request: what is wanted. Memory is rounded up to what the guest's mechanism can do, CPU of
            a dedicated guest to whole CPUs, but not past the ceiling.
        caps: the most that may be taken from a victim, in every resource (one that gave less than
            asked before); a guest that is not in it has no such bound.

    Returns:
        A decision; with an empty delta where nothing changes. A balloon guest whose memory is not
        lent is counted with all of it, so its growth takes nothing from free capacity.
    """
    guest = _check_subject(snapshot, request.guest)
    if isinstance(guest, Refusal):
        return guest
    wants = ((CPU_KEY, request.cpu), (MEMORY_KEY, request.memory))
    changes = [_change(guest, key, want, snapshot) for key, want in wants if want is not None]
    changes = [change for change in changes if change.asked != change.line.held]
    for change in changes:
        problem = _check_change(guest, change)
        if problem is not None:
            return problem
    growing = [change for change in changes if change.asked > change.line.held]
    if not growing:
        return _decide(snapshot, request.id, guest, changes, None)
    market = Market(snapshot, guest, caps or {}, tally(snapshot))
    for change in growing:
        if change.asked > change.line.ceiling:
            return _refuse(market, growing, Reason.ABOVE_LIMIT, _above_limit(guest, change), ())
    fitting = [change._replace(amount=_fit(market, change)) for change in growing]
    short = [then for now, then in zip(fitting, growing, strict=True) if now.amount < then.amount]
    if short and not (request.partial and any(change.amount for change in fitting)):
        detail = _no_capacity(market, short[0].key, short[0].cost)
        lacking = [change.key for change in short]
        return _refuse(market, growing, Reason.NO_CAPACITY, detail, lacking)
    shrinking = [change for change in changes if change.amount < 0]
    return _decide(snapshot, request.id, guest, fitting + shrinking, market)


def choose_release(snapshot: HostSnapshot, request_id: RequestId, grant: Grant) -> Decision:
    """End a grant: the borrower gives it back, as far as it is above its floor; loans go home.

    What no victim takes back becomes free. The caller waits for victims that are busy.
    """
    guest = snapshot.guests.get(grant.guest)
    given = Amounts()
    if guest is not None and guest.uuid in snapshot.books.holdings:
        given = Amounts({k: _give_back(snapshot, guest, k, v) for k, v in grant.amounts.items()})
    home = Homecoming(snapshot, _spare(snapshot, grant.guest))
    repay_parts(home, grant.guest, [(grant, given)], given)
    return _with_homecoming(snapshot, request_id, grant.guest, -given, home)


def choose_departure(snapshot: HostSnapshot, guest_id: GuestId, request_id: RequestId) -> Decision:
    """A guest stopped: all it held is free, and pays its loans first.

    `settle` with this decision removes its holding; `loans.depart` has to follow.
    """
    held = held_of(snapshot, guest_id)
    home = Homecoming(snapshot, _spare(snapshot, guest_id))
    borrowed = [n for n in snapshot.books.loans.values() if n.borrower == guest_id]
    home.repay(borrowed, held, spare=home.spare)
    return _with_homecoming(snapshot, request_id, guest_id, -held, home)


def choose_admission(
    snapshot: HostSnapshot,
    guest: GuestState,
    request_id: RequestId,
    *,
    caps: Caps | None = None,
) -> Decision | Refusal:
    """Let a guest start: its floor must fit, and the memory it boots with.

    CPU beyond the floor is given from free capacity only, up to the vCPUs that it starts with.
    Memory that it boots with is counted even where that is more than its limit.

    Args:
        snapshot: the host; the guest may be in it or not, its own charge does not count.
        guest: as its XML describes it.
        request_id: for the decision.
        caps: as for `choose_allocation`.

    Returns:
        A decision whose `from_free` includes QEMU's overhead.
    """
    if guest.policy is None:
        return Refusal(Reason.UNMANAGED_GUEST, f"{guest.name} has no valid policy")
    market = Market(snapshot, guest, caps or {}, tally(snapshot, without=guest.uuid))
    held = Amounts.of(
        cpu=_starting_cpu(market, line_of(guest, CPU_KEY, snapshot)),
        memory=_starting_memory(guest, line_of(guest, MEMORY_KEY, snapshot)),
    )
    cost = charge_of(guest, held, snapshot)
    lacking = [
        key for key, need in cost.items()
        if need > market.free_of(key) and need > market.available(key)
    ]  # fmt: skip
    if lacking:
        fit = {str(key.resource): min(cost[key], market.available(key)) for key in cost}
        detail = _no_capacity(market, lacking[0], cost[lacking[0]])
        return Refusal(Reason.NO_CAPACITY, detail, fit, market.lines(lacking))
    from_free = Amounts({key: market.buy(key, need) for key, need in cost.items()})
    before = held_of(snapshot, guest.uuid)
    return Decision(
        request_id, guest.uuid, snapshot.generation, held - before, from_free, market.takes(),
        holdings=_holdings(snapshot, {guest.uuid: held - before}, market, None),
        considered=tuple(market.considered),
    )  # fmt: skip


# -- what is wanted ---------------------------------------------------------------------------


def _check_subject(snapshot: HostSnapshot, uuid: GuestId) -> GuestState | Refusal:
    guest = snapshot.guests.get(uuid)
    if guest is None:
        return Refusal(Reason.UNKNOWN_GUEST, f"there is no guest {uuid}")
    if guest.policy is None:
        why = f": {guest.policy_error}" if guest.policy_error else ""
        return Refusal(Reason.UNMANAGED_GUEST, f"{guest.name} has no valid policy{why}")
    if not guest.active:
        return Refusal(Reason.NOT_RUNNING, f"{guest.name} is not running")
    if guest.job is not None:
        return Refusal(Reason.BUSY, f"{guest.name} has a job running: {guest.job}")
    if uuid in snapshot.busy:
        return Refusal(Reason.BUSY, f"another plan works on {guest.name}")
    if uuid not in snapshot.books.holdings:
        return Refusal(Reason.BUSY, f"{guest.name} has just started and holds nothing yet")
    return guest


def _change(guest: GuestState, key: Key, want: Want, snapshot: HostSnapshot) -> _Change:
    line = line_of(guest, key, snapshot)
    asked = want.value + (line.held if want.mode is Mode.BY else 0)
    target = line.round_up(asked)
    if asked <= line.held:
        target = min(target, line.held)
    elif asked <= line.ceiling < target:
        target = max(line.held, line.round_down(line.ceiling))
    return _Change(key, line, asked, target - line.held)


def _check_change(guest: GuestState, change: _Change) -> Refusal | None:
    key, line = change.key, change.line
    if key.resource == MEMORY and guest.mechanism is MemoryMechanism.FIXED:
        detail = f"{guest.name} has neither virtio-mem nor a balloon, its memory stays as it is"
        return Refusal(Reason.NO_MECHANISM, detail)
    if change.asked < min(line.held, line.floor):
        most = line.slack
        detail = (
            f"{guest.name}: {key}: {format_amount(key, change.asked)} is below its floor of "
            f"{format_amount(key, line.floor)} (it holds {format_amount(key, line.held)}, "
            f"{format_amount(key, most)} can be given up)"
        )
        return Refusal(Reason.BELOW_FLOOR, detail)
    return None


def _fit(market: Market, change: _Change) -> int:
    """How much of a gain can be had, in whole granules."""
    key, line = change.key, change.line
    if change.cost <= market.free_of(key) or change.cost <= market.available(key):
        return change.amount
    return max(0, line.round_down(line.held + market.available(key)) - line.held)


def _most(market: Market, change: _Change) -> int:
    """The largest gain that could be had now."""
    line = change.line
    room = line.ceiling - line.held
    gain = room if line.prepaid else min(room, market.available(change.key))
    return max(0, line.round_down(line.held + gain) - line.held)


# -- no ---------------------------------------------------------------------------------------


def _refuse(
    market: Market, growing: Sequence[_Change], why: Reason, detail: str, lacking: Sequence[Key]
) -> Refusal:
    """A refusal with what would fit of each resource that was to grow, and who was looked at."""
    would_fit = {str(change.key.resource): _most(market, change) for change in growing}
    return Refusal(why, detail, would_fit, market.lines(lacking))


def _above_limit(guest: GuestState, change: _Change) -> str:
    key, line = change.key, change.line
    return (
        f"{guest.name}: {key}: {format_amount(key, change.asked)} is above its limit of "
        f"{format_amount(key, line.ceiling)} (it holds {format_amount(key, line.held)})"
    )


def _no_capacity(market: Market, key: Key, need: int) -> str:
    return (
        f"{market.borrower.name}: {key}: needs {format_amount(key, need)}, "
        f"{format_amount(key, market.free_of(key))} is free and "
        f"{format_amount(key, market.survey(key).reclaimable)} can be reclaimed from lower "
        "priorities"
    )


# -- yes --------------------------------------------------------------------------------------


def _decide(
    snapshot: HostSnapshot,
    request_id: RequestId,
    guest: GuestState,
    changes: Sequence[_Change],
    market: Market | None,
) -> Decision:
    """The decision for gains that are known to fit, and for what is given up."""
    delta = Amounts({change.key: change.amount for change in changes})
    given = (-delta).positive()
    home = Homecoming(snapshot, _spare(snapshot, guest.uuid) if given else Amounts())
    repay_parts(home, guest.uuid, consume(newest_first(snapshot.books, guest.uuid), given), given)
    if market is None:
        return _with_homecoming(snapshot, request_id, guest.uuid, delta, home)
    paid = {c.key: market.buy(c.key, c.cost) for c in changes if c.asked > c.line.held}
    return Decision(
        request_id, guest.uuid, snapshot.generation, delta,
        from_free=Amounts(paid) + _topped_up(home, given),
        takes=market.takes(),
        returns=tuple(home.returns),
        holdings=_holdings(snapshot, {guest.uuid: delta}, market, home),
        considered=tuple(market.considered),
    )  # fmt: skip


def _with_homecoming(
    snapshot: HostSnapshot,
    request_id: RequestId,
    guest: GuestId,
    delta: Amounts,
    home: Homecoming,
) -> Decision:
    """The decision of a guest that gains nothing."""
    return Decision(
        request_id, guest, snapshot.generation, delta,
        from_free=_topped_up(home, -delta),
        returns=tuple(home.returns),
        holdings=_holdings(snapshot, {guest: delta}, None, home),
    )  # fmt: skip


def _topped_up(home: Homecoming, given: Amounts) -> Amounts:
    """What of free capacity goes home with a loan, because the borrower got less than was paid."""
    return (sum(home.arrived.values(), Amounts()) - given).positive()


def _spare(snapshot: HostSnapshot, borrower: GuestId) -> Amounts:
    """Free capacity for topping up returns; not summed up where nothing was borrowed."""
    owes = any(loan.borrower == borrower for loan in snapshot.books.loans.values())
    return free(snapshot).positive() if owes else Amounts()


def _holdings(
    snapshot: HostSnapshot,
    moves: Mapping[GuestId, Amounts],
    market: Market | None,
    home: Homecoming | None,
) -> dict[GuestId, Amounts]:
    """Amounts afterwards of every guest whose amounts change."""
    moved = dict(moves)
    for victim, gift in (market.gifts if market else {}).items():
        moved[victim] = moved.get(victim, Amounts()) - Amounts(gift)
    for victim, amounts in (home.arrived if home else {}).items():
        moved[victim] = moved.get(victim, Amounts()) + amounts
    return {guest: held_of(snapshot, guest) + by for guest, by in moved.items() if by}


def _give_back(snapshot: HostSnapshot, guest: GuestState, key: Key, amount: int) -> int:
    line = line_of(guest, key, snapshot)
    return max(0, line.held - line.round_up(max(line.held - amount, line.floor)))


# -- starting ---------------------------------------------------------------------------------


def _starting_cpu(market: Market, line: Line) -> int:
    online = max(1, market.borrower.vcpus_online) * WHOLE_CPU
    spare = min(line.ceiling, online, market.free_of(CPU_KEY))
    return max(line.floor, line.round_down(spare))


def _starting_memory(guest: GuestState, line: Line) -> int:
    match guest.mechanism:
        case MemoryMechanism.VIRTIO_MEM:
            # At `prepare` the device has nothing yet, but it is asked for this much from the start.
            plugged = sum(max(int(d.requested), int(d.current)) for d in guest.virtio_mem)
            return line.round_up(max(line.floor, int(guest.boot_memory) + plugged))
        case MemoryMechanism.BALLOON:
            # A guest boots with all of it and deflates nothing before its driver is up.
            return max(line.floor, int(guest.memory_max))
        case MemoryMechanism.FIXED:
            return line.floor
