"""Homecall: the memory of one CXL node comes back from the guests that have it.

Owns who has memory there, who of them can be asked, and in which order: as the arbiter's, the
lowest priority first. How much each can give is for `reclaim` to say.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import CXL_KEY
from virtfabric.model.guest import RunState
from virtfabric.model.units import Bytes
from virtfabric.policy.reclaim import plan_reclaim, victim_of
from virtfabric.policy.returnability import why_it_stays
from virtfabric.policy.standing import held_of, line_of
from virtfabric.policy.tiers import bytes_on, device_nodes, fixed_parts, part_of
from virtfabric.policy.victims import pressure_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.reclaim import Claim, ReclaimPlan
    from virtfabric.policy.reclaim import Reports

NOTHING: Final[Mapping[GuestId, int]] = MappingProxyType({})


class Homecall(NamedTuple):
    """What can be done about a node.

    Attributes:
        plan: who is asked for what.
        empty: devices that hold nothing and leave their guests, by guest and alias.
        others: sentences about memory of the node that cannot be asked for.
    """

    plan: ReclaimPlan
    empty: tuple[tuple[GuestId, str], ...]
    others: tuple[str, ...]


def size_on(snapshot: HostSnapshot, node: int) -> int:
    """Bytes that guests have of a node, unmanaged ones included."""
    guests = (guest for guest in snapshot.guests.values() if guest.active)
    return sum(sum(bytes_on(guest, node)) for guest in guests)


def waiting_for(guest: GuestState, snapshot: HostSnapshot) -> int:
    """Bytes of CXL memory that a guest is entitled to and has no room for: a call ends that, too.

    Else what it gives would be what it has not got.
    """
    part = part_of(guest, CXL_KEY, snapshot.topology.cxl_nodes)
    has = part.boot + sum(int(device.requested) for device in part.devices)
    return max(0, held_of(snapshot, guest.uuid)[CXL_KEY] - has)


def plan_homecall(
    snapshot: HostSnapshot,
    claim: Claim,
    reports: Reports,
    *,
    given_up: Collection[GuestId] = (),
    freed: Mapping[GuestId, int] = NOTHING,
) -> Homecall:
    """Who is asked for the memory of `claim.node`.

    Args:
        snapshot: the host; its `recall` names the node.
        claim: of CXL memory.
        reports: what guests told of their memory.
        given_up: guests that are not asked again.
        freed: what guests gave since they were first asked.
    """
    node = claim.node
    assert node is not None
    victims, empty, others = [], [], []
    for guest in _in_order(snapshot):
        _, moving = bytes_on(guest, node)
        idle = [
            (guest.uuid, device.alias)
            for device in guest.virtio_mem
            if node in device_nodes(guest, device) and not (device.requested or device.current)
        ]
        others += _staying(guest, node)
        if not moving and not idle:
            continue
        if why := _why_not(guest):
            if moving:
                others.append(f"{guest.name}: {Bytes(moving)} stay: {why}")
        elif guest.uuid not in given_up:
            empty += idle if claim.detach else []
            report = reports.get(guest.uuid)
            asked = guest.uuid in reports
            spent = freed.get(guest.uuid, 0)
            one = victim_of(guest, CXL_KEY, snapshot, report, asked=asked, node=node, spent=spent)
            waiting = waiting_for(guest, snapshot)
            victims.append(one._replace(most=max(0, one.most - waiting)))
    return Homecall(plan_reclaim(claim, victims), tuple(empty), tuple(others))


def _in_order(snapshot: HostSnapshot) -> list[GuestState]:
    def turn(guest: GuestState) -> tuple[int, int, GuestId]:
        line = line_of(guest, CXL_KEY, snapshot)
        priority = guest.policy.priority if guest.policy else 0
        return priority, pressure_of(line.held - line.floor, line.shares), guest.uuid

    return sorted((g for g in snapshot.guests.values() if g.active), key=turn)


def _staying(guest: GuestState, node: int) -> list[str]:
    """What of its memory of the node cannot be asked for, as it is no virtio-mem."""
    return [
        f"{guest.name}: {part.size} stay ({part.what}): {why_it_stays(part)}"
        for part in fixed_parts(guest)
        if node in part.host_nodes
    ]


def _why_not(guest: GuestState) -> str:
    """Why a guest cannot be asked; empty where it can."""
    if not guest.managed:
        return "it is unmanaged, and never touched"
    if guest.state is not RunState.RUNNING:
        return "it is paused, and answers nobody"
    return f"it has a job running: {guest.job}" if guest.detained else ""
