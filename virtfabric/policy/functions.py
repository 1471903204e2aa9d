"""Functions: which PCIe functions come and go when amounts change. It decides no amounts (arbiter).

A guest keeps what it holds. What leaves leaves first; then each guest that gains is given the best
of what its pool has by then (`functionoffers`). No function is with two guests, none of one IOMMU
group either, and none that the host, a stranger or a running plan has is ever chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.capability import capability_of, device_key
from virtfabric.model.device import Found, HeldFunction, VfSettings
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy.faults import count_fatal
from virtfabric.policy.functionoffers import Asker, make_function_offers
from virtfabric.policy.nearness import memory_nodes, pullable_nodes
from virtfabric.policy.pools import pool_of, vfio_driver_of
from virtfabric.policy.stock import Stock, device_amounts, functions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.model.amounts import Amounts, Key
    from virtfabric.model.device import DeviceInventory, DevicePool, PciAddress, PciFunction
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Offer


class Move(NamedTuple):
    """A function that a guest gets or gives up."""

    guest: GuestId
    function: HeldFunction


@dataclass(frozen=True, slots=True)
class Allotment:
    """Who has which functions, and how it comes to that.

    Attributes:
        after: all functions afterwards of each guest whose functions change.
        leaving, coming: in the order in which they were chosen; a function may be in both.
        pulls: node that a movable guest's memory follows a function to.
        retired: functions that leave a guest and are used once only.
    """

    after: dict[GuestId, tuple[HeldFunction, ...]] = field(default_factory=dict)
    leaving: tuple[Move, ...] = ()
    coming: tuple[Move, ...] = ()
    pulls: dict[GuestId, int] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()
    retired: tuple[PciAddress, ...] = ()


NO_CHANGE: Final = Allotment()


def choose_functions(
    snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts], guests: Iterable[GuestId]
) -> Allotment | Refusal:
    """Which functions come and go.

    Args:
        snapshot: the host.
        amounts: what each guest holds afterwards; nothing where it is not in it.
        guests: those whose amounts change, in the order in which they choose.
    """
    due = {g: _due(snapshot, g, amounts.get(g)) for g in guests}
    due = {guest: changes for guest, changes in due.items() if changes}
    if not due:
        return NO_CHANGE
    deal = _Deal(Stock(snapshot))
    for guest, changes in due.items():
        deal.take(guest, {key: -by for key, by in changes.items() if by < 0})
    for guest, changes in due.items():
        for key, by in sorted(changes.items()):
            if by > 0:
                memory = amounts[guest].memory
                refusal = deal.give(guest, key, by, memory)
                if refusal is not None:
                    return refusal
    return deal.finish(due)


def _due(snapshot: HostSnapshot, guest: GuestId, after: Amounts | None) -> dict[Key, int]:
    """By how many functions of each capability the guest's holding is off."""
    due = device_amounts(after) if after is not None else {}
    for function in functions_of(snapshot, guest):
        key = device_key(function.capability)
        due[key] = due.get(key, 0) - 1
    return {key: by for key, by in due.items() if by}


class _Deal:
    """Who has what while functions change hands."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self.snapshot = stock.snapshot
        self.holders = dict(stock.holders)
        self.leaving: list[Move] = []
        self.coming: list[Move] = []
        self.pulls: dict[GuestId, int] = {}
        self.offers: list[Offer] = []

    def take(self, guest: GuestId, given: Mapping[Key, int]) -> None:
        """A guest gives up so many of each."""
        for function in self.stock.leaving(guest, given):
            self.leaving.append(Move(guest, function))
            del self.holders[function.address]

    def give(self, guest: GuestId, key: Key, count: int, memory: int) -> Refusal | None:
        """A guest gets so many; None when it did."""
        members = self.stock.members(key)
        candidates = [one for one in members if self._is_open(one, guest)]
        offers = make_function_offers(self._asker(guest, memory), candidates, count)
        if not offers:
            return self._too_few(guest, key, count, members, candidates)
        best = offers[0]
        self.offers += [offer.shown(guest, chosen=offer is best) for offer in offers]
        if best.pull is not None:
            self.pulls[guest] = best.pull
        for function in best.functions:
            self.holders[function.address] = guest
            one = self.stock.inventory.slices.get(function.address)
            held = HeldFunction(
                capability_of(key) or "", function.address, slice=one.key if one else ""
            )
            self.coming.append(Move(guest, held))
        return None

    def _is_open(self, function: PciFunction, guest: GuestId) -> bool:
        left = any(move.function.address == function.address for move in self.leaving)
        if function.address in self.holders or (
            left and not self.stock.is_reusable(function.address)
        ):
            return False
        return not self.stock.objections(function.address) and self.stock.is_viable(
            function, guest, self.holders
        )

    def _asker(self, guest: GuestId, memory: int) -> Asker:
        state = self.snapshot.guests.get(guest)
        home, pullable = memory_nodes(self.snapshot, guest), frozenset[int]()
        if guest in self.pulls:
            home = frozenset((self.pulls[guest],))
        elif state is not None and state.active:
            nodes = self.snapshot.topology.nodes
            pullable = frozenset(
                n for n in pullable_nodes(self.snapshot, state, memory) if nodes[n].cpus
            )
        return Asker(self.stock, guest, home, pullable, self.holders)

    def _too_few(
        self,
        guest: GuestId,
        key: Key,
        count: int,
        members: Iterable[PciFunction],
        candidates: list[PciFunction],
    ) -> Refusal:
        state = self.snapshot.guests.get(guest)
        considered = tuple(
            f"{one.address}: {'; '.join(why)}"
            for one in members if (why := self.stock.withheld(one, guest))
        )  # fmt: skip
        working = any(one.address in self.snapshot.working for one in members)
        detail = (
            f"{state.name if state else guest}: {key}: needs {count} functions, "
            f"{len(candidates)} can be given to it"
        )
        reason = Reason.BUSY if working else Reason.GROUP_NOT_VIABLE
        return Refusal(reason, detail, {str(key.resource): len(candidates)}, considered)

    def finish(self, guests: Iterable[GuestId]) -> Allotment:
        """What came of it, with the way back of every function."""
        origins = _Origins(self.stock, self.holders)
        after: dict[GuestId, tuple[HeldFunction, ...]] = {}
        coming = []
        for guest in guests:
            kept = [
                f for f in functions_of(self.snapshot, guest)
                if self.holders.get(f.address) == guest
            ]  # fmt: skip
            kept = [replace(f, found=origins.regrouped(f)) for f in kept]
            new = [
                replace(move.function, found=origins.of(move.function))
                for move in self.coming if move.guest == guest
            ]  # fmt: skip
            coming += [Move(guest, function) for function in new]
            after[guest] = tuple(sorted((*kept, *new), key=lambda f: f.address.parts))
        retired = tuple(
            move.function.address for move in self.leaving
            if (pool := pool_of(self.stock.inventory, move.function.address)) is not None
            and pool.one_time_use
        )  # fmt: skip
        return Allotment(
            after, tuple(self.leaving), tuple(coming), self.pulls, tuple(self.offers), retired
        )


class _Origins:
    """What was found of each function before any guest had it."""

    def __init__(self, stock: Stock, holders: Mapping[PciAddress, GuestId]) -> None:
        self.stock = stock
        self.holders = holders
        self.found: dict[PciAddress, Found] = {}
        self.drivers: dict[PciAddress, str] = {}
        for holding in stock.snapshot.books.holdings.values():
            for held in holding.claims:
                self.found[held.address] = held.found
                self.drivers |= dict(held.found.siblings)
        own = {a: f.driver for a, f in self.found.items() if f.driver is not None}
        self.drivers |= own

    def of(self, held: HeldFunction) -> Found:
        """Of a function that is given now, perhaps by another guest."""
        inventory = self.stock.inventory
        function, pool = inventory.functions[held.address], pool_of(inventory, held.address)
        former = self.found.get(held.address)
        settings = former.settings if former else replaced_settings(function, pool)
        port = next(inventory.above(held.address), None)
        limit = pool.link_speed if pool and port is not None else None
        return Found(
            self._driver(function), settings, self._siblings(inventory, held.address),
            port.address if port is not None and limit else None, limit or 0,
            count_fatal(inventory, held.address), pool.profile if pool else None,
            vfio_driver_of(inventory, held.address),
        )  # fmt: skip

    def regrouped(self, held: HeldFunction) -> Found:
        """Of a function that stays: its group may have changed hands in part."""
        inventory = self.stock.inventory
        siblings = self._siblings(inventory, held.address)
        if held.address not in inventory.functions:  # it vanished, its group did not
            known = held.found.siblings
            siblings = tuple(pair for pair in known if pair[0] not in self.holders)
        return replace(held.found, siblings=siblings)

    def _driver(self, function: PciFunction) -> str:
        return self.drivers.get(function.address, function.driver or "")

    def _siblings(
        self, inventory: DeviceInventory, address: PciAddress
    ) -> tuple[tuple[PciAddress, str], ...]:
        alike = sorted(inventory.group_of(address), key=lambda one: one.address.parts)
        return tuple(
            (one.address, self._driver(one))
            for one in alike
            if one.address not in self.holders and not one.bridge and one.class_code >> 16 != 0x06
        )


def replaced_settings(function: PciFunction, pool: DevicePool | None) -> VfSettings:
    """Of what a VF has now, the part that its pool sets; empty where that is not known."""
    if pool is None or function.pf is None or function.settings is None:
        return VfSettings()
    now, wanted = function.settings, pool.settings
    return VfSettings(
        mac=now.mac if wanted.mac is not None else None,
        vlan=now.vlan if wanted.vlan is not None else None,
        trust=now.trust if wanted.trust is not None else None,
        spoofchk=now.spoofchk if wanted.spoofchk is not None else None,
        rate=now.rate if wanted.rate is not None else None,
    )
