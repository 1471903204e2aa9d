"""Wishes: functions that policies ask for and guests do not hold yet.

Owns who is asked for, and in which order, when a guest has started or capacity came back. Whether
a wish comes true is decided as any other request (`arbiter.choose_allocation`, `partial`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.capability import device_key
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import RunState
from virtfabric.model.want import Mode, Want
from virtfabric.policy.changes import check_subject
from virtfabric.policy.deviceterms import check_taker, spare_ports
from virtfabric.policy.standing import held_of, tally
from virtfabric.policy.victims import Market

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot


def unmet_wishes(snapshot: HostSnapshot) -> dict[GuestId, Mapping[str, Want]]:
    """What to request for whom, so that something of it can be had now.

    Returns:
        `Request.devices` for each guest, highest priority first, then by UUID; guests that would
        be given nothing are left out.
    """
    if not snapshot.devices.pools:
        return {}
    counted = tally(snapshot)
    found: dict[GuestId, Mapping[str, Want]] = {}
    for guest in sorted(counted.guests, key=_turn):
        if guest.state is not RunState.RUNNING or not guest.policy or not guest.policy.devices:
            continue
        if isinstance(check_subject(snapshot, guest.uuid), Refusal):
            continue
        if check_taker(guest, snapshot) is None and spare_ports(guest, snapshot):
            market = Market(snapshot, guest, {}, counted)
            wants = _wants(market, guest)
            if wants:
                found[guest.uuid] = wants
    return found


def _turn(guest: GuestState) -> tuple[int, GuestId]:
    return -(guest.policy.priority if guest.policy else 0), guest.uuid


def _wants(market: Market, guest: GuestState) -> dict[str, Want]:
    held = held_of(market.snapshot, guest.uuid)
    wishes = guest.policy.devices if guest.policy else ()
    room = spare_ports(guest, market.snapshot)
    wants = {}
    for wish in wishes:
        key = device_key(wish.capability)
        more = min(wish.count - held[key], market.available(key), room)
        if more > 0:
            wants[wish.capability] = Want(Mode.TO, held[key] + more)
            room -= more
    return wants
