"""Layout: which pCPUs belong to which dedicated guest, and the pool that is left to the others.

Owns exclusiveness: no pCPU in two dedicated sets, the pool disjoint from them, siblings kept empty
where a policy says so, and that guests already placed stay where they are unless nothing else
fits. It must not decide amounts (arbiter) or how to get there (placement).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import CPU_KEY, MEMORY_KEY
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import NumaMode
from virtfabric.model.policy import Smt
from virtfabric.model.units import CpuSet
from virtfabric.policy.nearness import memory_nodes, pullable_nodes
from virtfabric.policy.offers import is_sound, make_offers
from virtfabric.policy.standing import WHOLE_CPU, is_dedicated
from virtfabric.policy.terrain import Terrain, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.amounts import Amounts
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Offer

MOST_TRIED: Final = 32
"""Other guests that are tried, one at a time, as the one to move aside."""

_STRICTEST: Final = {Smt.ISOLATE: 0, Smt.REQUIRE: 1, Smt.PREFER: 2}
_SMT_WORDS: Final = {
    Smt.ISOLATE: " on cores of their own, one a core",
    Smt.REQUIRE: " on whole cores",
    Smt.PREFER: "",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Who is where.

    Attributes:
        orders: pCPU of each vCPU, for guests that hold whole CPUs as dedicated ones.
        pool: where all other managed guests float.
        housekeeping: for emulator and I/O threads of every managed guest.
        nodes: NUMA nodes of each movable guest's memory.
        offers: what was compared for guests that were placed anew, the chosen one first.
        kept_empty: siblings that nobody may use, by the guest beside whom.
    """

    orders: dict[GuestId, tuple[int, ...]]
    pool: CpuSet
    housekeeping: CpuSet
    nodes: dict[GuestId, CpuSet]
    offers: tuple[Offer, ...] = ()
    kept_empty: Mapping[int, GuestId] = field(default_factory=dict)


def choose_layout(snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts]) -> Layout | Refusal:
    """Place every guest that holds something; who has a place keeps it.

    Args:
        snapshot: host, guests, and the books with the orders so far.
        amounts: what each managed guest holds afterwards.

    Returns:
        `NO_PLACEMENT` when a guest's whole cores, isolation or operator's pins cannot be had, or
        when the pool would be too small for the shared guests.
    """
    wanted, floating, floats = _sort_guests(snapshot, amounts)
    board = _Board(
        Terrain(
            snapshot.topology,
            frozenset(snapshot.capacity.cpus),
            frozenset(snapshot.capacity.housekeeping),
        ),
        wanted,
    )
    for guest in board.take_seats():
        if not board.place(guest):
            return _no_place(snapshot, board, guest)
    pool = CpuSet(board.terrain.managed - board.taken())
    least = max(1, -(-floating // WHOLE_CPU)) if floats else 0
    if len(pool) < least:
        return _pool_too_small(pool, least, board)
    orders = dict(sorted(board.orders.items()))
    return Layout(
        orders,
        pool,
        choose_housekeeping(snapshot, board.taken(), pool),
        _choose_nodes(snapshot, board.terrain, orders),
        tuple(board.offers),
        board.kept_empty(),
    )


def choose_housekeeping(snapshot: HostSnapshot, taken: set[int], pool: CpuSet) -> CpuSet:
    """Where emulators run: housekeeping pCPUs that nobody has for himself, else the pool."""
    wanted = snapshot.capacity.housekeeping
    return CpuSet(wanted - taken) or pool or wanted or snapshot.topology.cpus


def present_layout(snapshot: HostSnapshot) -> tuple[CpuSet, CpuSet]:
    """Pool and housekeeping as the orders in the books make them, nothing placed anew."""
    terrain = Terrain(snapshot.topology, frozenset(snapshot.capacity.cpus), frozenset())
    taken: set[int] = set()
    for guest, holding in snapshot.books.holdings.items():
        if holding.order:
            taken.update(holding.order)
            state = snapshot.guests.get(guest)
            if state is not None and state.policy is not None and is_dedicated(state):
                taken |= terrain.kept_empty(holding.order, state.policy.cpu.smt)
    pool = CpuSet(terrain.managed - taken)
    return pool, choose_housekeeping(snapshot, taken, pool)


def _sort_guests(
    snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts]
) -> tuple[dict[GuestId, Wanted], int, bool]:
    """Dedicated guests with what they want; milli-CPU of the others, and whether there are any."""
    wanted: dict[GuestId, Wanted] = {}
    floating = 0
    floats = False
    guests, holdings = snapshot.guests, snapshot.books.holdings
    for guest, held in amounts.items():
        state = guests.get(guest)
        cpu = held[CPU_KEY]
        if state is not None and cpu >= WHOLE_CPU and is_dedicated(state):
            wanted[guest] = _wanted(snapshot, state, cpu // WHOLE_CPU, held[MEMORY_KEY])
        elif state is None and guest in holdings and holdings[guest].order:
            # libvirt does not show it now (it is migrating, or just went): its place is not free
            wanted[guest] = Wanted(guest, len(holdings[guest].order), held=holdings[guest].order)
        elif state is not None:
            floating += cpu
            floats = True
    return wanted, floating, floats


def _wanted(snapshot: HostSnapshot, state: GuestState, count: int, memory: int) -> Wanted:
    holding = snapshot.books.holdings.get(state.uuid)
    home = memory_nodes(snapshot, state.uuid)
    pullable = pullable_nodes(snapshot, state, memory)
    pins = tuple(sorted(state.config_pins.items())) if state.config_pins else ()
    smt = state.policy.cpu.smt if state.policy else Smt.PREFER
    held = holding.order if holding else ()
    return Wanted(state.uuid, count, smt, held, pins, home, pullable)


class _Board:
    """Who sits where while a layout is being made."""

    def __init__(self, terrain: Terrain, wanted: dict[GuestId, Wanted]) -> None:
        self.terrain = terrain
        self.wanted = wanted
        self.orders: dict[GuestId, tuple[int, ...]] = {}
        self.offers: list[Offer] = []

    def taken(self, but: GuestId | None = None) -> set[int]:
        """pCPUs that dedicated guests use or keep empty, one guest left out."""
        taken: set[int] = set()
        for guest, order in self.orders.items():
            if guest != but:
                taken.update(order)
                if self.wanted[guest].smt is not Smt.PREFER:
                    taken |= self.terrain.kept_empty(order, self.wanted[guest].smt)
        return taken

    def kept_empty(self) -> dict[int, GuestId]:
        """Siblings that nobody may use, by the guest beside whom."""
        return {
            cpu: guest
            for guest, order in self.orders.items()
            for cpu in self.terrain.kept_empty(order, self.wanted[guest].smt)
        }

    def take_seats(self) -> list[GuestId]:
        """Seat everyone where the books have him; returns who has to be placed, in what order.

        Those who shrink come first (they make room), then the ones hardest to please.
        """
        owner: dict[int, GuestId] = {}
        for guest in sorted(self.wanted):
            held = self.wanted[guest].held
            good = tuple(c for c in held if c in self.terrain.managed and c not in owner)
            if good != held:
                self.wanted[guest] = replace(self.wanted[guest], held=good)
            owner.update(dict.fromkeys(good, guest))
            if good:
                self.orders[guest] = good
        restless = [g for g, w in self.wanted.items() if not self._is_content(w)]
        return sorted(restless, key=lambda g: (self._grows(g), _hardness(self.wanted[g])))

    def _grows(self, guest: GuestId) -> bool:
        return self.wanted[guest].count > len(self.wanted[guest].held)

    def _is_content(self, wanted: Wanted) -> bool:
        if len(wanted.held) != wanted.count:
            return False
        if wanted.smt is Smt.PREFER and not wanted.pins:
            return True
        free = self.terrain.managed - self.taken(wanted.guest)
        return is_sound(self.terrain, wanted, wanted.held, free)

    def place(self, guest: GuestId) -> bool:
        """Seat one guest by its best offer; others move aside only if nothing else fits."""
        found = make_offers(self.terrain, self.wanted[guest], self._free(guest))
        if found:
            self._accept(found)
            return True
        return self._place_moving_one(guest) or self._place_all(guest)

    def _free(self, guest: GuestId) -> frozenset[int]:
        return self.terrain.managed - self.taken(guest)

    def _accept(self, offers: list[Offer], note: str = "") -> None:
        best = replace(offers[0], why=offers[0].why + note)
        self.orders[best.guest] = best.order
        self.offers += [best, *offers[1:]]

    def _place_moving_one(self, guest: GuestId) -> bool:
        """The one guest whose moving aside disturbs the fewest vCPUs, if one is enough."""
        others = sorted(
            (g for g in self.orders if g != guest and not self.wanted[g].pins),
            key=lambda g: (len(self.orders[g]), g),
        )
        options = []
        for other in others[:MOST_TRIED]:
            was = self.orders.pop(other)
            mine = make_offers(self.terrain, self.wanted[guest], self._free(guest))
            if mine:
                before = self.orders.get(guest)
                self.orders[guest] = mine[0].order
                its = make_offers(self.terrain, self._as_is(other, was), self._free(other))
                self._restore(guest, before)
                if its:
                    options.append((its[0].cost[2], other, mine, its))
            self.orders[other] = was
        if not options:
            return False
        moved, other, mine, its = min(options, key=lambda option: option[:2])
        self._accept(mine, f"; moves {moved} vCPUs of guest {other.short}, nothing else fits")
        self._accept(its, f"; makes room for guest {guest.short}")
        return True

    def _as_is(self, guest: GuestId, order: tuple[int, ...]) -> Wanted:
        """What a guest wants of being moved: as many pCPUs as it sits on now."""
        return replace(self.wanted[guest], count=len(order), held=order)

    def _restore(self, guest: GuestId, order: tuple[int, ...] | None) -> None:
        if order is None:
            del self.orders[guest]
        else:
            self.orders[guest] = order

    def _place_all(self, guest: GuestId) -> bool:
        """Last resort: everyone gets up and is seated anew, the hardest to please first."""
        before = dict(self.orders)
        queue = sorted({*before, guest}, key=lambda g: _hardness(self.wanted[g]))
        self.orders = {}
        chosen: list[list[Offer]] = []
        for other in queue:
            wanted = self.wanted[other]
            if other != guest:
                wanted = self._as_is(other, before[other])
            found = make_offers(self.terrain, wanted, self._free(other))
            if not found:
                self.orders = before
                return False
            self.orders[other] = found[0].order
            chosen.append(found)
        moved = [found for found in chosen if found[0].order != before.get(found[0].guest)]
        count = sum(found[0].cost[2] for found in moved if found[0].guest != guest)
        for found in moved:
            mine = found[0].guest == guest
            note = (
                f"moves {count} vCPUs of other guests, nothing else fits"
                if mine
                else (f"makes room for guest {guest.short}")
            )
            self._accept(found, f"; {note}")
        return True


def _hardness(wanted: Wanted) -> tuple[int, int, int, GuestId]:
    return 0 if wanted.pins else 1, _STRICTEST[wanted.smt], -wanted.count, wanted.guest


def _choose_nodes(
    snapshot: HostSnapshot, terrain: Terrain, orders: Mapping[GuestId, Iterable[int]]
) -> dict[GuestId, CpuSet]:
    """Movable guests' nodes: where their memory is, or where it follows their pCPUs to."""
    nodes: dict[GuestId, CpuSet] = {}
    for guest, state in snapshot.guests.items():
        if state.numa_mode is not NumaMode.RESTRICTIVE or not state.managed:
            continue
        wanted = state.numa_nodes
        here = CpuSet(terrain.node(c) for c in orders.get(guest, ()))
        if not here <= wanted and here <= pullable_nodes(snapshot, state, state.memory_current):
            wanted = here
        if wanted:
            nodes[guest] = wanted
    return nodes


def _no_place(snapshot: HostSnapshot, board: _Board, guest: GuestId) -> Refusal:
    wanted = board.wanted[guest]
    name = snapshot.guests[guest].name if guest in snapshot.guests else guest
    free = board.terrain.managed - board.taken(guest)
    pinned = " within the vcpupin of its definition" if wanted.pins else ""
    return Refusal(
        Reason.NO_PLACEMENT,
        f"{name}: no {wanted.count} pCPUs{_SMT_WORDS[wanted.smt]}{pinned}; "
        f"{len(free)} of {len(board.terrain.managed)} managed pCPUs "
        f"({CpuSet(free) or 'none'}) are free of other dedicated guests",
    )


def _pool_too_small(pool: CpuSet, least: int, board: _Board) -> Refusal:
    used = {c for order in board.orders.values() for c in order}
    empty = CpuSet(board.taken() - used)
    kept = f", {empty} are kept empty beside dedicated vCPUs" if empty else ""
    return Refusal(
        Reason.NO_PLACEMENT,
        f"the shared guests need {least} pCPUs, the pool would have {len(pool)} "
        f"({pool or 'none'}){kept}",
    )
