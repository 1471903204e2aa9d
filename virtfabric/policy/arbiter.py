"""How much each guest gets, and who pays. It must not choose pCPUs or nodes (placement).

Free capacity first, then reclaim from strictly lower priorities in the order of `victims`, never
below a floor, all or nothing. What was reclaimed is a loan and goes home as `loans` says. Telemetry
plays no part: the same books give the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy.changes import (
    check_ceilings,
    check_request,
    check_subject,
    fit,
    no_capacity,
    refuse_short,
    wanted_changes,
)
from virtfabric.policy.homecoming import Homecoming, repay_parts
from virtfabric.policy.loans import consume, newest_first
from virtfabric.policy.standing import (
    charge_of,
    free,
    held_of,
    line_of,
    tally,
)
from virtfabric.policy.starting import starting_amounts
from virtfabric.policy.stock import Stock, device_amounts
from virtfabric.policy.tiers import node_rooms
from virtfabric.policy.victims import Market

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, RequestId
    from virtfabric.model.ledger import Grant, HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.policy.changes import Change

    Caps = Mapping[GuestId, Amounts]


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
    guest = check_subject(snapshot, request.guest)
    if isinstance(guest, Refusal):
        return guest
    changes = wanted_changes(snapshot, guest, request)
    problem = check_request(snapshot, guest, request, changes)
    if problem is not None:
        return problem
    growing = [change for change in changes if change.grows]
    if not growing:
        return _decide(snapshot, request.id, guest, changes, None)
    market = Market(snapshot, guest, caps or {}, tally(snapshot))
    problem = check_ceilings(market, growing)
    if problem is not None:
        return problem
    fitting = [change._replace(amount=fit(market, change)) for change in growing]
    short = [then for now, then in zip(fitting, growing, strict=True) if now.amount < then.amount]
    if short and not (request.partial and any(change.amount for change in fitting)):
        return refuse_short(market, growing, short)
    shrinking = [change for change in changes if change.amount < 0]
    return _decide(snapshot, request.id, guest, fitting + shrinking, market)


def choose_release(
    snapshot: HostSnapshot, request_id: RequestId, grant: Grant, *, caps: Caps | None = None
) -> Decision:
    """End a grant: the borrower gives it back, as far as it is above its floor; loans go home.

    What no victim takes back becomes free. The caller waits for victims that are busy.

    Args:
        snapshot: the host.
        request_id: for the decision.
        grant: which one.
        caps: the most that the borrower gives, where it stopped short: the grant goes on with the
            rest then (`loans.settle`, `partly`).
    """
    guest = snapshot.guests.get(grant.guest)
    given = Amounts()
    if guest is not None and guest.uuid in snapshot.books.holdings:
        most = grant.amounts
        if caps and guest.uuid in caps:
            most = Amounts({k: min(v, caps[guest.uuid][k]) for k, v in most.items()})
        given = Amounts({k: _give_back(snapshot, guest, k, v) for k, v in most.items()})
    home = _homecoming(snapshot, grant.guest, given)
    repay_parts(home, grant.guest, [(grant, given)], given)
    return _with_homecoming(snapshot, request_id, grant.guest, -given, home)


def choose_departure(snapshot: HostSnapshot, guest_id: GuestId, request_id: RequestId) -> Decision:
    """A guest stopped: all it held is free, and pays its loans first.

    `settle` with this decision removes its holding; `loans.depart` has to follow.
    """
    held = held_of(snapshot, guest_id)
    home = _homecoming(snapshot, guest_id, held)
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
    Memory that it boots with is counted even where that is more than its limit. Functions that
    its policy wishes for are reserved as far as they are in stock (see `policy.starting`).

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
    held = starting_amounts(market, guest)
    cost = charge_of(guest, held, snapshot)
    lacking = [
        key for key, need in cost.items()
        if need > market.free_of(key) and need > market.available(key)
    ]  # fmt: skip
    if lacking:
        most = {str(key): min(cost[key], market.available(key)) for key in cost}
        detail = no_capacity(market, lacking[0], cost[lacking[0]])
        return Refusal(Reason.NO_CAPACITY, detail, most, market.lines(lacking))
    from_free = Amounts({key: market.buy(key, need) for key, need in cost.items()})
    before = held_of(snapshot, guest.uuid)
    return Decision(
        request_id, guest.uuid, snapshot.generation, held - before, from_free, market.takes(),
        holdings=_holdings(snapshot, {guest.uuid: held - before}, market, None),
        considered=tuple(market.considered),
    )  # fmt: skip


# -- yes --------------------------------------------------------------------------------------


def _decide(
    snapshot: HostSnapshot,
    request_id: RequestId,
    guest: GuestState,
    changes: Sequence[Change],
    market: Market | None,
) -> Decision:
    """The decision for gains that are known to fit, and for what is given up."""
    paid = {c.key: market.buy(c.key, c.cost) for c in changes if c.grows} if market else {}
    delta = Amounts({change.key: change.amount for change in changes})
    return settle_terms(snapshot, request_id, guest, delta, market, Amounts(paid))


def settle_terms(
    snapshot: HostSnapshot,
    request_id: RequestId,
    guest: GuestState,
    delta: Amounts,
    market: Market | None,
    paid: Amounts,
) -> Decision:
    """The decision where it is known what a guest gains and gives up, and who pays.

    What goes home of what it gives up is no matter of choice: loans say it.

    Args:
        snapshot: the host.
        request_id: for the decision.
        guest: whom it is about.
        delta: what it gains, or gives up.
        market: with what victims give; None where it gains nothing.
        paid: of the gain, from free capacity.
    """
    given = (-delta).positive()
    home = _homecoming(snapshot, guest.uuid, given)
    repay_parts(home, guest.uuid, consume(newest_first(snapshot.books, guest.uuid), given), given)
    if market is None:
        return _with_homecoming(snapshot, request_id, guest.uuid, delta, home)
    return Decision(
        request_id, guest.uuid, snapshot.generation, delta,
        from_free=paid + _topped_up(home, given),
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


def _homecoming(snapshot: HostSnapshot, borrower: GuestId, given: Amounts) -> Homecoming:
    """What can go home when this much is given up; nothing summed up where nothing was borrowed."""
    owes = any(loan.borrower == borrower for loan in snapshot.books.loans.values())
    if not given or not owes:
        return Homecoming(snapshot, Amounts())
    functions = device_amounts(given)
    passable = Stock(snapshot).passable(borrower, functions) if functions else {}
    return Homecoming(snapshot, free(snapshot).positive(), passable, _room_elsewhere(snapshot))


def _room_elsewhere(snapshot: HostSnapshot) -> int | None:
    """Bytes that CXL nodes have room for which are not called home; None where none is called."""
    called = snapshot.recall.nodes
    if not called:
        return None
    return sum(max(0, room) for node, room in node_rooms(snapshot).items() if node not in called)


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
