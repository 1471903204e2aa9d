"""Drift: what somebody else changed on a managed guest, reported or repaired as its policy says."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from virtfabric.model.errors import Refusal
from virtfabric.model.policy import DriftAction
from virtfabric.policy.intent import Difference, differences, intended_state
from virtfabric.policy.layout import choose_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.units import CpuSet
    from virtfabric.policy.intent import Intended
    from virtfabric.ports import AuditLog


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference; `policy` says what the guest's owner wants done about it."""

    guest: GuestId
    name: str
    what: str
    intended: str
    found: str
    policy: DriftAction

    def to_json(self) -> dict[str, Any]:
        """As documented in docs/dbus-api.md."""
        return {
            "guest": self.guest, "name": self.name, "what": self.what,
            "intended": self.intended, "found": self.found, "policy": self.policy.value,
        }  # fmt: skip


def _differences(snapshot: HostSnapshot, state: GuestState, intended: Intended) -> list[Difference]:
    """As policy sees them, but for vCPUs plugged beyond the holding.

    Those that an undo or a shrink left are a residue; any more somebody plugged beside us, which
    is drift also where this agent would not unplug them.
    """
    found = [d for d in differences(intended, state) if d.what != "vcpus"]
    entitled = max(1, snapshot.books.holdings[state.uuid].amounts.cpu.whole)
    residues = (r for r in snapshot.books.residues if r.guest == state.uuid and r.what == "vcpu")
    known = sum(r.amount for r in residues) // 1000
    if not min(entitled, state.vcpus_max) <= state.vcpus_online <= entitled + known:
        found.append(Difference("vcpus", str(entitled), str(state.vcpus_online)))
    return found


def _with_affinity(state: GuestState, everywhere: CpuSet) -> GuestState:
    """Unpinned means everywhere: on a host whose pool is every pCPU that is as intended."""
    pins = {vcpu: cpus or everywhere for vcpu, cpus in state.vcpu_affinity.items()}
    emulator = state.emulator_affinity or everywhere
    return replace(state, vcpu_affinity=pins, emulator_affinity=emulator)


class DriftWatch:
    """Compares what the books intend with what was last read; tells of each difference once."""

    def __init__(self, observatory: Observatory, notices: Notices, audit: AuditLog) -> None:
        self._observatory = observatory
        self._notices = notices
        self._audit = audit
        self._lock = threading.Lock()
        self._known: dict[GuestId, tuple[Drift, ...]] = {}
        self._repair: Callable[[GuestId], None] | None = None

    def repair_with(self, repair: Callable[[GuestId], None]) -> None:
        """How to mend a guest whose policy says `repair`; must not block."""
        self._repair = repair

    def find(self, guests: Iterable[GuestId] | None = None) -> list[Drift]:
        """Differences as last read; guests that a plan or a job works on are left out."""
        snapshot = self._observatory.snapshot()
        amounts = {g: h.amounts for g, h in snapshot.books.holdings.items()}
        layout = choose_layout(snapshot, amounts)
        if isinstance(layout, Refusal):
            return []
        found: list[Drift] = []
        for guest in sorted(amounts) if guests is None else guests:
            state = snapshot.guests.get(guest)
            if guest not in amounts or state is None or not state.active:
                continue
            policy = state.policy
            if policy is None or guest in snapshot.busy or state.detained:
                continue
            intended = intended_state(snapshot, amounts, layout, guest)
            state = _with_affinity(state, snapshot.topology.cpus)
            found += [
                Drift(guest, state.name, d.what, str(d.intended), str(d.found), policy.drift)
                for d in _differences(snapshot, state, intended)
            ]
        return found

    def check(self, guests: Iterable[GuestId] | None = None) -> list[Drift]:
        """Find, tell of what is new, and have it mended where the policy says so."""
        chosen = None if guests is None else list(guests)
        found = self.find(chosen)
        by_guest: dict[GuestId, tuple[Drift, ...]] = dict.fromkeys(chosen or self._known, ())
        for drift in found:
            by_guest[drift.guest] = (*by_guest.get(drift.guest, ()), drift)
        for guest, drifts in by_guest.items():
            with self._lock:
                news = drifts and self._known.get(guest) != drifts
                self._known[guest] = drifts
                if not drifts:
                    del self._known[guest]
            if news:
                self._tell(guest, drifts)
        return found

    def _tell(self, guest: GuestId, drifts: tuple[Drift, ...]) -> None:
        for drift in drifts:
            self._audit.append("drift.found", [guest], drift.to_json())
            self._notices.publish("drift.found", drift.to_json())
        if drifts[0].policy is DriftAction.REPAIR and self._repair is not None:
            self._repair(guest)

    def forget(self, guest: GuestId) -> None:
        """The guest is gone or unmanaged."""
        with self._lock:
            self._known.pop(guest, None)
