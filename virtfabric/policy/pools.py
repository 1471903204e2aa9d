"""Pools: which functions have a capability, which can be assigned, and whom it would hit. Pure.

It knows the host, not the guests: who holds a function, and which are in quarantine, is for its
callers to add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.device import VFIO_PCI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtfabric.model.device import (
        DeviceInventory,
        DevicePool,
        Found,
        PciAddress,
        PciFunction,
    )

_BRIDGES: Final = 0x06
"""The base class of all bridges, also of those to ISA and of the host, whose header is plain."""

_HARMLESS: Final = (None, VFIO_PCI, "pci-stub")
"""Drivers under which a function does not keep its IOMMU group from a guest."""


def members(inventory: DeviceInventory, capability: str) -> tuple[PciFunction, ...]:
    """The functions with this capability, by address; also those that cannot be assigned now."""
    found = []
    for function in inventory.functions.values():
        pool = pool_of(inventory, function.address)
        if pool is not None and pool.capability == capability:
            found.append(function)
    return tuple(sorted(found, key=lambda function: function.address.parts))


def pool_of(inventory: DeviceInventory, address: PciAddress) -> DevicePool | None:
    """The first pool that matches; None for none, and for what the host does not have."""
    function = inventory.functions.get(address)
    if function is None or _is_bridge(function):
        return None
    return next((pool for pool in inventory.pools if _matches(pool, function)), None)


def vfio_driver_of(inventory: DeviceInventory, address: PciAddress) -> str:
    """The driver under which a guest is given it: what its pool says."""
    pool = pool_of(inventory, address)
    return pool.vfio_driver if pool else VFIO_PCI


def is_bound_for_guests(inventory: DeviceInventory, function: PciFunction, found: Found) -> bool:
    """Whether it may be as a guest left it: the driver is one under which one had it.

    That is vfio-pci, the one that is known of it, and the one that its pool names now.
    """
    drivers = (VFIO_PCI, found.vfio_driver, vfio_driver_of(inventory, function.address))
    return function.driver in drivers


def is_set_up(inventory: DeviceInventory, address: PciAddress) -> bool:
    """Whether its pool says what its PF is to keep for it."""
    pool = pool_of(inventory, address)
    return pool is not None and bool(pool.settings)


def obstacles(inventory: DeviceInventory, address: PciAddress) -> tuple[str, ...]:
    """Why the host cannot give the function to any guest, one reason each; empty if it can."""
    function = inventory.functions.get(address)
    if function is None:
        return ("does not exist on this host",)
    if _is_bridge(function):
        return ("is a bridge or port",)
    found = [f"the host uses it ({use})" for use in function.uses]
    if address in inventory.doubts:
        found.append(inventory.doubts[address])
    if function.group is None:
        found.append("has no IOMMU group (is the IOMMU switched on?)")
    found += _vfs_in_the_way(inventory, function)
    for sibling in sorted(inventory.group_of(address), key=lambda one: one.address.parts):
        found += _sibling_in_the_way(inventory, sibling)
    return tuple(found)


def blast_radius(
    inventory: DeviceInventory, address: PciAddress
) -> tuple[tuple[PciFunction, str], ...]:
    """Who else feels it when this function is given, reset or its link limited.

    Returns:
        Functions without the bridges, each once with what it shares, the tightest first:
        `group` (IOMMU), `PF` (the PF of a VF and its other VFs, or the VFs of a PF), `port` (right
        below the same port), `link` (further below a port that it is behind), by address within.
    """
    function = inventory.functions.get(address)
    if function is None:
        return ()
    ports = [bridge.address for bridge in inventory.above(address)]
    shares: tuple[tuple[str, Callable[[PciFunction], bool]], ...] = (
        ("group", lambda one: one.group is not None and one.group == function.group),
        ("PF", lambda one: _family(one) == _family(function)),
        ("port", lambda one: one.parent in ports[:1]),
        ("link", lambda one: _is_behind(inventory, one, ports)),
    )
    rest = sorted(inventory.functions.values(), key=lambda one: one.address.parts)
    rest = [one for one in rest if one.address != address and not _is_bridge(one)]
    found = []
    for word, shared in shares:
        found += [(one, word) for one in rest if shared(one)]
        rest = [one for one in rest if not shared(one)]
    return tuple(found)


def _is_bridge(function: PciFunction) -> bool:
    return function.bridge or function.class_code >> 16 == _BRIDGES


def _family(function: PciFunction) -> PciAddress:
    """The PF of a VF; any other is its own."""
    return function.pf or function.address


def _is_behind(inventory: DeviceInventory, function: PciFunction, ports: list[PciAddress]) -> bool:
    return any(bridge.address in ports for bridge in inventory.above(function.address))


def _matches(pool: DevicePool, function: PciFunction) -> bool:
    match = pool.match
    return (
        (function.badge is not None) == pool.slices
        and (not match.addresses or function.address in match.addresses)
        and (not match.ids or function.ids in match.ids)
        and f"{function.class_code:06x}".startswith(match.class_prefix)
        and match.pf in (None, function.pf)
        and match.vfs in (None, function.pf is not None)
        and _has_driver(pool, function)
    )


def _has_driver(pool: DevicePool, function: PciFunction) -> bool:
    """Whether the function is bound to the driver, or is not bound because a guest has it.

    What a function had before its vfio driver cannot be seen, so one that is away stays in its
    pool if everything else matches. Where nothing else is asked for, that would take in every
    function of that driver, the operator's own ones too; then only the driver itself counts.
    """
    match = pool.match
    if not match.driver or function.driver == match.driver:
        return True
    away = function.driver in (None, VFIO_PCI, pool.vfio_driver)
    return away and bool(match.addresses or match.ids or match.class_prefix or match.pf)


def _vfs_in_the_way(inventory: DeviceInventory, pf: PciFunction) -> Iterator[str]:
    """A PF takes its VFs with it when its driver goes."""
    vfs = [inventory.functions[vf] for vf in pf.vfs if vf in inventory.functions]
    used = [vf.address for vf in vfs if vf.uses or vf.driver == VFIO_PCI]
    if used:
        yield f"its VFs are in use: {', '.join(used)}"
    elif vfs:
        yield "is a PF with VFs"


def _sibling_in_the_way(inventory: DeviceInventory, sibling: PciFunction) -> Iterator[str]:
    """vfio takes a whole IOMMU group: no function of it may keep a driver of the host.

    Bridges and ports keep theirs: those do no DMA of their own (driver_managed_dma of pcieport,
    Linux 6.0).
    """
    if sibling.bridge:
        return
    shared = f"its IOMMU group {sibling.group} has {sibling.address}"
    if sibling.uses:
        yield f"{shared}, which the host uses ({sibling.uses[0]})"
    elif sibling.driver not in _HARMLESS and pool_of(inventory, sibling.address) is None:
        yield f"{shared}, which {sibling.driver} drives and no pool names"
