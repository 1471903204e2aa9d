"""Who uses slices of cards beside the books: the host, or a guest by somebody's own hand. Pure.

Such a slice ends for nobody: its PCI function would go from under who has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.policy.stock import Stock

if TYPE_CHECKING:
    from virtfabric.model.ledger import HostSnapshot


def find_users(snapshot: HostSnapshot) -> dict[str, str]:
    """By the key of the slice, who uses it and how, in words."""
    strangers = Stock(snapshot).strangers
    found = {}
    for address, one in snapshot.devices.slices.items():
        uses = snapshot.devices.functions[address].uses
        if uses:
            found[one.key] = f"the host uses its function {address}: {', '.join(map(str, uses))}"
        elif address in strangers:
            found[one.key] = f"{strangers[address]} has its function {address}"
    return found
