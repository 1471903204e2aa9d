"""What must hold of functions in the books, whatever happened; in words where it does not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from virtfabric.model.capability import device_key
from virtfabric.policy.stock import device_amounts

if TYPE_CHECKING:
    from virtfabric.model.device import DeviceInventory
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books


def check_functions(books: Books, inventory: DeviceInventory) -> list[str]:
    """No function with two guests, none of one IOMMU group either, and counts that agree."""
    problems = []
    groups: dict[int, GuestId] = {}
    times = Counter(f.address for h in books.holdings.values() for f in h.claims)
    problems += [f"{address} is held {n} times" for address, n in times.items() if n > 1]
    for guest, holding in books.holdings.items():
        counts = Counter(device_key(f.capability) for f in holding.functions)
        if dict(counts) != device_amounts(holding.amounts):
            problems.append(f"{guest} holds {dict(counts)} functions, its amounts say otherwise")
        for held in holding.claims:
            function = inventory.functions.get(held.address)
            if function is not None and function.group is not None:
                other = groups.setdefault(function.group, guest)
                if other != guest:
                    problems.append(f"{guest} and {other} share IOMMU group {function.group}")
    return problems


def check_new_functions(before: Books, after: Books) -> list[str]:
    """Nothing in quarantine is given to anybody."""
    held = {(g, f.address) for g, h in before.holdings.items() for f in h.claims}
    return [
        f"{guest} was given {function.address}, which is in quarantine"
        for guest, holding in after.holdings.items()
        for function in holding.claims
        if function.address in before.quarantine and (guest, function.address) not in held
    ]
