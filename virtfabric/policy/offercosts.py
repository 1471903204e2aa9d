"""What an offer of pCPUs costs, and why it won or lost: order -> figures and words.

Owns the order in which offers are compared. It makes none (`policy.offers`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from virtfabric.model.policy import Smt
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet

    from virtfabric.model.plan import Offer
    from virtfabric.policy.terrain import Terrain, Wanted

COST_WORDS: Final = ("distance to its memory", "cores broken", "vCPUs moved", "housekeeping pCPUs")
"""What the components of an offer's cost mean; the last component is the first pCPU."""


def cost_of(
    terrain: Terrain, wanted: Wanted, order: tuple[int, ...], free: AbstractSet[int]
) -> tuple[int, ...]:
    """As `COST_WORDS`; lower is better, compared from the first on."""
    far, pulled = _locality(terrain, wanted, order)
    moved = sum(a != b for a, b in zip(wanted.held, order, strict=False))
    return (
        far,
        0 if wanted.smt is Smt.ISOLATE else _broken(terrain, order, free),
        moved + (wanted.count if pulled else 0),
        len(terrain.housekeeping & set(order)),
        min(order),
    )


def _locality(terrain: Terrain, wanted: Wanted, order: tuple[int, ...]) -> tuple[int, bool]:
    """Distance of all pCPUs to the memory, and whether the memory has to be pulled for that."""
    nodes = Counter(terrain.node(c) for c in order)
    main = max(nodes, key=lambda n: (nodes[n], -n))

    def far(homes: Iterable[int]) -> int:
        places = tuple(homes)
        return sum(k * min(terrain.distance(n, h) for h in places) for n, k in nodes.items())

    if not wanted.home:
        return far((main,)), False
    stay = far(wanted.home)
    if main in wanted.pullable and main not in wanted.home:
        follow = far((main,))
        if follow < stay:
            return follow, True
    return stay, False


def _broken(terrain: Terrain, order: tuple[int, ...], free: AbstractSet[int]) -> int:
    """Cores used in part: 1 for each, 2 where another dedicated guest has the rest."""
    own = set(order)
    parts = {core for cpu in order if not (core := terrain.siblings(cpu)) <= own}
    return sum(2 if (core & terrain.managed) - own - free else 1 for core in parts)


def describe_offer(terrain: Terrain, wanted: Wanted, offer: Offer, best: Offer) -> str:
    """The offer in words, and what it lost on against the best one."""
    parts = [*_changes(terrain, wanted, offer.order), _where(terrain, wanted, offer.order)]
    if offer.cost[1]:
        parts.append("shares a core with others")
    if offer.cost[3]:
        used = CpuSet(terrain.housekeeping & set(offer.order))
        parts.append(f"takes housekeeping pCPU {used}")
    text = "; ".join(parts)
    if offer is best:
        return text
    for word, mine, its in zip(COST_WORDS, offer.cost, best.cost, strict=False):
        if mine != its:
            return f"{text}; lost on {word}: {mine} against {its}"
    return f"{text}; equal, but pCPU {best.order[0]} comes first"


def _changes(terrain: Terrain, wanted: Wanted, order: tuple[int, ...]) -> list[str]:
    old, new = set(wanted.held), set(order)
    words = []
    if old & new:
        words.append(f"keeps pCPU {CpuSet(old & new)}")
    added = new - old
    beside = {c for c in added if terrain.siblings(c) & old & new}
    if beside:
        words.append(f"adds {'its sibling' if len(beside) == 1 else 'siblings'} {CpuSet(beside)}")
    if added - beside:
        words.append(f"adds pCPU {CpuSet(added - beside)}" if old else f"pCPU {CpuSet(new)}")
    if old - new:
        words.append(f"gives up pCPU {CpuSet(old - new)}")
    return [", ".join(words)]


def _where(terrain: Terrain, wanted: Wanted, order: tuple[int, ...]) -> str:
    nodes = CpuSet(terrain.node(c) for c in order)
    _, pulled = _locality(terrain, wanted, order)
    if pulled:
        return f"its memory is pulled after it to node {nodes}"
    if wanted.home and nodes <= wanted.home:
        return f"node {nodes} is where its memory is"
    if wanted.home:
        return f"node {nodes}, its memory is on node {CpuSet(wanted.home)}"
    return f"all on node {nodes}" if len(nodes) == 1 else f"spread over nodes {nodes}"
