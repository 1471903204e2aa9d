"""Terms: how many functions one guest may hold and must keep, and what bars it from any.

Owns the rules for one guest. It must not look at which functions there are (`policy.stock`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.capability import device_key
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.policy.stock import functions_of
from virtfabric.policy.tiers import on_returnable

if TYPE_CHECKING:
    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.policy import DevicePolicy


def wish_of(guest: GuestState, key: Key) -> DevicePolicy | None:
    """What its policy says of a capability; None where it does not name it."""
    wishes = guest.policy.devices if guest.policy else ()
    return next((wish for wish in wishes if device_key(wish.capability) == key), None)


def device_bounds(
    guest: GuestState, key: Key, held: int, snapshot: HostSnapshot
) -> tuple[int, int]:
    """Floor and ceiling of functions with one capability.

    What a policy asks for is a wish until the guest holds it, and its floor from then on, unless
    the policy says `reclaimable="yes"`. The ceiling is what the policy asks for, for any other
    capability what the guest has ports for.
    """
    wish = wish_of(guest, key)
    floor = 0 if wish is None or wish.reclaimable else min(held, wish.count)
    ceiling = held + spare_ports(guest, snapshot) if guest.active else held
    if wish is not None:
        ceiling = min(ceiling, wish.count) if guest.active else wish.count
    return floor, max(floor, ceiling)


def spare_ports(guest: GuestState, snapshot: HostSnapshot) -> int:
    """How many functions more it can be given: free ports, less those that are on their way."""
    attached = {device.address for device in guest.devices}
    held = functions_of(snapshot, guest.uuid)
    return max(0, guest.free_ports - sum(f.address not in attached for f in held))


def check_taker(guest: GuestState, snapshot: HostSnapshot) -> Refusal | None:
    """Why a guest cannot be given any function now; None when it can."""
    if guest.state is RunState.PAUSED:
        return Refusal(Reason.NOT_RUNNING, f"{guest.name} is paused; resume it first")
    returnable = on_returnable(guest, snapshot)
    if returnable:
        cxl = "CXL " if returnable <= snapshot.topology.cxl_nodes else ""
        detail = (
            f"{guest.name} has memory on {cxl}node {returnable}, which has no CPUs and can be "
            "taken back: a function pins all memory of a guest, and the kernel would move these "
            "pages away first; keep it on nodes with CPUs, or ask for a guest that is"
        )
        return Refusal(Reason.STRANDS_MEMORY, detail)
    holding = snapshot.books.holdings.get(guest.uuid)
    lent = guest.mechanism is MemoryMechanism.BALLOON and snapshot.lend_ballooned
    if lent and holding is not None and holding.amounts.memory < guest.memory_max:
        detail = (
            f"{guest.name} has given memory away by its balloon, and a function would pin all of "
            f"it; bring it to {guest.memory_max} of memory first"
        )
        return Refusal(Reason.NO_MECHANISM, detail)
    return None
