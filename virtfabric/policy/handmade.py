"""Functions that a guest's own XML names: what is against them, and the steps that make them ready.

With `managed='yes'` libvirt binds and nothing is to be done but to count them as used. With
`managed='no'` they are brought to vfio-pci, or to the vfio driver that their pool names, before the
guest starts, and back after it ended. Profiles are the operator's here: no capability asks for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.device import VFIO_PCI, Found, HeldFunction
from virtfabric.model.devicesteps import BindDriver, ResetFunction
from virtfabric.model.errors import Reason, Refusal
from virtfabric.policy.faults import count_fatal
from virtfabric.policy.pools import is_bound_for_guests, vfio_driver_of
from virtfabric.policy.stock import functions_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.device import PciAddress, PciFunction
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books, HostSnapshot

BY_HAND: Final = ""
"""Capability of a function that was not granted for any: the guest's XML names it."""


def names_functions(guest: GuestState) -> bool:
    """Whether its XML names functions that this agent did not attach."""
    return any(not device.ours for device in guest.devices)


@dataclass(frozen=True, slots=True)
class Binding:
    """Steps, and the functions that a guest's XML names as they are held afterwards."""

    steps: tuple[BindDriver, ...]
    named: tuple[HeldFunction, ...]


def plan_binding(snapshot: HostSnapshot, guest: GuestState) -> Binding | Refusal:
    """What makes the functions ready that a starting guest's XML names."""
    held = {f.address: f for f in _named(snapshot, guest.uuid)}
    ready: dict[PciAddress, HeldFunction] = {}
    steps: list[BindDriver] = []
    for device in guest.devices:
        if device.ours or device.address in ready:
            continue
        refusal = _check_claims(snapshot, guest, device.address)
        if refusal is None and not device.managed:
            refusal = _check_host(snapshot, guest, device.address)
        if refusal is not None:
            return refusal
        known = held.get(device.address)
        found = Found(fatal_errors=count_fatal(snapshot.devices, device.address))
        found = found if known is None else known.found
        if not device.managed:
            moved = {step.address for step in steps}
            own, siblings = _to_bind(snapshot, guest, device.address, moved)
            driver = vfio_driver_of(snapshot.devices, device.address)
            steps += [_bind(guest, one, VFIO_PCI) for one in siblings]
            steps += [_bind(guest, one, driver) for one in own]
            if own or siblings:
                function = snapshot.devices.functions[device.address]
                found = replace(_way_back(found, function, own, siblings), vfio_driver=driver)
        ready[device.address] = HeldFunction(BY_HAND, device.address, found)
    return Binding(tuple(steps), tuple(ready.values()))


def plan_unbinding(
    snapshot: HostSnapshot, guest: GuestId, name: str
) -> tuple[ResetFunction | BindDriver, ...]:
    """What brings the functions that a guest's XML named back to the drivers that they had.

    All are reset first: the host must not find anything of the guest. Of the guest's own granted
    functions nothing is done: they go back as such, by its departure.
    """
    there = snapshot.devices.functions
    bound = [f for f in reversed(_named(snapshot, guest)) if f.found.driver is not None]
    resets = [
        ResetFunction(guest=guest, name=name, address=function.address)
        for function in bound
        if function.address in there
        and is_bound_for_guests(snapshot.devices, there[function.address], function.found)
    ]
    granted = {function.address for function in functions_of(snapshot, guest)}
    homes: dict[PciAddress, str] = {}
    for function in bound:
        homes[function.address] = function.found.driver or ""
        homes |= {a: driver for a, driver in function.found.siblings if a not in granted}
    binds = [
        BindDriver(guest=guest, name=name, address=address, before=now, after=driver)
        for address, driver in homes.items()
        if address in there and (now := there[address].driver or "") != driver
    ]
    return (*resets, *binds)


def with_named(books: Books, guest: GuestId, named: tuple[HeldFunction, ...]) -> Books:
    """These as the functions that a guest's XML names; nothing for one that holds nothing."""
    holding = books.holdings.get(guest)
    if holding is None:
        return books
    return replace(books, holdings=books.holdings | {guest: replace(holding, named=named)})


# -- what is against it -----------------------------------------------------------------------


def _check_claims(snapshot: HostSnapshot, guest: GuestState, address: PciAddress) -> Refusal | None:
    """Who else has it, and quarantine: whoever binds."""
    if address not in snapshot.devices.functions:
        return Refusal(Reason.UNKNOWN_ID, f"this host has no PCI function {address}")
    quarantine = snapshot.books.quarantine.get(address)
    if quarantine is not None:
        return Refusal(
            Reason.DEVICE_IN_USE,
            f"{address} is in quarantine: {quarantine.why} ({quarantine.remedy})",
        )
    holder = _holder(snapshot, guest.uuid, address)
    if holder:
        return Refusal(Reason.DEVICE_IN_USE, f"guest {holder} has {address}")
    return None


def _check_host(snapshot: HostSnapshot, guest: GuestState, address: PciAddress) -> Refusal | None:
    """What the host itself has against it, of the function and of its IOMMU group."""
    function = snapshot.devices.functions[address]
    if function.bridge:
        return Refusal(Reason.DEVICE_IN_USE, f"{address} is a bridge or port of the host")
    if function.uses:
        return Refusal(Reason.DEVICE_IN_USE, f"the host uses {address}: {_uses(function)}")
    if function.vfs:
        return Refusal(
            Reason.DEVICE_IN_USE, f"{address} has {len(function.vfs)} VFs, which would be lost"
        )
    if function.group is None:
        return Refusal(
            Reason.GROUP_NOT_VIABLE, f"{address} has no IOMMU group: is the IOMMU switched on?"
        )
    for sibling in snapshot.devices.group_of(address):
        why = _sibling_in_the_way(snapshot, guest, sibling)
        if why:
            return Refusal(
                Reason.GROUP_NOT_VIABLE,
                f"{address} shares IOMMU group {function.group} with {sibling.address}, {why}",
            )
    return None


def _sibling_in_the_way(snapshot: HostSnapshot, guest: GuestState, sibling: PciFunction) -> str:
    if sibling.bridge:  # the kernel lets ports be: their driver does no DMA
        return ""
    if sibling.uses:
        return f"which the host uses: {_uses(sibling)}"
    if sibling.vfs:
        return f"which has {len(sibling.vfs)} VFs"
    holder = _holder(snapshot, guest.uuid, sibling.address)
    return f"which guest {holder} has" if holder else ""


def _uses(function: PciFunction) -> str:
    return ", ".join(map(str, function.uses))


def _holder(snapshot: HostSnapshot, guest: GuestId, address: PciAddress) -> str:
    """Name of another guest that has a function, by the books or by its live XML; "" for none."""
    for other, holding in snapshot.books.holdings.items():
        if other != guest and any(f.address == address for f in holding.claims):
            state = snapshot.guests.get(other)
            return state.name if state else str(other)
    for state in snapshot.guests.values():
        others = state.devices if state.active and state.uuid != guest else ()
        if any(device.address == address for device in others):
            return state.name
    return ""


def _named(snapshot: HostSnapshot, guest: GuestId) -> tuple[HeldFunction, ...]:
    holding = snapshot.books.holdings.get(guest)
    return holding.named if holding else ()


# -- what is to be done -----------------------------------------------------------------------


def _to_bind(
    snapshot: HostSnapshot, guest: GuestState, address: PciAddress, moved: set[PciAddress]
) -> tuple[list[PciFunction], list[PciFunction]]:
    """The function and those of its group that another driver has than vfio is to open it under.

    A sibling without a driver does no harm; a function without one cannot be given to QEMU.
    """
    named = {device.address for device in guest.devices}
    function = snapshot.devices.functions[address]
    ready = function.driver in (VFIO_PCI, vfio_driver_of(snapshot.devices, address))
    own = [] if ready or address in moved else [function]
    return own, list(_foreign_siblings(snapshot, address, named | moved))


def _foreign_siblings(
    snapshot: HostSnapshot, address: PciAddress, besides: set[PciAddress]
) -> Iterator[PciFunction]:
    for sibling in snapshot.devices.group_of(address):
        harmless = sibling.bridge or sibling.driver in (None, VFIO_PCI)
        if not harmless and sibling.address not in besides:
            yield sibling


def _bind(guest: GuestState, function: PciFunction, driver: str) -> BindDriver:
    return BindDriver(
        guest=guest.uuid, name=guest.name, address=function.address,
        before=function.driver or "", after=driver,
    )  # fmt: skip


def _way_back(
    found: Found, function: PciFunction, own: list[PciFunction], siblings: list[PciFunction]
) -> Found:
    """Of a function that an operator bound to vfio before, that is where it goes back to."""
    driver = found.driver
    if own or driver is None:
        driver = function.driver or ""
    drivers = dict(found.siblings) | {one.address: one.driver or "" for one in siblings}
    return replace(found, driver=driver, siblings=tuple(drivers.items()))
