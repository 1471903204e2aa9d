"""Which function is which slice: what functions claim, against what their cards say. Pure.

A card proves who it is on its link, a function does not. So a function is a slice only if the card
that it names told the very same code for that slice, and no other function shows it. A card says
nothing about functions that do not name it: of another card's, or of a NIC, it cannot take hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.adapter import AdapterId, SliceId
from virtfabric.model.badge import SliceFunction
from virtfabric.model.card import CardCondition
from virtfabric.model.device import DevicePool, Match

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.badge import Badge
    from virtfabric.model.card import CardView
    from virtfabric.model.device import DeviceInventory, PciAddress


def join_slices(inventory: DeviceInventory, cards: Mapping[AdapterId, CardView]) -> DeviceInventory:
    """The same with what its functions are of cards, and a pool for each capability of those."""
    if not inventory.badged:
        return inventory
    shown = Counter(badge.code for badge in inventory.badged.values())
    slices: dict[PciAddress, SliceFunction] = {}
    doubts: dict[PciAddress, str] = {}
    for address, badge in inventory.badged.items():
        doubt = f"another function shows the badge of {badge} as well"
        found: SliceFunction | str = doubt
        if shown[badge.code] == 1:
            found = _confirm(badge, cards.get(AdapterId(badge.card)))
        if isinstance(found, str):
            doubts[address] = found
        else:
            slices[address] = found
            if not cards[found.card].is_usable:
                doubts[address] = f"card {found.card} is {cards[found.card].condition}"
    pools = (*inventory.pools, *_pools(slices))
    return replace(inventory, pools=pools, slices=slices, doubts=doubts)


def _confirm(badge: Badge, card: CardView | None) -> SliceFunction | str:
    """The slice, or why it is not believed."""
    if card is None:
        return f"says that it is {badge}, which is not in the configuration ([cards])"
    if card.condition is CardCondition.DISTRUSTED or card.books is None:
        return f"says that it is {badge}, and that card is {card.condition}"
    name = SliceId(badge.slice)
    one = card.books.slices.get(name)
    if one is None or card.badges.get(name) != badge.code:
        return f"says that it is {badge}, which that card does not confirm"
    return SliceFunction(card.serial, name, one.request, one.seat.capability, one.holder)


def _pools(slices: Mapping[PciAddress, SliceFunction]) -> Iterable[DevicePool]:
    by_capability: dict[str, set[PciAddress]] = {}
    for address, one in slices.items():
        if one.capability:
            by_capability.setdefault(one.capability, set()).add(address)
    for capability, addresses in sorted(by_capability.items()):
        yield DevicePool(capability, Match(addresses=frozenset(addresses)), slices=True)
