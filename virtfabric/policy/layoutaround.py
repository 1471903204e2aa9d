"""The layout around functions: a guest that is given one has its memory where that will be pinned.

Owns only this: whose memory counts as bound from here on, and whose pCPUs follow it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.device import GuestDevice
from virtfabric.model.errors import Refusal
from virtfabric.model.units import CpuSet
from virtfabric.policy.layout import Layout, choose_layout
from virtfabric.policy.nearness import cpu_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.amounts import Amounts
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.policy.functions import Allotment


def choose_layout_around(
    snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts], allotment: Allotment
) -> Layout | Refusal:
    """As `choose_layout`, for the host as it will be once the functions are where they go.

    pCPUs of a guest that is pulled follow its memory where there are free ones; else they stay.
    """
    if not allotment.coming:
        return choose_layout(snapshot, amounts)
    then = _with_functions(snapshot, allotment)
    far = [
        guest for guest, node in allotment.pulls.items()
        if (nodes := cpu_nodes(snapshot, guest)) and nodes != {node}
    ]  # fmt: skip
    if far:
        follows = choose_layout(_unseated(then, far), amounts)
        if not isinstance(follows, Refusal) and _is_nearer(snapshot, follows, allotment, far):
            return follows
    return choose_layout(then, amounts)


def _with_functions(snapshot: HostSnapshot, allotment: Allotment) -> HostSnapshot:
    guests = dict(snapshot.guests)
    for guest, function in allotment.coming:
        state = guests.get(guest)
        if state is None:
            continue
        devices = (*state.devices, GuestDevice(function.address))
        pulled = allotment.pulls.get(guest)
        nodes = state.numa_nodes if pulled is None else CpuSet((pulled,))
        guests[guest] = replace(state, devices=devices, numa_nodes=nodes)
    return replace(snapshot, guests=guests)


def _unseated(snapshot: HostSnapshot, guests: list[GuestId]) -> HostSnapshot:
    """These guests are placed anew, the others keep their seats."""
    holdings = dict(snapshot.books.holdings)
    for guest in guests:
        holdings[guest] = replace(holdings[guest], order=())
    return replace(snapshot, books=replace(snapshot.books, holdings=holdings))


def _is_nearer(
    snapshot: HostSnapshot, layout: Layout, allotment: Allotment, guests: list[GuestId]
) -> bool:
    """Whether each of them has more of its pCPUs on its new node than before."""
    pcpus = snapshot.topology.pcpus

    def local(guest: GuestId, order: tuple[int, ...]) -> int:
        return sum(pcpus[cpu].node == allotment.pulls[guest] for cpu in order if cpu in pcpus)

    holdings = snapshot.books.holdings
    return all(local(g, layout.orders.get(g, ())) > local(g, holdings[g].order) for g in guests)
