"""Whether a CXL region can be made of these memdevs in this window. Pure; it chooses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.cxl import ALIGNMENT
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.model.cxl import CxlInventory, Memdev, Region, Serial, Window

_WAYS: Final = (1, 2, 3, 4, 6, 8, 12, 16)
_GRANULARITIES: Final = tuple(256 << shift for shift in range(7))
"""Both as the decoders can do them (CXL 3.1, 8.2.4.20)."""


def check_region(
    inventory: CxlInventory, base: int, members: Sequence[Serial], size: int, granularity: int
) -> Refusal | None:
    """Why a volatile region of `size` bytes cannot be made; None when it can, as far as is known.

    Args:
        inventory: the host's CXL memory.
        base: where the window begins.
        members: in the order of interleaving.
        size: of the whole region.
        granularity: of the interleaving.
    """
    window = inventory.window_at(base)
    if window is None or not window.size:
        known = ", ".join(f"{w.base:#x}" for w in inventory.windows) or "none"
        return Refusal(Reason.UNKNOWN_ID, f"there is no window at {base:#x}; there are {known}")
    return (
        _check_members(inventory, members)
        or _check_shape(members, size, granularity)
        or _check_sizes(inventory, window, members, size)
        or _check_places(inventory, window, members)
        or _check_order(inventory, window)
    )


def _check_members(inventory: CxlInventory, members: Sequence[Serial]) -> Refusal | None:
    for serial in members:
        there = [m for m in inventory.memdevs if m.serial == serial]
        if not there:
            return Refusal(Reason.UNKNOWN_ID, f"there is no memdev with the serial {serial}")
        unfit = next((m for m in there if not m.usable), None)
        if unfit is not None:
            detail = f"memdev {serial} is not used: {'; '.join(unfit.problems)}"
            return Refusal(Reason.DEVICE_IN_USE, detail)
        holder = next((r for r in inventory.regions if serial in r.members), None)
        if holder is not None:
            whose = "this agent made" if holder.ours else "somebody made by hand"
            detail = f"memdev {serial} is part of {holder.name}, which {whose}"
            return Refusal(Reason.DEVICE_IN_USE, detail)
    if len(set(members)) != len(members):
        return Refusal(Reason.INVALID_ARGUMENT, "a memdev is named twice for one region")
    return None


def _check_shape(members: Sequence[Serial], size: int, granularity: int) -> Refusal | None:
    ways = len(members)
    if ways not in _WAYS:
        detail = f"{ways} memdevs: a region has {', '.join(map(str, _WAYS))} of them"
        return Refusal(Reason.INVALID_ARGUMENT, detail)
    if granularity not in _GRANULARITIES:
        known = ", ".join(map(str, _GRANULARITIES))
        detail = f"granularity {granularity}: it can be {known} bytes"
        return Refusal(Reason.INVALID_ARGUMENT, detail)
    if size <= 0 or size % (ALIGNMENT * ways):
        step = Bytes(ALIGNMENT * ways)
        detail = f"size {Bytes(size)}: a region of {ways} memdevs is a multiple of {step}"
        return Refusal(Reason.INVALID_ARGUMENT, detail)
    return None


def _check_sizes(
    inventory: CxlInventory, window: Window, members: Sequence[Serial], size: int
) -> Refusal | None:
    share = size // len(members)
    small = next((s for s in members if inventory.usable[s].ram < share), None)
    if small is not None:
        has = inventory.usable[small].ram
        detail = f"memdev {small} has {has} of volatile memory, its share would be {Bytes(share)}"
        return Refusal(Reason.NO_CAPACITY, detail)
    if not window.ram:
        return Refusal(Reason.NO_CAPACITY, f"window {window.base:#x} takes no volatile memory")
    left = window.size - sum(r.size for r in inventory.regions if r.window == window.name)
    if size > left:
        detail = f"window {window.base:#x} has {Bytes(max(0, left))} left of {window.size}"
        return Refusal(Reason.NO_CAPACITY, f"{detail}, {Bytes(size)} are asked for")
    return None


def _check_places(
    inventory: CxlInventory, window: Window, members: Sequence[Serial]
) -> Refusal | None:
    """Every member must be behind the host bridge whose turn it is."""
    bridges = len(window.targets)
    if not bridges or len(members) % bridges:
        detail = f"window {window.base:#x} is interleaved over {bridges} host bridges"
        return Refusal(Reason.NO_PLACEMENT, f"{detail}, and {len(members)} memdevs are named")
    for position, serial in enumerate(members):
        bridge = window.targets[position % bridges]
        if inventory.usable[serial].port not in inventory.behind(bridge):
            detail = f"memdev {serial} is not behind {bridge}, whose turn it is in position"
            return Refusal(Reason.NO_PLACEMENT, f"{detail} {position}")
    return None


def _check_order(inventory: CxlInventory, window: Window) -> Refusal | None:
    """The decoders of a host bridge are committed in the order of addresses (measured, 6.12)."""
    higher = next((r for r in inventory.regions if _is_above(inventory, r, window)), None)
    if higher is None:
        return None
    detail = f"{higher.name} is at a higher address behind the same host bridge: end it first"
    return Refusal(Reason.NO_PLACEMENT, detail)


def _is_above(inventory: CxlInventory, region: Region, window: Window) -> bool:
    own = next((w for w in inventory.windows if w.name == region.window), None)
    return own is not None and own.base > window.base and bool({*own.targets} & {*window.targets})


def order_members(
    inventory: CxlInventory, window: Window, members: Sequence[Serial]
) -> tuple[Serial, ...]:
    """Members so that each is behind the host bridge whose turn it is, else as they were given."""
    waiting: list[Memdev] = [inventory.usable[s] for s in members if s in inventory.usable]
    ordered: list[Serial] = []
    for position in range(len(members)):
        reach = inventory.behind(window.targets[position % len(window.targets)])
        fit = next((m for m in waiting if m.port in reach), None)
        if fit is None or fit.serial is None:
            return tuple(members)
        waiting.remove(fit)
        ordered.append(fit.serial)
    return tuple(ordered)
