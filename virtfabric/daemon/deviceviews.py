"""What `devices` shows: inventory -> JSON-ready values. Pure.

The shapes are documented in docs/dbus-api.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.policy.pools import blast_radius, obstacles, pool_of

if TYPE_CHECKING:
    from virtfabric.model.badge import SliceFunction
    from virtfabric.model.device import DeviceInventory, PciFunction, Quarantine

    Json = dict[str, Any]


def function_view(
    inventory: DeviceInventory,
    function: PciFunction,
    *,
    holder: str | None = None,
    quarantine: Quarantine | None = None,
) -> Json:
    """One function; `holder` is the name of the guest that has it.

    `obstacles` are the host's alone: a function with a holder or in quarantine may have none.
    """
    pool, link = pool_of(inventory, function.address), function.link
    return {
        "address": function.address,
        "ids": function.ids,
        "class": f"{function.class_code:06x}",
        "driver": function.driver,
        "node": function.node,
        "group": function.group,
        "pf": function.pf,
        "vfs": list(function.vfs),
        "vfs_max": function.vfs_max,
        "link": {
            "speed": link.speed, "width": link.width,
            "speed_max": link.speed_max, "width_max": link.width_max,
        },
        "resets": list(function.resets),
        "acs": function.acs,
        "uses": [str(use) for use in function.uses],
        "capability": pool.capability if pool else None,
        "slice": _slice_view(inventory.slices.get(function.address)),
        "holder": holder,
        "quarantine": quarantine.to_json() if quarantine else None,
        "obstacles": list(obstacles(inventory, function.address)),
        "shares": [
            {"address": other.address, "what": what}
            for other, what in blast_radius(inventory, function.address)
        ],
        "interfaces": list(function.interfaces),
        "parent": function.parent,
        "bridge": function.bridge,
    }  # fmt: skip


def _slice_view(one: SliceFunction | None) -> Json | None:
    """The slice that a function is, if it is one that its card confirmed."""
    if one is None:
        return None
    return {"card": one.card, "slice": one.slice, "key": one.key, "for": one.holder}
