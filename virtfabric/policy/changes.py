"""Changes: what a request comes to for each resource, how much of it can be had, and why not.

Owns rounding to what a guest can hold, the bounds of one guest, and the words of a refusal. Who
pays is for `victims` to say, the decision for the arbiter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import CPU_KEY, CXL_KEY, MEMORY, MEMORY_KEY, Key, Tier, format_amount
from virtfabric.model.capability import capability_of, device_key
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.want import Mode
from virtfabric.policy.deviceterms import check_taker, spare_ports, wish_of
from virtfabric.policy.standing import Line, line_of
from virtfabric.policy.tierterms import check_far_taker, may_have

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.request import Request
    from virtfabric.model.want import Want
    from virtfabric.policy.victims import Market


class Change(NamedTuple):
    """What one resource of a request comes to: as asked for, and in whole granules."""

    key: Key
    line: Line
    asked: int
    amount: int

    @property
    def cost(self) -> int:
        """What the gain costs of capacity."""
        return 0 if self.line.prepaid else max(0, self.amount)

    @property
    def grows(self) -> bool:
        """Whether more is asked for than is held."""
        return self.asked > self.line.held

    @property
    def is_device(self) -> bool:
        """Whether it counts functions."""
        return capability_of(self.key) is not None


def check_subject(snapshot: HostSnapshot, uuid: GuestId) -> GuestState | Refusal:
    """The guest that a request is for, or why nothing can be done for it now."""
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


def wanted_changes(snapshot: HostSnapshot, guest: GuestState, request: Request) -> list[Change]:
    """What the request comes to; resources that stay as they are are left out."""
    wants = [(CPU_KEY, request.cpu), (request.memory_key, request.memory)]
    wants += [(device_key(name), want) for name, want in sorted(request.devices.items())]
    changes = [_change(guest, key, want, snapshot) for key, want in wants if want is not None]
    return [change for change in changes if change.asked != change.line.held]


def _change(guest: GuestState, key: Key, want: Want, snapshot: HostSnapshot) -> Change:
    line = line_of(guest, key, snapshot)
    asked = want.value + (line.held if want.mode is Mode.BY else 0)
    target = line.round_up(asked)
    if asked <= line.held:
        target = min(target, line.held)
    elif asked <= line.ceiling < target:
        target = max(line.held, line.round_down(line.ceiling))
    return Change(key, line, asked, target - line.held)


def check_request(
    snapshot: HostSnapshot, guest: GuestState, request: Request, changes: Sequence[Change]
) -> Refusal | None:
    """Why it cannot be, whatever capacity there is (but for the ceiling); None where it can."""
    asks = any(change.is_device and change.grows for change in changes)
    for change in changes:
        problem = _check_change(snapshot, guest, change)
        if problem is None and change.key.resource == MEMORY:
            if change.grows:
                problem = _check_tier(snapshot, guest, change, asks=asks)
            if request.tier is not None:
                problem = problem or _check_multiple(guest, change)
        if problem is not None:
            return problem
    return None


def _check_tier(
    snapshot: HostSnapshot, guest: GuestState, change: Change, *, asks: bool
) -> Refusal | None:
    if change.key == CXL_KEY:
        return check_far_taker(guest, snapshot, asks=asks)
    if may_have(guest, Tier.DRAM):
        return None
    detail = (
        f"tier: the policy of {guest.name} allows it no more DRAM; ask with --tier {Tier.CXL}, or "
        f"allow it: virtfabric policy set {guest.name} --tiers dram,cxl"
    )
    return Refusal(Reason.NOT_ALLOWED, detail)


def _check_multiple(guest: GuestState, change: Change) -> Refusal | None:
    """Whoever names the tier means a size exactly; without it a size is rounded up."""
    line = change.line
    if (change.asked - line.origin) % line.granule == 0:
        return None
    detail = (
        f"memory: {guest.name} would hold {format_amount(change.key, change.asked)} of "
        f"{change.key.words}, which is no multiple of {format_amount(change.key, line.granule)}, "
        "the block that its memory changes by"
    )
    if line.origin:
        detail += f", beyond the {format_amount(change.key, line.origin)} that it boots with"
    return Refusal(Reason.INVALID_ARGUMENT, detail)


def _check_change(snapshot: HostSnapshot, guest: GuestState, change: Change) -> Refusal | None:
    """As `check_request`, of one resource alone."""
    key, line = change.key, change.line
    if key == MEMORY_KEY and guest.mechanism is MemoryMechanism.FIXED:
        detail = f"{guest.name} has neither virtio-mem nor a balloon, its memory stays as it is"
        return Refusal(Reason.NO_MECHANISM, detail)
    if change.is_device and change.grows:
        problem = _check_capability(snapshot, key) or check_taker(guest, snapshot)
        if problem is not None:
            return problem
    if change.asked < min(line.held, line.floor):
        most = line.slack
        detail = (
            f"{guest.name}: {key.words}: {format_amount(key, change.asked)} is below its floor of "
            f"{format_amount(key, line.floor)} (it holds {format_amount(key, line.held)}, "
            f"{format_amount(key, most)} can be given up)"
        )
        return Refusal(Reason.BELOW_FLOOR, detail)
    return None


def _check_capability(snapshot: HostSnapshot, key: Key) -> Refusal | None:
    known = sorted({pool.capability for pool in snapshot.devices.pools})
    if capability_of(key) in known:
        return None
    there_are = f"there are: {', '.join(known)}" if known else "none is configured ([[device]])"
    return Refusal(Reason.UNKNOWN_CAPABILITY, f"no pool has {capability_of(key)}; {there_are}")


def check_ceilings(market: Market, growing: Sequence[Change]) -> Refusal | None:
    """Whether the guest may hold, and has ports for, all that is asked for."""
    guest = market.borrower
    for change in growing:
        if change.asked > change.line.ceiling:
            wish = wish_of(guest, change.key)
            if change.is_device and (wish is None or change.asked <= wish.count):
                return _no_port(market, growing)
            return refuse(market, growing, Reason.ABOVE_LIMIT, _above_limit(guest, change), ())
    functions = sum(change.amount for change in growing if change.is_device)
    if functions > spare_ports(guest, market.snapshot):
        return _no_port(market, growing)
    return None


def fit(market: Market, change: Change) -> int:
    """How much of a gain can be had, in whole granules."""
    key, line = change.key, change.line
    if change.cost <= market.free_of(key) or change.cost <= market.available(key):
        return change.amount
    return max(0, line.round_down(line.held + market.available(key)) - line.held)


def _most(market: Market, change: Change) -> int:
    """The largest gain that could be had now."""
    line = change.line
    room = line.ceiling - line.held
    gain = room if line.prepaid else min(room, market.available(change.key))
    return max(0, line.round_down(line.held + gain) - line.held)


# -- no ---------------------------------------------------------------------------------------


def refuse(
    market: Market, growing: Sequence[Change], why: Reason, detail: str, lacking: Sequence[Key]
) -> Refusal:
    """A refusal with what would fit of each resource that was to grow, and who was looked at."""
    would_fit = {str(change.key): _most(market, change) for change in growing}
    return Refusal(why, detail, would_fit, market.lines(lacking))


def refuse_short(market: Market, growing: Sequence[Change], short: Sequence[Change]) -> Refusal:
    """There is too little of something; where a pool has nothing to give at all, why that is."""
    reason, detail = Reason.NO_CAPACITY, no_capacity(market, short[0].key, short[0].cost)
    if short[0].is_device:
        reason = _why_none(market, short[0].key)
    refusal = refuse(market, growing, reason, detail, [change.key for change in short])
    withheld = [
        f"{function.address}: {'; '.join(why)}"
        for change in short if change.is_device
        for function in market.stock.members(change.key)
        if (why := market.stock.withheld(function, market.borrower.uuid))
    ]  # fmt: skip
    return Refusal(reason, detail, refusal.would_fit, (*refusal.considered, *withheld))


def _why_none(market: Market, key: Key) -> Reason:
    """NO_CAPACITY where guests have it all; else what keeps the rest from being given."""
    stock = market.stock
    pool = [f for f in stock.members(key) if f.address not in stock.holders]
    if market.available(key) or not pool:
        return Reason.NO_CAPACITY
    if all(stock.is_grouped(one, market.borrower.uuid) for one in pool):
        return Reason.GROUP_NOT_VIABLE
    return Reason.DEVICE_IN_USE if any(map(stock.is_used, pool)) else Reason.NO_CAPACITY


def _above_limit(guest: GuestState, change: Change) -> str:
    key, line = change.key, change.line
    return (
        f"{guest.name}: {key.words}: {format_amount(key, change.asked)} is above its limit of "
        f"{format_amount(key, line.ceiling)} (it holds {format_amount(key, line.held)})"
    )


def _no_port(market: Market, growing: Sequence[Change]) -> Refusal:
    guest = market.borrower
    needs = sum(change.asked - change.line.held for change in growing if change.is_device)
    detail = (
        f"{guest.name} has {spare_ports(guest, market.snapshot)} PCIe root ports free and needs "
        f"{needs}; none can be added while it runs: virtfabric ports add {guest.name} --count N "
        "gives it more at its next start"
    )
    return refuse(market, growing, Reason.NO_FREE_PORT, detail, ())


def no_capacity(market: Market, key: Key, need: int) -> str:
    """What is needed, what is free, what others could give."""
    return (
        f"{market.borrower.name}: {key.words}: needs {format_amount(key, need)}, "
        f"{format_amount(key, market.free_of(key))} is free and "
        f"{format_amount(key, market.survey(key).reclaimable)} can be reclaimed from lower "
        "priorities"
    )
