"""Homecoming: which loans go home when a borrower gives up something.

Owns who is paid, in which order, and how much each victim can take back. The books afterwards are
for `loans.settle`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtfabric.model.amounts import CXL_KEY, Amounts
from virtfabric.model.capability import capability_of
from virtfabric.model.decision import Return
from virtfabric.policy.deviceterms import check_taker, spare_ports
from virtfabric.policy.loans import total_of
from virtfabric.policy.standing import line_of
from virtfabric.policy.stock import device_amounts
from virtfabric.policy.tierterms import reachable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId, LoanId
    from virtfabric.model.ledger import Grant, HostSnapshot, Loan

    Budget = dict[Key, int]


@dataclass(slots=True)
class Homecoming:
    """Collects what goes home with one decision.

    Attributes:
        spare: what of free capacity may top up a return (a victim of whole CPUs gave more than
            the borrower got; the rest became free then and is needed again now).
        passable: how many of the functions given up can go to another guest, by capability.
        elsewhere: bytes of CXL memory that other nodes have room for than those that are called
            home; None where none is.
        arrived: by victim.
        returns: in the order they are paid.
    """

    snapshot: HostSnapshot
    spare: Amounts
    passable: dict[Key, int] = field(default_factory=dict)
    elsewhere: int | None = None
    arrived: dict[GuestId, Amounts] = field(default_factory=dict)
    returns: list[Return] = field(default_factory=list)

    def repay(self, loans: Iterable[Loan], came_back: Amounts, *, spare: Amounts) -> None:
        """Pay these loans, by priority of the victim, highest first, then UUID.

        Args:
            loans: open loans of one grant.
            came_back: what the borrower gives up.
            spare: most that may be added from free capacity.
        """
        added = Amounts({key: max(0, min(spare[key], self.spare[key])) for key in spare})
        budget = dict((came_back + added).items())
        for loan in sorted(loans, key=self._turn):
            paid = self._payment(loan, budget)
            if not paid:
                continue
            self.returns.append(Return(loan.id, loan.victim, paid))
            self.arrived[loan.victim] = self.arrived.get(loan.victim, Amounts()) + paid
            for key, amount in paid.items():
                budget[key] -= amount
                if key in self.passable:
                    self.passable[key] -= amount
                if key == CXL_KEY and self.elsewhere is not None:
                    self.elsewhere -= amount
        unused = Amounts({key: min(added[key], max(0, budget[key])) for key in budget})
        self.spare = self.spare - (added - unused)

    def _turn(self, loan: Loan) -> tuple[int, GuestId, float, LoanId]:
        victim = self.snapshot.guests.get(loan.victim)
        priority = victim.policy.priority if victim and victim.policy else -1
        return -priority, loan.victim, loan.since, loan.id

    def _payment(self, loan: Loan, budget: Budget) -> Amounts:
        victim = self.snapshot.guests.get(loan.victim)
        takes_part = victim is not None and victim.managed and victim.active
        if victim is None or not takes_part or victim.uuid not in self.snapshot.books.holdings:
            return Amounts()
        arrived = self.arrived.get(victim.uuid, Amounts())
        paid: Budget = {}
        for key, owed in loan.amounts.items():
            line = line_of(victim, key, self.snapshot)
            room = line.ceiling - line.held - arrived[key]
            most = max(0, min(owed, budget.get(key, 0), room))
            if key == CXL_KEY and self.elsewhere is not None:
                room = reachable(victim, self.snapshot) - arrived[key]
                most = max(0, min(most, self.elsewhere, room))
            if capability_of(key) is not None:
                most = min(most, self._passing(victim, key, arrived, paid))
            paid[key] = most // line.granule * line.granule
        return Amounts(paid)

    def _passing(self, victim: GuestState, key: Key, arrived: Amounts, paid: Budget) -> int:
        """How many functions the victim can take back: it may have no port for them by now."""
        if check_taker(victim, self.snapshot) is not None:
            return 0
        coming = sum(device_amounts(arrived + Amounts(paid)).values())
        room = spare_ports(victim, self.snapshot) - coming
        return max(0, min(room, self.passable.get(key, 0)))


def repay_parts(
    home: Homecoming, borrower: GuestId, parts: Sequence[tuple[Grant, Amounts]], given: Amounts
) -> None:
    """Send home the loans of these parts of grants, then loans that belong to no grant.

    Args:
        home: collects the returns.
        borrower: who gives up.
        parts: as `consume` says.
        given: all that the borrower gives up.
    """
    books = home.snapshot.books
    borrowed = [loan for loan in books.loans.values() if loan.borrower == borrower]
    if not borrowed:
        return
    rest = given
    for grant, part in parts:
        rest = rest - part
        own = [loan for loan in borrowed if loan.grant == grant.id]
        home.repay(own, part, spare=(total_of(own) - grant.amounts).positive())
    home.repay((n for n in borrowed if n.grant not in books.grants), rest, spare=Amounts())
