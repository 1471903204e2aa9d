"""The way back of a function that no guest holds: reset, its settings and its driver as before.

Owns the undertaking that sends one home and, if asked, lets it out of quarantine with that. Whether
it may go is for who calls to know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.daemon.custody import released
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.model.device import VFIO_PCI
from virtfabric.model.devicesteps import BindDriver, LimitLink, ResetFunction, SetUpVf
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.decision import Decision
    from virtfabric.model.device import DeviceInventory, Quarantine
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.step import Step

NO_GUEST = GuestId("00000000-0000-0000-0000-000000000000")
"""Whom the steps of a function are for that no guest has."""
NOBODY = "no guest"


def homeward(entry: Quarantine, by: str, *, lift: bool) -> Undertaking:
    """The undertaking that brings a function in quarantine back to how it was.

    Args:
        entry: as it stands in the books.
        by: who wants it.
        lift: whether it may be given to guests again when all of it was done and verified.
    """
    request = new_request()
    address = entry.address

    def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
        holder = user_of(snapshot, entry)
        if holder:
            detail = f"{holder} has {address}; take it away from there first"
            return Refusal(Reason.DEVICE_IN_USE, detail)
        return plan_home(snapshot.devices, entry, request, snapshot.generation)

    return Undertaking(
        request,
        f"release of {address} from quarantine" if lift else f"return of {address}",
        place,
        settle_books=lambda books: released(books, address) if lift else books,
        body={"address": address, "by": by, "why": entry.why, "devices": [address]},
    )


def user_of(snapshot: HostSnapshot, entry: Quarantine) -> str:
    """The guest that has a function, by the books or in its live machine; empty for none."""
    for uuid, guest in snapshot.guests.items():
        holding = snapshot.books.holdings.get(uuid)
        held = {f.address for f in holding.functions} if holding else set()
        live = {d.address for d in guest.devices} if guest.active else set()
        if entry.address in held | live:
            return guest.name
    return ""


def plan_home(
    devices: DeviceInventory, entry: Quarantine, request: RequestId, generation: int
) -> Plan:
    """The steps of it; none for a function that is not there any more."""
    return Plan(request, generation, tuple(_steps(devices, entry)))


def _steps(devices: DeviceInventory, entry: Quarantine) -> Iterator[Step]:
    function, found = devices.functions.get(entry.address), entry.found
    if function is None:
        return
    if function.resets:
        yield ResetFunction(guest=NO_GUEST, name=NOBODY, address=function.address, optional=False)
    if found.port is not None and found.port in devices.functions:
        yield LimitLink(
            guest=NO_GUEST, name=NOBODY, address=found.port, before=found.speed, after=0
        )
    if found.settings and function.settings:
        yield SetUpVf(
            guest=NO_GUEST, name=NOBODY, address=function.address, before=function.settings,
            after=found.settings,
        )  # fmt: skip
    homes = ((function.address, found.driver), *found.siblings)
    for address, driver in homes:
        now = devices.functions.get(address)
        if driver is not None and now is not None and now.driver == VFIO_PCI != driver:
            yield BindDriver(
                guest=NO_GUEST, name=NOBODY, address=address, before=VFIO_PCI, after=driver
            )
