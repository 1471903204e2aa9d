"""Combining: the fewest adapters that together have what one slice needs, and who gives how much.

What adds up over adapters are cores, memory and accelerator units; a coordinate that is not needed
is left out by the caller. Finding the fewest is covering in several dimensions, which is NP-hard:
the search is exact as long as its budget of steps lasts (it does where there are few candidates),
and else the best that was found; never worse than taking the most helpful one again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from operator import ge, gt, mul
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.model.adapter import AdapterId

_STEPS_FEWEST: Final = 500
_STEPS_CHEAPEST: Final = 500
_PRICE_ROUNDS: Final = 20
"""Budgets: together a few milliseconds. Prices brought 200 random pools of adapters of all shapes
from 2.7 % beyond the fewest (OR-tools CP-SAT) to 0.3 %: benchmarks/bench_combination.py."""
_LEANING: Final = 1.6

_ROUNDING: Final = 1e-9

Give = tuple[int, ...]
"""One figure for each coordinate that is needed."""


@dataclass(frozen=True, slots=True)
class Lot:
    """What one adapter could give; never more than is needed.

    Attributes:
        fill: how much of it is free in all: the less, the less a slice there breaks up.
        distance: 0 is nearest.
    """

    serial: AdapterId
    give: Give
    fill: int = 0
    distance: int = 0

    @property
    def cost(self) -> tuple[int, int]:
        """What to keep low when the number of adapters is the same."""
        return self.fill, self.distance


def choose_lots(need: Give, lots: Sequence[Lot]) -> tuple[Lot, ...] | None:
    """The fewest lots that cover the need; of as few, those with the least fill, then distance.

    None: all together are not enough.
    """
    least = _least_count(need, lots)
    best = _greediest(need, lots, least)
    if best is None:
        return None
    best = _by_price(need, lots, best, least)
    weights = _weightings(need)[0]
    ordered = sorted(lots, key=lambda lot: -_helpfulness(weights, need, lot.give))
    search = _Search(need, ordered, _STEPS_FEWEST)
    for count in range(least, len(best)):
        found = search.find(count)
        if found is not None:
            best = found
            break
    ordered = sorted(lots, key=lambda lot: lot.cost)
    return tuple(_Search(need, ordered, _STEPS_CHEAPEST).find_cheapest(best))


def _greediest(need: Give, lots: Sequence[Lot], least: int) -> list[Lot] | None:
    """The shortest cover that greed finds by any weights; no fewer than `least` can do."""
    best: list[Lot] | None = None
    for weights in _weightings(need):
        found = _most_helpful(need, weights, lots)
        if found is not None and (best is None or len(found) < len(best)):
            best = found
        if best is None or len(best) <= least:
            break  # all together are not enough, or nothing is better
    return best


def divide(need: Give, rooms: Sequence[Give]) -> list[Give]:
    """How much each gives. The smallest rooms are used up, the largest keeps the rest."""
    shares = [[0] * len(need) for _ in rooms]
    for axis, wanted in enumerate(need):
        left = wanted
        for place in sorted(range(len(rooms)), key=lambda place: rooms[place][axis]):
            shares[place][axis] = min(left, rooms[place][axis])
            left -= shares[place][axis]
    return [tuple(share) for share in shares]


def _weightings(need: Give) -> list[tuple[float, ...]]:
    """What a unit of each coordinate counts: as a part of the need; and each in turn for more."""
    even = tuple(1 / wanted for wanted in need)
    if len(need) == 1:
        return [even]
    return [even] + [
        tuple(weight * (_LEANING if axis == heavy else 1) for axis, weight in enumerate(even))
        for heavy in range(len(need))
    ]


def _helpfulness(weights: Sequence[float], left: Give, give: Give) -> float:
    """How much of what is left this covers."""
    return float(sum(map(mul, map(min, left, give), weights)))


def _left(need: Give, give: Give) -> Give:
    return tuple(max(0, n - g) for n, g in zip(need, give, strict=True))


def _most_helpful(need: Give, weights: Sequence[float], lots: Sequence[Lot]) -> list[Lot] | None:
    """Greedy. What a lot helps only ever shrinks, so one that still leads need not be compared."""
    heap = [(-_helpfulness(weights, need, lot.give), place) for place, lot in enumerate(lots)]
    heapify(heap)
    chosen: list[Lot] = []
    left = need
    while any(left):
        if not heap:
            return None
        _, place = heap[0]
        now = -_helpfulness(weights, left, lots[place].give)
        if len(heap) > 1 and now > min(heap[1:3])[0]:
            heapreplace(heap, (now, place))
            continue
        heappop(heap)
        if now < 0:
            chosen.append(lots[place])
            left = _left(left, lots[place].give)
    return chosen


def _by_price(need: Give, lots: Sequence[Lot], best: list[Lot], least: int) -> list[Lot]:
    """One fewer than the best, again and again: those that are worth most at one price each.

    Prices of what they lack rise until they have it all, or the budget is used up. It finds what
    balances coordinates that taking one lot after the other does not, where there are many lots.
    """
    gives, rounds = [lot.give for lot in lots], _PRICE_ROUNDS
    prices = [1 / wanted for wanted in need]
    while rounds and len(best) > least:
        rounds -= 1
        worth = [sum(map(mul, give, prices)) for give in gives]
        order = sorted(range(len(lots)), key=worth.__getitem__, reverse=True)[: len(best) - 1]
        got = [sum(gives[place][axis] for place in order) for axis in range(len(need))]
        if all(map(ge, got, need)):
            best = [lots[place] for place in order]
            prices = [1 / wanted for wanted in need]
        else:
            prices = [
                p * wanted / max(g, 1) for p, wanted, g in zip(prices, need, got, strict=True)
            ]
    return best


def _least_count(need: Give, lots: Sequence[Lot]) -> int:
    """No fewer can do: for each coordinate, how many of the largest it takes."""
    least = 1
    for axis, wanted in enumerate(need):
        total = 0
        sizes = sorted((lot.give[axis] for lot in lots), reverse=True)
        for count, size in enumerate(sizes, 1):
            total += size
            if total >= wanted:
                least = max(least, count)
                break
    return least


class _Search:
    """Depth-first over lots in a given order, with a budget of steps for each object."""

    def __init__(self, need: Give, lots: Sequence[Lot], steps: int) -> None:
        self._need = need
        self._lots = lots
        self._steps = steps
        self._most = _most_behind(len(need), lots)
        self._weights = _weightings(need)[0]
        helps = (_helpfulness(self._weights, need, lot.give) for lot in lots)
        self._helps = list(accumulate(helps, initial=0.0))
        self._best: list[Lot] = []
        self._best_cost = (0, 0)

    def find(self, count: int) -> list[Lot] | None:
        """Any cover of at most so many; None: there is none, or the budget is used up."""
        return self._find(0, count, self._need)

    def _find(self, first: int, count: int, need: Give) -> list[Lot] | None:
        if not any(need):
            return []
        for place in range(first, len(self._lots)):
            if self._is_hopeless(place, count, need) or self._is_thin(place, count, need):
                return None
            lot = self._lots[place]
            if place > first and lot.give == self._lots[place - 1].give:
                continue  # the same was just tried
            rest = self._find(place + 1, count - 1, _left(need, lot.give))
            if rest is not None:
                return [lot, *rest]
        return None

    def find_cheapest(self, known: list[Lot]) -> list[Lot]:
        """The cheapest cover of as many lots as `known` has, which is one. Lots are by cost."""
        self._best, self._best_cost = known, _sum(known)
        self._improve(0, [], (0, 0), self._need)
        return self._best

    def _improve(self, first: int, chosen: list[Lot], cost: tuple[int, int], need: Give) -> None:
        if not any(need):
            if cost < self._best_cost:
                self._best, self._best_cost = chosen, cost
            return
        count = len(self._best) - len(chosen)
        for place in range(first, len(self._lots)):
            lot = self._lots[place]
            at_least = (cost[0] + lot.fill * count, 0)
            if at_least > self._best_cost or self._is_hopeless(place, count, need):
                return
            if place > first and self._is_twin(place):
                continue
            total = (cost[0] + lot.fill, cost[1] + lot.distance)
            self._improve(place + 1, [*chosen, lot], total, _left(need, lot.give))

    def _is_twin(self, place: int) -> bool:
        one, other = self._lots[place - 1], self._lots[place]
        return one.give == other.give and one.cost == other.cost

    def _is_thin(self, place: int, count: int, need: Give) -> bool:
        """Whether the next so many, the most helpful there are from here on, are not enough."""
        end = min(place + count, len(self._lots))
        wanted = float(sum(map(mul, need, self._weights)))
        return self._helps[end] - self._helps[place] < wanted - _ROUNDING

    def _is_hopeless(self, place: int, count: int, need: Give) -> bool:
        self._steps -= 1
        if self._steps < 0 or count <= 0:
            return True
        return any(map(gt, need, (count * most for most in self._most[place])))


def _most_behind(axes: int, lots: Sequence[Lot]) -> list[Give]:
    """For each place, the most that any lot from there on gives of each coordinate."""
    most: list[Give] = [(0,) * axes]
    for lot in reversed(lots):
        most.append(tuple(map(max, most[-1], lot.give)))
    return most[:0:-1]


def _sum(lots: Sequence[Lot]) -> tuple[int, int]:
    return sum(lot.fill for lot in lots), sum(lot.distance for lot in lots)
