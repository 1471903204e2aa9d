"""Loans by example: what goes home when a grant ends, shrinks, or somebody stops."""

from __future__ import annotations

from dataclasses import replace

from arbiter_host import (
    BATCH,
    DB,
    WEB,
    ask,
    committed,
    granted,
    guest,
    host,
    three,
)

from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Decision, Return, Take
from virtfabric.model.guest import RunState
from virtfabric.model.ids import LoanId, RequestId
from virtfabric.model.ledger import Books, Holding, Residue
from virtfabric.model.policy import CpuPolicy, GuestPolicy, Placement
from virtfabric.model.units import MilliCpu
from virtfabric.policy.arbiter import (
    choose_departure,
    choose_release,
)
from virtfabric.policy.loans import depart, settle
from virtfabric.policy.standing import free


def test_a_surplus_goes_home_as_well() -> None:
    batch = guest(BATCH, 10, cpu={"placement": Placement.DEDICATED})
    snapshot = host((batch, 3000, 128), (guest(DB, 90), 1000, 128))
    after, grant = committed(snapshot, granted(snapshot, ask(DB, 250)))
    assert free(after).cpu == 750
    decision = choose_release(after, RequestId("end"), grant)
    assert decision.returns == (Return(LoanId("l0"), BATCH, Amounts.of(cpu=1000)),)
    assert decision.from_free == Amounts.of(cpu=750)
    taken = replace(after, pending=Amounts.of(cpu=1))
    assert not choose_release(taken, RequestId("end"), grant).returns


def test_loans_go_home_by_priority() -> None:
    start = three()
    after, grant = committed(start, granted(start, ask(DB, 2500)))
    loans = {n.victim: n for n in after.books.loans.values()}
    assert {v: n.amounts.cpu for v, n in loans.items()} == {BATCH: 1900, WEB: 600}
    assert all(n.grant == grant.id and n.borrower == DB and n.since == 1.0 for n in loans.values())
    held_back = replace(start.guests[DB], policy=GuestPolicy(
        priority=90, cpu=CpuPolicy(reservation=MilliCpu(2700))))  # fmt: skip
    raised = replace(after, guests={**after.guests, DB: held_back})
    decision = choose_release(raised, RequestId("end"), grant)
    assert decision.delta == Amounts.of(cpu=-800)
    assert [(r.victim, r.amounts.cpu) for r in decision.returns] == [(WEB, 600), (BATCH, 200)]


def test_a_shrink_ends_the_newest_grants_first() -> None:
    start = three()
    one, first = committed(start, granted(start, ask(DB, 300)), name="g1", at=1.0)
    two, second = committed(one, granted(one, ask(DB, 200)), name="g2", at=2.0)
    decision = granted(two, ask(DB, -250))
    assert [(r.loan, r.amounts.cpu) for r in decision.returns] == [("l20", 200), ("l10", 50)]
    three_, _ = committed(two, decision, name="g3", at=3.0)
    assert set(three_.books.grants) == {first.id}
    assert three_.books.grants[first.id].amounts.cpu == 250
    assert {k: n.amounts.cpu for k, n in three_.books.loans.items()} == {"l10": 250}
    assert second.id not in three_.books.grants


def test_a_stopped_or_full_victim_leaves_the_amount_free() -> None:
    start = three()
    after, grant = committed(start, granted(start, ask(DB, 500)))
    for change in ({"state": RunState.SHUTOFF}, {"vcpus_max": 1}, {"policy": None}):
        batch = replace(after.guests[BATCH], **change)
        now = replace(after, guests={**after.guests, BATCH: batch})
        decision = choose_release(now, RequestId("end"), grant)
        assert decision.delta == Amounts.of(cpu=-500)
        assert not decision.returns
        final, _ = committed(now, decision, ends=grant, name="g9")
        assert not final.books.loans


def test_a_debt_passes_to_the_higher_borrower() -> None:
    start = three()
    one, first = committed(start, granted(start, ask(WEB, 800)), name="g1", at=1.0)
    two, second = committed(one, granted(one, ask(DB, 1500)), name="g2", at=2.0)
    assert {n.victim: n.amounts.cpu for n in two.books.loans.values() if n.borrower == DB} == {
        BATCH: 1100, WEB: 400,
    }  # fmt: skip
    low = replace(two, guests={**two.guests, WEB: guest(
        WEB, 50, cpu={"reservation": MilliCpu(1300)})})  # fmt: skip
    decision = choose_release(low, RequestId("end"), first)
    assert [(r.victim, r.amounts.cpu) for r in decision.returns] == [(BATCH, 100)]
    done, _ = committed(low, decision, ends=first, name="g3", at=3.0)
    # web kept 700 of batch's; 400 of them are with the database now, as batch's loan
    debts = {(n.victim, n.borrower, n.amounts.cpu) for n in done.books.loans.values()}
    assert debts == {(BATCH, DB, 1100), (BATCH, DB, 700)}
    assert {n.grant for n in done.books.loans.values()} == {second.id}


def test_a_departure_sends_everything_home() -> None:
    start = three()
    after, _ = committed(start, granted(start, ask(DB, 2500, 64)))
    gone = replace(after.guests[DB], state=RunState.SHUTOFF)
    after = replace(after, guests={**after.guests, DB: gone})
    decision = choose_departure(after, DB, RequestId("stop"))
    assert {r.victim for r in decision.returns} == {BATCH, WEB}
    assert decision.holdings is not None
    assert decision.holdings[DB] == Amounts()
    final, _ = committed(after, decision, name="g2")
    residue = Residue(DB, "memory", 1, 0.0)
    books = depart(replace(final.books, residues=(residue,)), DB, 3.0)
    assert {g: h.amounts for g, h in books.holdings.items()} == {
        g: h.amounts for g, h in start.books.holdings.items() if g != DB
    }
    assert (books.grants, books.loans, books.residues) == ({}, {}, ())
    assert books.generation == final.books.generation + 1


def test_a_victim_that_stops_leaves_its_loan_to_the_borrower() -> None:
    start = three()
    after, grant = committed(start, granted(start, ask(DB, 500)))
    books = depart(after.books, BATCH, 2.0)
    assert books.holdings[DB].amounts.cpu == 1500
    assert set(books.grants) == {grant.id}
    assert not books.loans


def test_settle_keeps_orders_that_are_not_given() -> None:
    holding = Holding(DB, Amounts.of(cpu=2000), (4, 5))
    books = Books(1, {DB: holding, WEB: Holding(WEB, Amounts.of(cpu=1000), (6,))})
    decision = Decision(RequestId("r"), WEB, 1, Amounts(), takes=(Take(DB, Amounts.of(cpu=1000)),))
    after = settle(
        books, decision, grant=None, new_grant=None, loan_ids=[LoanId("l")], at=1.0,
        orders={WEB: (6, 5)},
    )  # fmt: skip
    assert after.holdings[DB] == Holding(DB, Amounts.of(cpu=1000), (4, 5))
    assert after.holdings[WEB].order == (6, 5)
    assert after.loans[LoanId("l")].grant == "r"
