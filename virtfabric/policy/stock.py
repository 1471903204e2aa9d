"""Stock: which PCIe functions are there to be given, and to whom.

Owns what stands between a function and a guest beside the host's own use (`policy.pools`): who
has it, who has one of its group, quarantine, and plans that run. It must not choose (functions).

Functions count by capability. What nobody holds is in stock where nothing is against it; what a
guest holds counts as well, whatever became of it since, so that the books always add up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from virtfabric.model.capability import capability_of, device_key
from virtfabric.model.ids import GuestId
from virtfabric.policy.faults import find_faults
from virtfabric.policy.nearness import remoteness
from virtfabric.policy.pools import members, obstacles, pool_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from virtfabric.model.amounts import Amounts, Key
    from virtfabric.model.device import DeviceInventory, HeldFunction, PciAddress, PciFunction
    from virtfabric.model.ledger import HostSnapshot


def device_amounts(amounts: Amounts) -> dict[Key, int]:
    """Only the coordinates that count functions."""
    return {k: v for k, v in amounts.items() if capability_of(k) is not None}


def functions_of(snapshot: HostSnapshot, guest: GuestId) -> tuple[HeldFunction, ...]:
    """What the books say that it holds, attached or not."""
    holding = snapshot.books.holdings.get(guest)
    return holding.functions if holding else ()


@dataclass(frozen=True)
class Stock:
    """The functions of one snapshot; looks at each at most once."""

    snapshot: HostSnapshot

    @property
    def inventory(self) -> DeviceInventory:
        """All functions and pools."""
        return self.snapshot.devices

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """One coordinate for each capability that has a pool."""
        return tuple(sorted({device_key(pool.capability) for pool in self.inventory.pools}))

    @cached_property
    def holders(self) -> dict[PciAddress, GuestId]:
        """Who holds what by the books, as granted or as named in its own XML."""
        holdings = self.snapshot.books.holdings
        return {f.address: g for g, h in holdings.items() for f in h.claims}

    @cached_property
    def strangers(self) -> dict[PciAddress, str]:
        """Functions that a guest has beside the books, with its name: none of ours to give.

        Attached by hand, named in the definition of a guest that runs, or all of an unmanaged one.
        Not what a running plan attaches: the books have it when the plan ends, until then it is
        reserved.
        """
        found = {}
        for uuid, guest in self.snapshot.guests.items():
            if guest.active and (guest.devices or guest.config_devices):
                for device in (*guest.devices, *guest.config_devices):
                    address = device.address
                    if self.holders.get(address) != uuid and address not in self.snapshot.working:
                        found[address] = guest.name
        return found

    @cached_property
    def _assignable(self) -> dict[Key, tuple[PciFunction, ...]]:
        return {
            key: tuple(
                one for one in self.members(key)
                if one.address not in self.holders and not self.objections(one.address)
            )
            for key in self.keys
        }  # fmt: skip

    @cached_property
    def _faults(self) -> dict[PciAddress, str]:
        """Not in quarantine yet, but not to be passed on either."""
        return find_faults(self.snapshot.books, self.inventory)

    def members(self, key: Key) -> tuple[PciFunction, ...]:
        """The pool's functions, held or not, in address order."""
        return members(self.inventory, capability_of(key) or "")

    def in_stock(self, key: Key) -> tuple[PciFunction, ...]:
        """Functions of a pool that nobody holds and nothing is against, in address order."""
        return self._assignable.get(key, ())

    def capacity(self) -> dict[Key, int]:
        """How many there are of each capability: in stock, and held."""
        holdings = self.snapshot.books.holdings.values()
        held = [holding.amounts for holding in holdings if holding.functions]
        return {k: len(self.in_stock(k)) + sum(a[k] for a in held) for k in self.keys}

    def objections(self, address: PciAddress) -> tuple[str, ...]:
        """Why nobody can be given it, who holds it aside; empty when somebody can."""
        found = list(obstacles(self.inventory, address))
        quarantine = self.snapshot.books.quarantine.get(address)
        if quarantine is not None:
            found.append(f"quarantined: {quarantine.why} ({quarantine.remedy})")
        if quarantine is None and address in self._faults:
            found.append(self._faults[address])
        if address in self.strangers:
            found.append(f"{self.strangers[address]} has it, which this agent did not give it")
        for sibling in self.inventory.group_of(address):
            if sibling.vfs:
                found.append(f"{sibling.address} of its IOMMU group would lose its VFs")
            if sibling.address in self.strangers:
                name = self.strangers[sibling.address]
                found.append(f"{name} has {sibling.address} of its IOMMU group")
        return tuple(found)

    def is_viable(
        self, function: PciFunction, guest: GuestId, holders: dict[PciAddress, GuestId]
    ) -> bool:
        """Whether no other guest has a function of its group, nor a running plan.

        A slice that was made for somebody is nobody else's.
        """
        if self._keeper(function, guest):
            return False
        alike = (function, *self.inventory.group_of(function.address))
        return all(
            holders.get(one.address, guest) == guest and one.address not in self.snapshot.working
            for one in alike
        )

    def _keeper(self, function: PciFunction, guest: GuestId) -> str:
        """Whom the slice that the function is was made for; empty if it may be this guest's.

        Who held it as a function gives it up together with the slice.
        """
        one = self.inventory.slices.get(function.address)
        if one is None or one.holder in ("", guest) or function.address in self.holders:
            return ""
        return one.holder

    def open_to(self, guest: GuestId, key: Key) -> list[PciFunction]:
        """What is in stock for this guest: two guests never have functions of one group."""
        return [f for f in self.in_stock(key) if self.is_viable(f, guest, self.holders)]

    def withheld(self, function: PciFunction, guest: GuestId) -> tuple[str, ...]:
        """Why this guest cannot be given a function that nobody holds; empty for one that is held.

        For people, in a refusal.
        """
        if function.address in self.holders:
            return ()
        found = list(self.objections(function.address))
        keeper = self._keeper(function, guest)
        if keeper:
            found.append(f"it is a slice for {self._name(GuestId(keeper))}")
        for one in (function, *self.inventory.group_of(function.address)):
            if self.holders.get(one.address, guest) != guest:
                name = self._name(self.holders[one.address])
                found.append(f"{name} holds {one.address} of its IOMMU group")
            if one.address in self.snapshot.working:
                found.append(f"a running plan works on {one.address}")
        return tuple(found)

    def is_used(self, function: PciFunction) -> bool:
        """Whether the host or somebody's own hand has it."""
        return bool(function.uses) or function.address in self.strangers

    def is_grouped(self, function: PciFunction, guest: GuestId) -> bool:
        """Whether its IOMMU group is what keeps it from this guest; nothing else does."""
        if function.group is None:
            return True
        return not self.is_used(function) and any(
            self.is_used(one) or self.holders.get(one.address, guest) != guest
            for one in self.inventory.group_of(function.address)
        )

    def _name(self, guest: GuestId) -> str:
        state = self.snapshot.guests.get(guest)
        return state.name if state else guest

    def is_reusable(self, address: PciAddress) -> bool:
        """Whether a function that one guest gives up may go to another."""
        pool = pool_of(self.inventory, address)
        once = pool is not None and pool.one_time_use
        return address in self.inventory.functions and not once and not self.objections(address)

    def is_alone(self, function: HeldFunction, own: Collection[PciAddress]) -> bool:
        """Whether none of these other functions is in its IOMMU group."""
        return not any(s.address in own for s in self.inventory.group_of(function.address))

    def detachable(self, guest: GuestId, key: Key) -> int:
        """How many of a guest's functions can be taken for another guest.

        Not those that are used once only, nor any that shares a group with another of its own: of
        two in one group it gives neither, also where both are wanted, as a victim gives function
        by function and the first could go to nobody.
        """
        held = functions_of(self.snapshot, guest)
        own = {function.address for function in held}
        return sum(
            device_key(f.capability) == key
            and self.is_reusable(f.address)
            and self.is_alone(f, own)
            for f in held
        )

    def leaving(self, guest: GuestId, given: Mapping[Key, int]) -> tuple[HeldFunction, ...]:
        """Which functions a guest gives up.

        Those that another guest can have, then the farthest from its memory and CPUs, then the
        last.
        """
        held = functions_of(self.snapshot, guest)
        own = {function.address for function in held}
        found: list[HeldFunction] = []
        for key, count in sorted(given.items()):
            mine = [f for f in held if device_key(f.capability) == key]
            mine.sort(key=lambda f: (
                not (self.is_alone(f, own) and self.is_reusable(f.address)),
                -remoteness(self.snapshot, guest, f.address),
                tuple(-n for n in f.address.parts),
            ))  # fmt: skip
            found += mine[: max(0, count)]
        return tuple(found)

    def passable(self, guest: GuestId, given: Mapping[Key, int]) -> dict[Key, int]:
        """How many of the functions that a guest gives up can go on to others, by capability.

        One for each IOMMU group that it leaves for good: two guests never share one.
        """
        out = self.leaving(guest, given)
        left = {f.address for f in functions_of(self.snapshot, guest)} - {f.address for f in out}
        groups: dict[Key, set[int | None]] = {}
        for one in out:
            function = self.inventory.functions.get(one.address)
            if function and self.is_reusable(one.address) and self.is_alone(one, left):
                groups.setdefault(device_key(one.capability), set()).add(function.group)
        # one that two capabilities share may be needed whole by either: it counts for none
        times = Counter(group for found in groups.values() for group in found)
        return {k: sum(times[group] == 1 for group in found) for k, found in groups.items()}
