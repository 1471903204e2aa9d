"""What a guest starts with: CPU up to its vCPUs, the memory it boots with, functions in stock.

A policy's `<device>` is a wish: a start is never refused for it, and takes no function from
anybody, as a guest may let go of one later than libvirt waits for an answer. What is in stock is
reserved now and attached once the guest runs; the rest follows when capacity comes back
(`policy.wishes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.amounts import Amounts
from virtfabric.model.device import device_key
from virtfabric.model.guest import MemoryMechanism
from virtfabric.policy.deviceterms import memory_on_returnable
from virtfabric.policy.standing import CPU_KEY, MEMORY_KEY, WHOLE_CPU, Line, held_of, line_of
from virtfabric.policy.stock import device_amounts

if TYPE_CHECKING:
    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState
    from virtfabric.policy.victims import Market


def starting_amounts(market: Market, guest: GuestState) -> Amounts:
    """What a guest holds from its start; CPU and functions beyond its floor from free capacity."""
    snapshot = market.snapshot
    amounts = {
        CPU_KEY: _starting_cpu(market, line_of(guest, CPU_KEY, snapshot)),
        MEMORY_KEY: _starting_memory(guest, line_of(guest, MEMORY_KEY, snapshot)),
    }
    return Amounts(amounts | _starting_functions(market, guest))


def _starting_functions(market: Market, guest: GuestState) -> dict[Key, int]:
    held = device_amounts(held_of(market.snapshot, guest.uuid))
    wishes = guest.policy.devices if guest.policy else ()
    if memory_on_returnable(guest, market.snapshot):
        return held
    for wish in wishes:
        key = device_key(wish.capability)
        held[key] = max(held.get(key, 0), min(wish.count, market.free_of(key)))
    return held


def _starting_cpu(market: Market, line: Line) -> int:
    online = max(1, market.borrower.vcpus_online) * WHOLE_CPU
    spare = min(line.ceiling, online, market.free_of(CPU_KEY))
    return max(line.floor, line.round_down(spare))


def _starting_memory(guest: GuestState, line: Line) -> int:
    match guest.mechanism:
        case MemoryMechanism.VIRTIO_MEM:
            # At `prepare` the device has nothing yet, but it is asked for this much from the start.
            plugged = sum(max(int(d.requested), int(d.current)) for d in guest.virtio_mem)
            return line.round_up(max(line.floor, int(guest.boot_memory) + plugged))
        case MemoryMechanism.BALLOON:
            # A guest boots with all of it and deflates nothing before its driver is up.
            return max(line.floor, int(guest.memory_max))
        case MemoryMechanism.FIXED:
            return line.floor
