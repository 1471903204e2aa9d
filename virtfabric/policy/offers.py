"""Offers: the ways to put one dedicated guest onto pCPUs, each with a cost and a reason in words.

Owns the search for one guest (nodes, whole cores, operator's pins) and the comparison. It must
not look at amounts or at other guests: the caller says which pCPUs this guest may use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.plan import Offer
from virtfabric.model.policy import Smt
from virtfabric.policy.offercosts import cost_of, describe_offer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from virtfabric.model.units import CpuSet
    from virtfabric.policy.terrain import Terrain, Wanted

OFFERS_SHOWN: Final = 4
NODES_NEARBY: Final = 3
"""How many nodes are looked at for a guest that has a place already."""


def make_offers(terrain: Terrain, wanted: Wanted, free: AbstractSet[int]) -> list[Offer]:
    """Every distinct way the strategies find, best first; empty when none satisfies the guest.

    Args:
        terrain: the host.
        wanted: the guest.
        free: managed pCPUs that no other dedicated guest uses or keeps empty.
    """
    orders: dict[tuple[int, ...], None] = {}
    for kept, nodes, allowed in _strategies(terrain, wanted, free):
        order = _fill(terrain, wanted, allowed, kept, nodes)
        if order is not None and is_sound(terrain, wanted, order, free):
            orders[order] = None
    offers = [
        Offer(wanted.guest, order, cost_of(terrain, wanted, order, free), "") for order in orders
    ]
    offers.sort(key=lambda o: (o.cost, o.order))
    return [
        replace(o, why=describe_offer(terrain, wanted, o, offers[0]), chosen=i == 0)
        for i, o in enumerate(offers[:OFFERS_SHOWN])
    ]


def _strategies(
    terrain: Terrain, wanted: Wanted, free: AbstractSet[int]
) -> Iterator[tuple[list[int | None], list[int], AbstractSet[int]]]:
    """Starting points: (pCPU kept by each vCPU, nodes in order of preference, usable pCPUs)."""
    now = [c if c in free else None for c in wanted.held[: wanted.count]]
    now += [None] * (wanted.count - len(now))
    used = {terrain.node(c) for c in now if c is not None}
    near = terrain.nearest(wanted.home or used)
    yield now, near, free
    nothing: list[int | None] = [None] * wanted.count
    if len(wanted.held) > wanted.count:
        # a shrinking guest may be better off with another subset of what it has
        yield nothing, near, free & set(wanted.held)
    yield nothing, near, free
    if len(terrain.cores_of) == 1:
        return
    # who has a place is not carried across the whole host
    for node in near[:NODES_NEARBY] if used else near:
        if sum(len(core & free) for core in terrain.cores_of[node]) < wanted.count:
            continue
        rank = terrain.nearest((node,))
        if node in used:
            here = [c if c is not None and terrain.node(c) == node else None for c in now]
            yield here, rank, free
        yield nothing, rank, free


def _fill(
    terrain: Terrain,
    wanted: Wanted,
    free: AbstractSet[int],
    kept: list[int | None],
    nodes: list[int],
) -> tuple[int, ...] | None:
    slots = _seat_pinned(wanted, free, kept)
    if slots is None:
        return None
    chosen = {c for c in slots if c is not None}
    extra: list[int] = []
    for node in nodes:
        missing = slots.count(None) - len(extra)
        if missing <= 0:
            break
        found = _on_node(terrain, wanted.smt, free, chosen, node, missing)[:missing]
        extra += found
        chosen.update(found)
    if len(extra) < slots.count(None):
        return None
    return _seat_rest(slots, extra, wanted)


def _seat_pinned(
    wanted: Wanted, free: AbstractSet[int], kept: list[int | None]
) -> list[int | None] | None:
    """Give each vCPU that the operator pinned a pCPU of its own from its pin (Kuhn's matching)."""
    slots = list(kept)
    pins = {vcpu: cpus for vcpu, cpus in wanted.pins if vcpu < wanted.count}
    if not pins:
        return slots
    owner: dict[int, int] = {}

    def seat(vcpu: int, tried: set[int]) -> bool:
        first = slots[vcpu]
        options = sorted(pins[vcpu] & free, key=lambda c: (c != first, c in slots, c))
        for cpu in options:
            if cpu in tried:
                continue
            tried.add(cpu)
            if cpu not in owner or seat(owner[cpu], tried):
                owner[cpu] = vcpu
                return True
        return False

    if not all(seat(vcpu, set()) for vcpu in sorted(pins)):
        return None
    seated = {vcpu: cpu for cpu, vcpu in owner.items()}
    return [seated.get(v, None if cpu in owner else cpu) for v, cpu in enumerate(slots)]


def _seat_rest(slots: list[int | None], extra: list[int], wanted: Wanted) -> tuple[int, ...]:
    """Seat the found pCPUs; a vCPU whose own pCPU is among them stays where it is."""
    rest = dict.fromkeys(extra)
    seats = list(slots)
    for vcpu, cpu in enumerate(wanted.held[: wanted.count]):
        if seats[vcpu] is None and cpu in rest:
            seats[vcpu] = cpu
            del rest[cpu]
    left = iter(rest)
    return tuple(next(left) if cpu is None else cpu for cpu in seats)


def _on_node(
    terrain: Terrain, smt: Smt, free: AbstractSet[int], chosen: set[int], node: int, missing: int
) -> list[int]:
    """Free pCPUs of a node in the order in which this guest wants them, `missing` if it can.

    Siblings of what it has come first, then whole cores, then what is left of broken ones.
    """
    cores = terrain.cores_of[node]

    def rank(cpu: int) -> tuple[bool, int]:
        return cpu in terrain.housekeeping, cpu  # of a core's threads, those last

    if smt is Smt.ISOLATE:
        empty = (core for core in cores if core.isdisjoint(chosen))
        return [min(core & free, key=rank) for core in empty if core & terrain.managed <= free]
    beside = {s for cpu in chosen if terrain.node(cpu) == node for s in terrain.siblings(cpu)}
    found = sorted(beside & free - chosen, key=rank)
    single: list[int] = []
    for core in cores:
        if len(found) >= missing:
            break
        usable = core & free
        if len(usable) == len(core) and usable.isdisjoint(chosen):
            found += sorted(usable, key=rank)
        elif usable.isdisjoint(beside):
            single += sorted(usable, key=rank)
    # rather a core that is broken towards the pool than one of another dedicated guest
    single.sort(key=lambda cpu: not terrain.siblings(cpu) & terrain.managed <= free)
    return found + ([] if smt is Smt.REQUIRE else single)


def is_sound(
    terrain: Terrain, wanted: Wanted, order: Sequence[int], free: AbstractSet[int]
) -> bool:
    """Whether an order is complete, the guest's alone, on its pins, and as its `smt` asks."""
    own = set(order)
    if len(order) != wanted.count or len(own) != len(order) or not own <= free:
        return False
    if any(v < wanted.count and order[v] not in cpus for v, cpus in wanted.pins):
        return False
    if not terrain.kept_empty(order, wanted.smt) <= free:
        return False
    if wanted.smt is Smt.PREFER:
        return True
    cores = {terrain.siblings(c) for c in order}
    if wanted.smt is Smt.ISOLATE:
        return len(cores) == len(order)
    # `require`: cores wholly managed, and none that the guest could do without
    return all(c <= terrain.managed for c in cores) and _is_packed(cores, wanted.count)


def _is_packed(cores: set[CpuSet], count: int) -> bool:
    sizes = sorted((len(c) for c in cores), reverse=True)
    return sum(sizes[:-1]) < count
