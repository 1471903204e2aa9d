"""Loans: which go home with a decision, and what the books say after one.

Owns the life of grants and loans. It decides no amounts beyond what a loan says (the arbiter does)
and no CPUs. Everything is a function from books to books.

The rule that conserves: a loan is a claim, the amounts themselves are in the holdings. When a
grant ends while its borrower was itself reclaimed from, it gives back less than it got. By that
shortfall its claims on its own borrowers are cut, oldest first; what it still owes passes to those
borrowers as their debt, and what it owes nobody is written off (free when that borrower releases).
So every amount comes home once, to whom it was taken from first. A loan whose victim cannot take
it back (stopped, or at its ceiling) ends unpaid: the amounts are free.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.decision import Return
from virtfabric.model.device import Quarantine, capability_of
from virtfabric.model.ids import GrantId, GuestId, LoanId
from virtfabric.model.ledger import Books, Grant, Holding, Loan
from virtfabric.policy.deviceterms import check_taker, spare_ports
from virtfabric.policy.standing import line_of
from virtfabric.policy.stock import device_amounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from virtfabric.model.decision import Decision
    from virtfabric.model.device import HeldFunction, PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot

    Budget = dict[Key, int]


def newest_first(books: Books, guest: GuestId) -> list[Grant]:
    """A guest's grants in the order in which a shrink consumes them."""
    own = (grant for grant in books.grants.values() if grant.guest == guest)
    return sorted(own, key=lambda grant: (grant.since, grant.id), reverse=True)


def consume(grants: Iterable[Grant], given: Amounts) -> list[tuple[Grant, Amounts]]:
    """Which part of each grant ends when the guest gives up this much; grants in the given order.

    What exceeds all grants came out of the guest's own and is in none of the parts.
    """
    parts, rest = [], given
    for grant in grants:
        part = Amounts({key: min(grant.amounts[key], rest[key]) for key in rest})
        rest = rest - part
        parts.append((grant, part))
    return parts


@dataclass(slots=True)
class Homecoming:
    """Collects what goes home with one decision.

    Attributes:
        spare: what of free capacity may top up a return (a victim of whole CPUs gave more than
            the borrower got; the rest became free then and is needed again now).
        passable: how many of the functions given up can go to another guest, by capability.
        arrived: by victim.
        returns: in the order they are paid.
    """

    snapshot: HostSnapshot
    spare: Amounts
    passable: dict[Key, int] = field(default_factory=dict)
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
        home.repay(own, part, spare=(_total(own) - grant.amounts).positive())
    home.repay((n for n in borrowed if n.grant not in books.grants), rest, spare=Amounts())


def settle(
    books: Books,
    decision: Decision,
    *,
    grant: Grant | None,
    new_grant: Grant | None,
    loan_ids: Sequence[LoanId],
    at: float,
    orders: Mapping[GuestId, tuple[int, ...]],
    functions: Mapping[GuestId, tuple[HeldFunction, ...]] | None = None,
    retired: Iterable[PciAddress] = (),
) -> Books:
    """The books after a committed decision.

    Holdings change by what the decision moves, not to what it named: guests that other decisions
    changed in between are right as well.

    Args:
        books: as they are at commit.
        decision: what happened.
        grant: the grant that this decision ends, None for none.
        new_grant: what the guest got, None for none. Loans made without one (an admission) name
            the request in place of a grant and end when the borrower shrinks or stops.
        loan_ids: one for each take; more are ignored.
        at: UNIX seconds.
        orders: pCPU order of dedicated guests; where none is given the former one stays.
        functions: PCIe functions afterwards, likewise (`Plan.functions`).
        retired: functions that nobody gets again before an operator says so (`Plan.retired`).

    Raises:
        ValueError: fewer ids than takes.
    """
    if len(loan_ids) < len(decision.takes):
        raise ValueError(f"{len(decision.takes)} takes need as many loan ids: {loan_ids!r}")
    draft = _Draft(books)
    draft.move(decision, orders, functions or {})
    draft.retire(retired, at)
    draft.pay(decision)
    if grant is not None:
        draft.end_grant(grant, (grant.amounts + decision.delta).positive())
    elif decision.guest in draft.holdings:  # of a guest that stopped, `depart` ends the grants
        for part in consume(newest_first(books, decision.guest), (-decision.delta).positive()):
            draft.reduce_grant(*part)
    if new_grant is not None:
        draft.grants[new_grant.id] = new_grant
    name = new_grant.id if new_grant else GrantId(decision.request)
    for loan_id, take in zip(loan_ids, decision.takes, strict=False):
        draft.loans[loan_id] = Loan(loan_id, name, take.victim, decision.guest, take.amounts, at)
    return draft.finish()


def depart(books: Books, guest: GuestId, at: float) -> Books:
    """The books after a guest stopped (what could go home did with `choose_departure`).

    Its holding, grants and residues go. What it still owes passes on to those who borrowed from
    it; its other claims are dissolved, the borrowers keep the amounts as their own.

    Args:
        books: as they are.
        guest: who stopped; unknown to the books is fine.
        at: UNIX seconds, the beginning of claims that are passed on.
    """
    draft = _Draft(books)
    draft.holdings.pop(guest, None)
    draft.grants = {k: g for k, g in draft.grants.items() if g.guest != guest}
    owed = [loan for loan in draft.loans.values() if loan.borrower == guest]
    draft.loans = {k: n for k, n in draft.loans.items() if n.borrower != guest}
    draft.hand_on(guest, owed, draft.claims_of(guest), at=at)
    draft.loans = {k: n for k, n in draft.loans.items() if n.victim != guest}
    draft.residues = tuple(r for r in draft.residues if r.guest != guest)
    return draft.finish()


class _Draft:
    """Books in the making."""

    def __init__(self, books: Books) -> None:
        self.generation = books.generation
        self.holdings = dict(books.holdings)
        self.grants = dict(books.grants)
        self.loans = dict(books.loans)
        self.residues = books.residues
        self.quarantine = dict(books.quarantine)

    def finish(self) -> Books:
        return Books(
            self.generation + 1, self.holdings, self.grants, self.loans, self.residues,
            self.quarantine,
        )  # fmt: skip

    def retire(self, addresses: Iterable[PciAddress], at: float) -> None:
        """Functions that a guest had, of a pool that is used once only."""
        for address in addresses:
            why = "a guest had it, and its pool is one_time_use"
            remedy = f"check it, then virtfabric devices release {address}"
            self.quarantine[address] = Quarantine(address, why, remedy, at)

    def move(
        self,
        decision: Decision,
        orders: Mapping[GuestId, tuple[int, ...]],
        functions: Mapping[GuestId, tuple[HeldFunction, ...]],
    ) -> None:
        """Holdings: the guest's delta, what victims gave, what came home."""
        moves = [(decision.guest, decision.delta)]
        moves += [(take.victim, -take.amounts) for take in decision.takes]
        moves += [(back.victim, back.amounts) for back in decision.returns]
        self.holdings.setdefault(decision.guest, Holding(decision.guest, Amounts()))
        for guest, amounts in moves:
            old = self.holdings.get(guest)
            if old is not None:  # a victim may have stopped meanwhile
                self.holdings[guest] = replace(old, amounts=old.amounts + amounts)
        for guest, order in orders.items():
            if guest in self.holdings:
                self.holdings[guest] = replace(self.holdings[guest], order=tuple(order))
        for guest, held in functions.items():
            if guest in self.holdings:
                self.holdings[guest] = replace(self.holdings[guest], functions=tuple(held))
        if not self.holdings[decision.guest].amounts:
            del self.holdings[decision.guest]

    def pay(self, decision: Decision) -> None:
        """Loans: less what came home."""
        for back in decision.returns:
            loan = self.loans.get(back.loan)
            if loan is not None:
                self.keep(loan, (loan.amounts - back.amounts).positive())

    def keep(self, loan: Loan, amounts: Amounts) -> None:
        """Reduce a loan to these amounts; to nothing removes it."""
        if amounts:
            self.loans[loan.id] = replace(loan, amounts=amounts)
        else:
            self.loans.pop(loan.id, None)

    def reduce_grant(self, grant: Grant, part: Amounts) -> None:
        """A shrink consumed this part."""
        rest = grant.amounts - part
        if rest == grant.amounts:
            return
        if rest:
            self.grants[grant.id] = replace(grant, amounts=rest)
        else:
            self.end_grant(grant, Amounts())

    def end_grant(self, grant: Grant, shortfall: Amounts) -> None:
        """Remove a grant and its loans; by the shortfall its borrower's claims pass on."""
        self.grants.pop(grant.id, None)
        owed = [loan for loan in self.loans.values() if loan.grant == grant.id]
        for loan in owed:
            del self.loans[loan.id]
        self.hand_on(grant.guest, owed, shortfall)

    def claims_of(self, guest: GuestId) -> Amounts:
        """What it lent in all."""
        return _total(loan for loan in self.loans.values() if loan.victim == guest)

    def hand_on(
        self, guest: GuestId, owed: Iterable[Loan], shortfall: Amounts, *, at: float | None = None
    ) -> None:
        """Cut the claims of `guest` by `shortfall`, in favour of those that it owes.

        Args:
            guest: a borrower that could not give back all.
            owed: its loans that stayed unpaid.
            shortfall: what it did not give back.
            at: since when the new claims run, None for since the loan passed on.
        """
        debts = [(loan, dict(loan.amounts)) for loan in sorted(owed, key=_age)]
        claims = sorted((n for n in self.loans.values() if n.victim == guest), key=_age)
        cuts, rest = [], shortfall
        for claim in claims:
            cut = Amounts({k: min(v, rest[k]) for k, v in claim.amounts.items()})
            if cut:
                rest = rest - cut
                cuts.append((claim, cut))
                self.keep(claim, claim.amounts - cut)
        # What a victim of whole CPUs gave beyond the need is owed as well, and comes out of free.
        extra = _total(loan for loan, _ in debts) - _total(replace(n, amounts=c) for n, c in cuts)
        for claim, cut in cuts:
            more = Amounts({k: max(0, extra[k]) for k in cut})
            extra = extra - more
            self._share_out(claim, cut + more, debts, at)

    def _share_out(
        self, claim: Loan, cut: Amounts, debts: list[tuple[Loan, Budget]], at: float | None
    ) -> None:
        """Give the cut part of a claim to those whom its holder owes."""
        left = dict(cut)
        for debt, open_part in debts:
            part = Amounts({k: min(v, left.get(k, 0)) for k, v in open_part.items()})
            if not part or debt.victim == claim.borrower:
                continue
            for key, amount in part.items():
                open_part[key] -= amount
                left[key] -= amount
            new = self._free_id(debt.id)
            since = debt.since if at is None else at
            self.loans[new] = Loan(new, claim.grant, debt.victim, claim.borrower, part, since)

    def _free_id(self, wanted: LoanId) -> LoanId:
        """The passed-on loan keeps its id; where it was split, `ID.2`, `ID.3`."""
        name, number = wanted, 1
        while name in self.loans:
            number += 1
            name = LoanId(f"{wanted}.{number}")
        return name


def _age(loan: Loan) -> tuple[float, LoanId]:
    return loan.since, loan.id


def _total(loans: Iterable[Loan]) -> Amounts:
    return sum((loan.amounts for loan in loans), Amounts())
