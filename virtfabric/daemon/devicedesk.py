"""What people ask about PCIe functions: what there is, and what is to leave quarantine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.daemon.deviceviews import function_view
from virtfabric.daemon.homeward import homeward, user_of
from virtfabric.daemon.undertaking import summary
from virtfabric.model.device import PciAddress
from virtfabric.model.errors import Reason, Refusal, RefusedError
from virtfabric.policy.pools import blast_radius, obstacles

if TYPE_CHECKING:
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.devicewatch import DeviceWatch
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.device import Quarantine
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.ports import AuditLog

    Json = dict[str, Any]


class DeviceDesk:
    """Shows functions and lets them out of quarantine."""

    def __init__(
        self,
        *,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        jobs: Jobs,
        audit: AuditLog,
        watch: DeviceWatch,
    ) -> None:
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._jobs = jobs
        self._audit = audit
        self._watch = watch

    def show(self) -> list[Json]:
        """Every function, by address, with who has it and why it cannot be assigned.

        As last seen, where the kernel does not tell in time.
        """
        self._observatory.glance_at_devices()
        snapshot = self._observatory.snapshot()
        holders = holders_of(snapshot)
        return [
            function_view(
                snapshot.devices, function, holder=holders.get(address),
                quarantine=snapshot.books.quarantine.get(address),
            )
            for address, function in sorted(
                snapshot.devices.functions.items(), key=lambda item: item[0].parts
            )
        ]  # fmt: skip

    def release(self, address: str, *, uid: int, by: str) -> Job:
        """Start the job that lets a function out of quarantine, after a fresh look at it.

        It is reset and goes back to how it was before a guest had it; where that fails, it stays.

        Raises:
            InvalidValueError: not an address.
            RefusedError: it is not in quarantine, or not sane.
        """
        entry = self._ledger.view().books.quarantine.get(PciAddress.parse(address))
        if entry is None:
            raise RefusedError(
                Refusal(Reason.UNKNOWN_ID, f"{address} is not in quarantine (virtfabric devices)")
            )
        self._observatory.refresh_devices([entry.address])
        self._observatory.refresh_all()
        problem = _insanity(self._observatory.snapshot(), entry)
        if problem is not None:
            raise RefusedError(problem)
        work = homeward(entry, by, lift=True)

        def run(_: Any, progress: Any) -> Json:
            outcome = self._conductor.conduct(work, progress)
            self._audit.append(
                "device.released", [entry.address, work.request],
                {"address": entry.address, "by": by, "was": entry.why, "request": work.request},
            )  # fmt: skip
            self._watch.satisfy_soon()
            return summary(work, outcome) | {"address": entry.address}

        return self._jobs.start(work.title, run, uid=uid)


def holders_of(snapshot: HostSnapshot) -> dict[PciAddress, str]:
    """The name of the guest that has each function: by the books, or in its live machine."""
    found: dict[PciAddress, str] = {}
    for guest in snapshot.guests.values():
        if guest.active:
            found |= {d.address: guest.name for d in guest.devices}
    for uuid, holding in snapshot.books.holdings.items():
        state = snapshot.guests.get(uuid)
        found |= {f.address: state.name if state else uuid for f in holding.claims}
    return found


def blast_view(snapshot: HostSnapshot, plan: Plan) -> list[Json]:
    """For each function that a plan gives to a guest: who shares something with it."""
    holders, found = holders_of(snapshot), []
    for guest, functions in plan.functions.items():
        holding = snapshot.books.holdings.get(guest)
        had = {f.address for f in holding.functions} if holding else set()
        state = snapshot.guests.get(guest)
        for function in functions:
            if function.address in had:
                continue
            shares = [
                {
                    "address": other.address, "what": what, "driver": other.driver,
                    "holder": holders.get(other.address), "uses": [str(u) for u in other.uses],
                }
                for other, what in blast_radius(snapshot.devices, function.address)
            ]  # fmt: skip
            found.append(
                {
                    "guest": guest, "name": state.name if state else guest,
                    "capability": function.capability, "address": function.address,
                    "shares": shares,
                }
            )  # fmt: skip
    return found


def _insanity(snapshot: HostSnapshot, entry: Quarantine) -> Refusal | None:
    """Why a function may not leave quarantine; one that is gone from the host may."""
    user = user_of(snapshot, entry)
    if user:
        detail = f"{entry.address}: {user} has it still; it would be shared"
        return Refusal(Reason.DEVICE_IN_USE, detail)
    against = obstacles(snapshot.devices, entry.address)
    if against and entry.address in snapshot.devices.functions:
        detail = f"{entry.address} cannot be given to a guest: {'; '.join(against)}"
        return Refusal(Reason.DEVICE_IN_USE, detail)
    return None
