"""The way back of a function that no guest holds: reset, its settings and its driver as before.

Owns the undertaking that sends one home and, if asked, lets it out of quarantine with that. Whether
it may go is for who calls to know.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.daemon.custody import released
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.model.device import HeldFunction
from virtfabric.model.devicesteps import ResetFunction
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import Plan
from virtfabric.policy.functionrepairs import held_after
from virtfabric.policy.functions import NO_CHANGE
from virtfabric.policy.functionsteps import FunctionSteps
from virtfabric.policy.stepper import DEADLINE_S

if TYPE_CHECKING:
    from virtfabric.model.decision import Decision
    from virtfabric.model.device import Quarantine
    from virtfabric.model.ids import RequestId
    from virtfabric.model.ledger import Books, HostSnapshot

NO_GUEST = GuestId("00000000-0000-0000-0000-000000000000")
"""Whom the steps of a function are for that no guest has."""
NOBODY = "no guest"


def homeward(entry: Quarantine, by: str, *, lift: bool) -> Undertaking:
    """The undertaking that brings a function in quarantine back to how it was.

    Args:
        entry: as it stands in the books.
        by: who wants it.
        lift: whether it may be given to guests again when all of it was done and verified, and
            nothing worse came to light meanwhile.
    """
    request = new_request()
    address = entry.address

    def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
        holder = user_of(snapshot, entry)
        if holder:
            detail = f"{holder} has {address}; take it away from there first"
            return Refusal(Reason.DEVICE_IN_USE, detail)
        return plan_home(snapshot, entry, request)

    def settle(books: Books) -> Books:
        now = books.quarantine.get(address)
        worse = now is not None and now.condemned and not entry.condemned
        return released(books, address) if lift and not worse else books

    return Undertaking(
        request,
        f"release of {address} from quarantine" if lift else f"return of {address}",
        place,
        settle_books=settle,
        body={"address": address, "by": by, "why": entry.why, "devices": [address]},
    )


def user_of(snapshot: HostSnapshot, entry: Quarantine) -> str:
    """The guest that has a function, by the books or in its live machine; empty for none."""
    for uuid, guest in snapshot.guests.items():
        holding = snapshot.books.holdings.get(uuid)
        held = {f.address for f in holding.claims} if holding else set()
        live = {d.address for d in guest.devices} if guest.active else set()
        if entry.address in held | live:
            return guest.name
    return ""


def plan_home(snapshot: HostSnapshot, entry: Quarantine, request: RequestId) -> Plan:
    """All of it or nothing; no step for a function that is not there any more."""
    steps = FunctionSteps(snapshot, held_after(snapshot, NO_CHANGE), DEADLINE_S)
    function = HeldFunction("", entry.address, entry.found)
    steps.leave(NO_GUEST, function, passes=False)
    found = snapshot.devices.functions.get(entry.address)
    strict = tuple(
        replace(step, name=NOBODY, optional=False)
        for step in steps.returns
        # where the kernel knows no reset, whoever releases it vouches for it
        if not isinstance(step, ResetFunction) or (found is not None and found.resets)
    )
    return Plan(request, snapshot.generation, strict)
