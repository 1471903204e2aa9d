"""Asks victims what they can spare, and has the arbiter decide by that who pays how much.

It owns no rule: `policy.reclaim` says who gives how much, the arbiter who may be asked at all. A
guest is asked only when a decision would have it pay.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.errors import Refusal, VirtfabricError
from virtfabric.model.reclaim import Claim
from virtfabric.policy.reclaim import limits_of, memory_paid, plan_payment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.daemon.undertaking import Caps, Decide
    from virtfabric.model.decision import Decision
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.reclaim import MemoryReport, ReclaimPlan
    from virtfabric.ports import GuestStats

log = logging.getLogger(__name__)


class Reclaimer:
    """Decides with what victims tell; safe from several threads."""

    def __init__(self, stats: GuestStats) -> None:
        self._stats = stats

    def read(self, guests: Iterable[GuestId]) -> dict[GuestId, MemoryReport | None]:
        """What guests tell now; None for one that tells nothing, or cannot be asked."""
        return {guest: self._read(guest) for guest in guests}

    def _read(self, guest: GuestId) -> MemoryReport | None:
        try:
            return self._stats.read_report(guest)
        except VirtfabricError as error:
            log.debug("%s tells nothing of its memory: %s", guest, error)
            return None

    def decide(
        self, decide: Decide, snapshot: HostSnapshot, caps: Caps, *, deadline_s: float
    ) -> Decision | Refusal:
        """The decision, with how the memory comes home that victims pay by it.

        Args:
            decide: the arbiter's.
            snapshot: the host.
            caps: what victims gave that stopped short.
            deadline_s: for each victim.
        """
        answer = decide(snapshot, caps)
        if isinstance(answer, Refusal):
            return answer
        paid = memory_paid(answer)
        if not paid:
            return answer
        claims = [Claim(key, size, deadline_s=deadline_s) for key, size in paid.items()]
        plans = self._plan(snapshot, answer, caps, claims)
        again = decide(snapshot, limits_of(answer, plans, caps))
        notes = tuple(note for plan in plans for note in plan.notes)
        if isinstance(again, Refusal):
            return again._replace(considered=(*again.considered, *notes))
        return replace(again, reclaim=plans)

    def _plan(
        self,
        snapshot: HostSnapshot,
        answer: Decision,
        caps: Caps,
        claims: list[Claim],
    ) -> tuple[ReclaimPlan, ...]:
        """Asks those who would give something, until nobody would who was not asked."""
        reports: dict[GuestId, MemoryReport | None] = {}
        while True:
            plans = plan_payment(snapshot, answer, reports, caps, claims)
            asked = {part.guest for plan in plans for part in plan.parts} - reports.keys()
            if not asked:
                return plans
            reports |= self.read(sorted(asked))
