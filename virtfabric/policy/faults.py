"""Faults: fatal PCIe errors that were counted while a guest had a function.

Owns whose counters tell of a function: its own, its PF's, and those of the ports above, as a fatal
error resets the link and hits all that is behind it. What follows from one is for others to know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.device import DeviceInventory, Found, PciAddress, PciFunction
    from virtfabric.model.ledger import Books


def count_fatal(inventory: DeviceInventory, address: PciAddress) -> int | None:
    """All that was counted since the host booted; None where nothing counts."""
    counts = [one.fatal_errors for one in _tellers(inventory, address)]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def describe_fault(inventory: DeviceInventory, address: PciAddress, found: Found) -> str:
    """What was counted since it was prepared for a guest, in words; "" for nothing."""
    before, now = found.fatal_errors, count_fatal(inventory, address)
    if before is None or now is None or now <= before:
        return ""
    errors = (
        "a fatal PCIe error was" if now - before == 1 else f"{now - before} fatal PCIe errors were"
    )
    return f"{errors} counted at it or above it while a guest had it (AER, see dmesg)"


def find_faults(books: Books, inventory: DeviceInventory) -> dict[PciAddress, str]:
    """Of all functions with guests and in quarantine those that had any, in words."""
    found = [(f.address, f.found) for h in books.holdings.values() for f in h.claims]
    found += [(entry.address, entry.found) for entry in books.quarantine.values()]
    told = {address: describe_fault(inventory, address, way) for address, way in found}
    return {address: words for address, words in told.items() if words}


def _tellers(inventory: DeviceInventory, address: PciAddress) -> Iterator[PciFunction]:
    function = inventory.functions.get(address)
    if function is None:
        return
    yield function
    pf = inventory.functions.get(function.pf) if function.pf is not None else None
    if pf is not None:
        yield pf
    yield from inventory.above(address)
