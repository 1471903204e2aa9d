"""What a guest starts with: CPU up to its vCPUs, the memory it boots with, functions in stock.

A policy's `<device>` is a wish: a start is never refused for it, and takes no function from
anybody, as a guest may let go of one later than libvirt waits for an answer. What is in stock is
reserved now and attached once the guest runs; the rest follows when capacity comes back
(`policy.wishes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.amounts import CPU_KEY, CXL_KEY, MEMORY_KEY, Amounts
from virtfabric.model.capability import device_key
from virtfabric.model.guest import MemoryMechanism
from virtfabric.policy.standing import WHOLE_CPU, Line, held_of, line_of
from virtfabric.policy.stock import device_amounts
from virtfabric.policy.tiers import on_returnable, part_of

if TYPE_CHECKING:
    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.policy.victims import Market


def starting_amounts(market: Market, guest: GuestState) -> Amounts:
    """What a guest holds from its start; CPU and functions beyond its floor from free capacity."""
    snapshot = market.snapshot
    amounts = {
        CPU_KEY: _starting_cpu(market, line_of(guest, CPU_KEY, snapshot)),
        MEMORY_KEY: _starting_memory(guest, MEMORY_KEY, snapshot),
    }
    if snapshot.topology.cxl_nodes:
        amounts[CXL_KEY] = _starting_memory(guest, CXL_KEY, snapshot)
    return Amounts(amounts | _starting_functions(market, guest))


def _starting_functions(market: Market, guest: GuestState) -> dict[Key, int]:
    held = device_amounts(held_of(market.snapshot, guest.uuid))
    wishes = guest.policy.devices if guest.policy else ()
    if on_returnable(guest, market.snapshot):
        return held
    for wish in wishes:
        key = device_key(wish.capability)
        held[key] = max(held.get(key, 0), min(wish.count, market.free_of(key)))
    return held


def _starting_cpu(market: Market, line: Line) -> int:
    online = max(1, market.borrower.vcpus_online) * WHOLE_CPU
    spare = min(line.ceiling, online, market.free_of(CPU_KEY))
    return max(line.floor, line.round_down(spare))


def _starting_memory(guest: GuestState, key: Key, snapshot: HostSnapshot) -> int:
    line = line_of(guest, key, snapshot)
    part = part_of(guest, key, snapshot.topology.cxl_nodes)
    if key == CXL_KEY and not part.devices:
        return part.boot
    match guest.mechanism:
        case MemoryMechanism.VIRTIO_MEM:
            # At `prepare` the device has nothing yet, but it is asked for this much from the start.
            plugged = sum(max(int(d.requested), int(d.current)) for d in part.devices)
            return line.round_up(max(line.floor, part.boot + plugged))
        case MemoryMechanism.BALLOON:
            # A guest boots with all of it and deflates nothing before its driver is up.
            return max(line.floor, part.most)
        case MemoryMechanism.FIXED:
            return line.floor
