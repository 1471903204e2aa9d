"""Loans: what the books say after a decision.

Owns the life of grants and loans. It decides no amounts beyond what a loan says (the arbiter does)
and neither CPUs nor functions. Everything is a function from books to books.

The rule that conserves: a loan is a claim, the amounts themselves are in the holdings. When a
grant ends while its borrower was itself reclaimed from, it gives back less than it got. By that
shortfall its claims on its own borrowers are cut, oldest first; what it still owes passes to those
borrowers as their debt, and what it owes nobody is written off (free when that borrower releases).
So every amount comes home once, to whom it was taken from first. A loan whose victim cannot take
it back (stopped, or at its ceiling) ends unpaid: the amounts are free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.device import Quarantine
from virtfabric.model.ids import GrantId, GuestId, LoanId
from virtfabric.model.ledger import Books, Grant, Holding, Loan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from virtfabric.model.decision import Decision
    from virtfabric.model.device import HeldFunction, PciAddress

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
    partly: bool = False,
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
        partly: whether `grant` goes on with what did not come.

    Raises:
        ValueError: fewer ids than takes.
    """
    if len(loan_ids) < len(decision.takes):
        raise ValueError(f"{len(decision.takes)} takes need as many loan ids: {loan_ids!r}")
    draft = _Draft(books)
    draft.move(decision, orders, functions or {})
    draft.quarantine |= {address: _used_once(address, at) for address in retired}
    draft.pay(decision)
    if grant is not None and partly:
        draft.reduce_grant(grant, (-decision.delta).positive())
    elif grant is not None:
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


def depart(books: Books, guest: GuestId, at: float, *, retired: Iterable[PciAddress] = ()) -> Books:
    """The books after a guest stopped (what could go home did with `choose_departure`).

    Its holding, grants and residues go. What it still owes passes on to those who borrowed from
    it; its other claims are dissolved, the borrowers keep the amounts as their own.

    Args:
        books: as they are.
        guest: who stopped; unknown to the books is fine.
        at: UNIX seconds, the beginning of claims that are passed on.
        retired: as for `settle`.
    """
    draft = _Draft(books)
    draft.quarantine |= {address: _used_once(address, at) for address in retired}
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
        self.books = books
        self.holdings = dict(books.holdings)
        self.grants = dict(books.grants)
        self.loans = dict(books.loans)
        self.residues = books.residues
        self.quarantine = dict(books.quarantine)

    def finish(self) -> Books:
        return replace(
            self.books, generation=self.books.generation + 1, holdings=self.holdings,
            grants=self.grants, loans=self.loans, residues=self.residues,
            quarantine=self.quarantine,
        )  # fmt: skip

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
        return total_of(loan for loan in self.loans.values() if loan.victim == guest)

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
        extra = total_of(loan for loan, _ in debts) - total_of(
            replace(n, amounts=c) for n, c in cuts
        )
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


def _used_once(address: PciAddress, at: float) -> Quarantine:
    why = "a guest had it, and its pool is one_time_use"
    return Quarantine(address, why, f"check it, then virtfabric devices release {address}", at)


def _age(loan: Loan) -> tuple[float, LoanId]:
    return loan.since, loan.id


def total_of(loans: Iterable[Loan]) -> Amounts:
    """The amounts of all of these."""
    return sum((loan.amounts for loan in loans), Amounts())
