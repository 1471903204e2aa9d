"""The ledger: who holds what, and what running plans have reserved.

Two locks: `_lock` guards the view and is held for microseconds only; `_commit` serialises those
who change the books, and is held while the journal fsyncs. Deciding never waits for executing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from virtfabric.model.amounts import Amounts
from virtfabric.model.plan import LayoutUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.model.device import PciAddress
    from virtfabric.model.ids import GuestId, TransactionId
    from virtfabric.model.ledger import Books


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one running plan has taken hold of.

    Attributes:
        amounts: of free capacity.
    """

    amounts: Amounts
    guests: frozenset[GuestId]
    layout: LayoutUse
    functions: frozenset[PciAddress]

    def clashes(self, other: Reservation) -> bool:
        """Whether two such plans must not run side by side."""
        return bool(
            self.guests & other.guests
            or self.functions & other.functions
            or self.layout.clashes(other.layout)
        )


@dataclass(frozen=True, slots=True)
class LedgerView:
    """One consistent look at the ledger."""

    generation: int
    books: Books
    pending: Amounts
    busy: frozenset[GuestId]
    layout: frozenset[LayoutUse]
    functions: frozenset[PciAddress]

    def keeps_layout_from(self, use: LayoutUse) -> bool:
        """Whether a plan that runs bars such a use of the layout."""
        return any(use.clashes(other) for other in self.layout)


class Ledger:
    """Reserve, then commit or abort."""

    def __init__(self, books: Books) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._commit = threading.Lock()
        self._books = books
        self._generation = books.generation
        self._reserved: dict[TransactionId, Reservation] = {}

    def view(self, without: TransactionId | None = None) -> LedgerView:
        """The ledger as it is now; `without` leaves out one transaction's own reservation."""
        with self._lock:
            books, generation = self._books, self._generation
            reserved = [r for t, r in self._reserved.items() if t != without]
        pending = Amounts()
        busy: set[GuestId] = set()
        for reservation in reserved:
            pending = pending + reservation.amounts
            busy |= reservation.guests
        layout = frozenset(r.layout for r in reserved)
        functions = frozenset(a for r in reserved for a in r.functions)
        return LedgerView(generation, books, pending, frozenset(busy), layout, functions)

    def reserve(
        self,
        txn: TransactionId,
        generation: int,
        amounts: Amounts,
        guests: frozenset[GuestId],
        layout: LayoutUse = LayoutUse.NONE,
        functions: frozenset[PciAddress] = frozenset(),
    ) -> bool:
        """Take hold of all that a plan needs, if nothing has changed since `generation`.

        Repeating for the same transaction replaces its reservation, but for layout and functions:
        something may have been pinned or moved since. Returns False for a stale generation, or a
        guest, layout or function that another plan holds; the caller decides anew.
        """
        with self._changed:
            if generation != self._generation:
                return False
            if txn in self._reserved:
                layout = layout.joined(self._reserved[txn].layout)
                functions |= self._reserved[txn].functions
            wanted = Reservation(amounts, guests, layout, functions)
            if any(wanted.clashes(r) for t, r in self._reserved.items() if t != txn):
                return False
            self._reserved[txn] = wanted
            self._generation += 1
            return True

    def commit(
        self,
        txn: TransactionId | None,
        change: Callable[[Books], Books],
        store: Callable[[Books], None],
    ) -> Books:
        """Apply `change` to the books, make it durable with `store`, publish it, end `txn`.

        Raises:
            JournalError: from `store`; the books are as before and the reservation stands.
        """
        with self._commit:
            books = change(self._books)
            with self._lock:
                books = replace(books, generation=self._generation + 1)
            store(books)
            with self._changed:
                self._books = books
                if txn is not None:
                    self._reserved.pop(txn, None)
                self._generation += 1
                self._changed.notify_all()
            return books

    def abort(self, txn: TransactionId) -> None:
        """Let go of a reservation; safe to repeat."""
        with self._changed:
            if self._reserved.pop(txn, None) is not None:
                self._generation += 1
            self._changed.notify_all()

    def touch(self) -> None:
        """The structure changed (a guest came, went or got another policy): void open offers."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def wait_change(self, since: int, timeout_s: float) -> None:
        """Wait until a plan ends or the structure changes, at most `timeout_s`.

        Returns at once where the generation is not `since` any more: what the caller saw then may
        have changed before it came here.
        """
        with self._changed:
            if self._generation == since:
                self._changed.wait(timeout_s)
