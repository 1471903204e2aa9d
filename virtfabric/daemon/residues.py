"""What guests keep beyond their holdings: found where a plan ends, followed until it is gone.

It asks no guest for anything: a convergence does (`rounds`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.daemon.custody import DEVICE
from virtfabric.model.amounts import CXL_KEY, MEMORY_KEYS
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.ledger import Residue
from virtfabric.policy.tiers import part_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books, Holding
    from virtfabric.ports import AuditLog, Clock, Journal

log = logging.getLogger(__name__)


class Residues:
    """Finds them, and strikes off what came back late."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        observatory: Observatory,
        journal: Journal,
        audit: AuditLog,
        clock: Clock,
    ) -> None:
        """Wire it."""
        self._ledger = ledger
        self._observatory = observatory
        self._journal = journal
        self._audit = audit
        self._clock = clock

    def find(self, books: Books, guests: Collection[GuestId], now: float) -> list[Residue]:
        """What a guest still has beyond its holding: memory within tolerance, vCPUs, functions.

        Surplus vCPUs take nothing from anybody: quota and pins hold them.
        """
        found = []
        for guest in guests:
            state, holding = self._observatory.guest(guest), books.holdings.get(guest)
            if state is None or holding is None:
                continue
            surplus = state.vcpus_online - max(1, holding.amounts.cpu.whole)
            if surplus > 0:
                why = "plugged beyond what it holds; its cap and pins hold them"
                found.append(Residue(guest, "vcpu", surplus * 1000, now, why))
            found += self._of_memory(state, holding, now)
            own = {function.address for function in holding.functions}
            kept = sorted(d.address for d in state.devices if d.ours and d.address not in own)
            if kept:
                why = f"{', '.join(kept)}: the guest has not let go yet"
                found.append(Residue(guest, DEVICE, len(kept), now, why))
        return found

    def _of_memory(self, state: GuestState, holding: Holding, now: float) -> list[Residue]:
        found = []
        fixed = state.mechanism is MemoryMechanism.FIXED
        for key in (CXL_KEY,) if fixed else MEMORY_KEYS.values():
            part = part_of(state, key, self._observatory.topology.cxl_nodes)
            excess = part.current - holding.amounts[key]
            if excess > 0:
                why = "the guest has not let go yet"
                found.append(Residue(state.uuid, str(key), excess, now, why))
        return found

    def review(self, guests: Collection[GuestId] | None) -> None:
        """Strike off what guests have given back with no plan to end it; None for all guests.

        What is still there keeps its beginning. Guests that a plan or a job works on, or that
        libvirt does not show now, keep all of it, and functions are followed by themselves
        (`devicewatch`). What cannot be read or written now is left to the next look.
        """
        indebted = {r.guest for r in self._ledger.view().books.residues if r.what != DEVICE}
        if guests is not None:
            indebted &= set(guests)
        if not indebted:
            return
        try:
            self._review(indebted)
        except VirtfabricError as error:
            log.warning("residues are looked at later: %s", error)

    def _review(self, indebted: set[GuestId]) -> None:
        view = self._ledger.view()
        self._observatory.refresh(indebted)
        seen = {
            guest
            for guest in view.books.holdings.keys() & indebted - view.busy
            if (state := self._observatory.guest(guest)) and state.active and not state.detained
        }
        found = self.find(view.books, seen, self._clock.now())
        left = still_left(view.books.residues, seen, found)
        if left == view.books.residues:
            return

        struck: set[Residue] = set()

        def change(books: Books) -> Books:
            if self._ledger.view().generation != view.generation:
                # what was read belongs to the books of before: the next look sees to the rest
                return books
            struck.update(set(books.residues) - set(left))
            return replace(books, residues=left)

        books = self._ledger.commit(None, change, self._journal.store_books)
        for before in struck:
            self._tell(before, books)

    def _tell(self, before: Residue, books: Books) -> None:
        same = (r for r in books.residues if (r.guest, r.what) == (before.guest, before.what))
        now = next(same, replace(before, amount=0))
        name = self._observatory.name_of(before.guest)
        body = {"name": name, "was": before.to_json(), "now": now.to_json()}
        self._audit.append("residue.returned", [before.guest], body)


def still_left(
    residues: Iterable[Residue], guests: Collection[GuestId], found: Iterable[Residue]
) -> tuple[Residue, ...]:
    """These residues; those of these guests with the amounts found, but for functions."""
    amounts = {(r.guest, r.what): r.amount for r in found}
    left = []
    for residue in residues:
        if residue.guest not in guests or residue.what == DEVICE:
            left.append(residue)
        elif amount := amounts.pop((residue.guest, residue.what), 0):
            left.append(replace(residue, amount=amount))
    return tuple(left)
