"""Repairs: functions that are not where the books have them, after a start, a crash or a surprise.

Owns what is attached again and what is detached. The books stay as they are: nothing is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.device import Found, HeldFunction
from virtfabric.model.guest import RunState
from virtfabric.policy.functions import Allotment, Move
from virtfabric.policy.nearness import memory_nodes, pullable_nodes
from virtfabric.policy.pools import pool_of
from virtfabric.policy.stock import Stock, functions_of
from virtfabric.policy.tiers import on_returnable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.model.device import PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot


def held_after(snapshot: HostSnapshot, allotment: Allotment) -> dict[PciAddress, HeldFunction]:
    """Every function that somebody holds afterwards, as granted or as named in its own XML."""
    holdings = snapshot.books.holdings
    held = {g: h.functions for g, h in holdings.items() if h.functions} | allotment.after
    named = (function for holding in holdings.values() for function in holding.named)
    granted = (function for functions in held.values() for function in functions)
    return {function.address: function for function in (*named, *granted)}


def choose_repairs(snapshot: HostSnapshot, guests: Iterable[GuestId]) -> Allotment:
    """Attach what these guests hold and do not have; detach what this agent attached unbooked.

    Only for guests that run. A function that vanished or is in quarantine is not attached, nor
    one that somebody else has, nor more than the guest has ports for.
    """
    stock = Stock(snapshot)
    leaving: list[Move] = []
    coming: list[Move] = []
    pulls: dict[GuestId, int] = {}
    for guest in sorted(guests):
        state = snapshot.guests.get(guest)
        if state is None or not state.managed or state.state is not RunState.RUNNING:
            continue
        surplus = [_surplus(snapshot, a) for a in _unbooked(stock, state)]
        missing = _missing(stock, state)[: state.free_ports + len(surplus)]
        leaving += [Move(guest, function) for function in surplus]
        coming += [Move(guest, function) for function in missing]
        node = _pull(snapshot, state, missing)
        if node is not None:
            pulls[guest] = node
    return Allotment(leaving=tuple(leaving), coming=tuple(coming), pulls=pulls)


def _unbooked(stock: Stock, state: GuestState) -> list[PciAddress]:
    ours = (device.address for device in state.devices if device.ours)
    return [a for a in ours if stock.holders.get(a) != state.uuid]


def _surplus(snapshot: HostSnapshot, address: PciAddress) -> HeldFunction:
    """What is known of a function that the books do not have: what its pool says."""
    pool = pool_of(snapshot.devices, address)
    if pool is None:
        return HeldFunction("", address)
    found = Found(pool.match.driver or None, profile=pool.profile, vfio_driver=pool.vfio_driver)
    return HeldFunction(pool.capability, address, found)


def _missing(stock: Stock, state: GuestState) -> list[HeldFunction]:
    attached = {device.address for device in state.devices}
    if on_returnable(state, stock.snapshot):
        return []
    there = stock.inventory.functions
    return [
        held for held in functions_of(stock.snapshot, state.uuid)
        if held.address not in attached and not stock.objections(held.address)
        and stock.is_viable(there[held.address], state.uuid, stock.holders)
    ]  # fmt: skip


def _pull(snapshot: HostSnapshot, state: GuestState, missing: Iterable[HeldFunction]) -> int | None:
    """Where a movable guest's memory goes before its first function pins it; None to stay."""
    home = memory_nodes(snapshot, state.uuid)
    pullable = pullable_nodes(snapshot, state, state.memory_current)
    for held in missing:
        function = snapshot.devices.functions.get(held.address)
        node = function.node if function else None
        if node is not None and home and node not in home and node in pullable:
            return node if snapshot.topology.nodes[node].cpus else None
    return None
