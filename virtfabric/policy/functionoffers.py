"""Offers of functions: the ways to give one guest functions of a pool, with cost and reason.

Owns the comparison: near the guest's memory (which a movable guest's may follow, where nothing as
near is to be had without), near its CPUs, and the fewest others who share a group, a PF or a link.
It must not look for who may have what: the caller says which functions there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.plan import Offer
from virtfabric.policy.nearness import cpu_nodes, farness
from virtfabric.policy.pools import blast_radius

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from virtfabric.model.device import PciAddress, PciFunction
    from virtfabric.model.ids import GuestId
    from virtfabric.policy.stock import Stock

COST_WORDS: Final = (
    "distance to its memory", "distance to its CPUs", "others in its IOMMU group",
    "memory pulled", "functions of no known node", "others in use that share PF or link",
)  # fmt: skip
"""What the components of the cost mean; the addresses follow."""
OFFERS_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class FunctionOffer:
    """Functions for one guest.

    Attributes:
        pull: node that the guest's memory is pulled to before; None where it stays.
    """

    functions: tuple[PciFunction, ...]
    pull: int | None
    cost: tuple[int, ...]
    why: str = ""

    def shown(self, guest: GuestId, *, chosen: bool) -> Offer:
        """As a plan carries it."""
        return Offer(guest, (), self.cost, self.why, chosen)


@dataclass(frozen=True)
class Asker:
    """Whom the functions are for.

    Attributes:
        home: nodes of its memory, empty where nothing is known.
        pullable: nodes that it may be pulled to, empty where it is not movable.
        holders: who has which function by then.
    """

    stock: Stock
    guest: GuestId
    home: frozenset[int]
    pullable: frozenset[int]
    holders: Mapping[PciAddress, GuestId]


def make_function_offers(
    asker: Asker, candidates: Sequence[PciFunction], count: int
) -> list[FunctionOffer]:
    """Ways to give `count` of these, best first; empty when there are too few."""
    if not 0 < count <= len(candidates):
        return []
    found: dict[tuple[tuple[PciAddress, ...], int | None], FunctionOffer] = {}
    for pull in _pulls(asker, candidates):
        costs = {one.address: _cost_of_one(asker, one, pull) for one in candidates}
        ranked = sorted(candidates, key=lambda one: (costs[one.address], one.address.parts))
        for functions in _sets(ranked, count):
            offer = _offer(asker, functions, pull, costs)
            found[tuple(f.address for f in offer.functions), pull] = offer
    offers = sorted(found.values(), key=lambda offer: offer.cost)[:OFFERS_SHOWN]
    return [replace(offer, why=_why(asker, offer, offers[0])) for offer in offers]


def _pulls(asker: Asker, candidates: Iterable[PciFunction]) -> Iterator[int | None]:
    yield None
    nodes = {one.node for one in candidates if one.node is not None}
    if asker.home:
        yield from sorted(nodes & asker.pullable - asker.home)


def _sets(ranked: list[PciFunction], count: int) -> Iterator[list[PciFunction]]:
    """The best set, and those in which the last one is another."""
    yield ranked[:count]
    for other in ranked[count : count + OFFERS_SHOWN - 1]:
        yield [*ranked[: count - 1], other]


def _cost_of_one(asker: Asker, function: PciFunction, pull: int | None) -> tuple[int, ...]:
    topology = asker.stock.snapshot.topology
    home = asker.home if pull is None else {pull}
    radius = blast_radius(asker.stock.inventory, function.address)
    group = [one for one, shares in radius if shares == "group"]
    return (
        farness(topology, function.node, home),
        farness(topology, function.node, cpu_nodes(asker.stock.snapshot, asker.guest)),
        sum(asker.holders.get(one.address) != asker.guest for one in group),
        # no firmware tells, so it counts as near: but not before one that is known to be
        int(function.node is None),
        sum(_is_in_use(asker, one) for one, shares in radius if shares != "group"),
    )


def _is_in_use(asker: Asker, function: PciFunction) -> bool:
    """By the host or another guest."""
    other = asker.holders.get(function.address, asker.guest) != asker.guest
    return other or asker.stock.is_used(function)


def _offer(
    asker: Asker,
    functions: Iterable[PciFunction],
    pull: int | None,
    costs: Mapping[PciAddress, tuple[int, ...]],
) -> FunctionOffer:
    chosen = tuple(sorted(functions, key=lambda one: one.address.parts))
    summed = tuple(map(sum, zip(*(costs[one.address] for one in chosen), strict=True)))
    order = tuple(number for one in chosen for number in one.address.parts)
    *near, unknown, shared = summed
    return FunctionOffer(chosen, pull, (*near, int(pull is not None), unknown, shared, *order))


def _why(asker: Asker, offer: FunctionOffer, best: FunctionOffer) -> str:
    """The offer in words, and what it lost on against the best one."""
    text = "; ".join(_words(asker, offer))
    if offer is best:
        return text
    for word, mine, its in zip(COST_WORDS, offer.cost, best.cost, strict=False):
        if mine != its:
            return f"{text}; lost on {word}: {mine} against {its}"
    return f"{text}; equal, but {best.functions[0].address} comes first"


def _words(asker: Asker, offer: FunctionOffer) -> Iterator[str]:
    yield "function " + ", ".join(one.address for one in offer.functions)
    nodes = sorted({one.node for one in offer.functions if one.node is not None})
    where = ",".join(map(str, nodes))
    if offer.pull is not None:
        yield f"its memory is pulled to node {offer.pull} first"
    elif nodes and asker.home:
        local = "where its memory is" if asker.home.issuperset(nodes) else "not its memory's"
        yield f"on node {where}, {local}"
    elif nodes:
        yield f"on node {where}"
    if offer.cost[2]:
        yield f"{offer.cost[2]} others of its IOMMU group leave the host with it"
    if offer.cost[4] and len(asker.stock.snapshot.topology.nodes) > 1:
        yield "its node is not known"
    if offer.cost[5]:
        yield f"shares PF or link with {offer.cost[5]} in use by others"
