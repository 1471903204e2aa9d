"""Loans over many decisions: whatever happens in between, every amount comes home once."""

from __future__ import annotations

from dataclasses import replace

from arbiter_strategies import RESERVE, cpu_bounds, memory_bounds, snapshots, used
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import Amounts
from virtfabric.model.decision import Decision
from virtfabric.model.guest import RunState
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, HostSnapshot
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import MIB
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation, choose_departure, choose_release
from virtfabric.policy.loans import depart, settle

HISTORIES = settings(
    max_examples=examples(60), deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


class World:
    """A host whose books live on from decision to decision."""

    def __init__(self, snapshot: HostSnapshot) -> None:
        self.snapshot = snapshot
        self.at = 0.0

    @property
    def books(self) -> Books:
        return self.snapshot.books

    def amounts(self) -> dict[GuestId, Amounts]:
        return {guest: holding.amounts for guest, holding in self.books.holdings.items()}

    def settle(self, decision: Decision, ends: Grant | None = None) -> None:
        self.at += 1.0
        gain = decision.delta.positive()
        name = GrantId(f"g{self.at:g}")
        grant = Grant(name, decision.guest, gain, decision.request, self.at) if gain else None
        ids = [LoanId(f"l{self.at:g}-{n}") for n in range(len(decision.takes))]
        books = settle(
            self.books, decision, grant=ends, new_grant=grant, loan_ids=ids, at=self.at, orders={}
        )
        assert books.generation == self.books.generation + 1
        self.snapshot = replace(self.snapshot, books=books, generation=books.generation)
        for guest, amounts in (decision.holdings or {}).items():
            holding = books.holdings.get(guest)
            assert (holding.amounts if holding else Amounts()) == amounts

    def allocate(self, guest: GuestId, cpu: int, memory: int) -> None:
        request = Request(
            RequestId(f"r{self.at:g}"), guest, AGENT, Origin.AGENT,
            cpu=Want(Mode.BY, cpu) if cpu else None,
            memory=Want(Mode.BY, memory) if memory else None,
            partial=True,
        )  # fmt: skip
        answer = choose_allocation(self.snapshot, request)
        if isinstance(answer, Decision):
            self.settle(answer)

    def release(self, grant: Grant) -> None:
        decision = choose_release(self.snapshot, RequestId("end"), grant)
        self.settle(decision, ends=grant)

    def stop(self, guest: GuestId) -> None:
        gone = replace(self.snapshot.guests[guest], state=RunState.SHUTOFF)
        self.snapshot = replace(self.snapshot, guests={**self.snapshot.guests, guest: gone})
        self.settle(choose_departure(self.snapshot, guest, RequestId("stop")))
        self.snapshot = replace(self.snapshot, books=depart(self.books, guest, self.at))

    def check(self) -> None:
        """What holds at any time."""
        snapshot, books = self.snapshot, self.books
        for guest, holding in books.holdings.items():
            state = snapshot.guests[guest]
            memory = memory_bounds(state, lend=snapshot.lend_ballooned)
            assert holding.amounts.cpu >= cpu_bounds(state).floor
            assert holding.amounts.memory >= memory.floor
        for name, loan in books.loans.items():
            assert name == loan.id
            assert loan.amounts
            assert min(loan.amounts.values()) > 0
            assert loan.victim != loan.borrower
            assert books.grants[loan.grant].guest == loan.borrower
            assert {loan.victim, loan.borrower} <= set(books.holdings)
        for grant in books.grants.values():
            assert grant.amounts
            assert min(grant.amounts.values()) > 0


def room(snapshot: HostSnapshot) -> tuple[int, int]:
    cpu, memory = used(snapshot)
    capacity = snapshot.capacity
    return (
        len(capacity.cpus) * 1000 - cpu,
        max(0, sum(capacity.memory.values()) - RESERVE) - memory,
    )


MOVES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 8), st.integers(0, 3)),
    max_size=12,
)


@HISTORIES
@given(snapshots(plain=True), MOVES, st.randoms())
def test_all_is_as_before_when_every_grant_has_ended(
    start: HostSnapshot, moves: list[tuple[int, int, int, int]], chance: object
) -> None:
    world = World(start)
    before = world.amounts()
    guests = sorted(before)
    for who, cpu, memory, what in moves:
        grants = sorted(world.books.grants.values(), key=lambda g: g.since)
        if what == 0 and grants:
            world.release(grants[(who * 7 + cpu) % len(grants)])
        else:
            world.allocate(guests[who % len(guests)], cpu * 300, memory * 32 * MIB)
        world.check()
        assert all(now >= min(0, then) for now, then in zip(
            room(world.snapshot), room(start), strict=True))  # fmt: skip
    while world.books.grants:
        world.release(chance.choice(list(world.books.grants.values())))  # type: ignore[attr-defined]
        world.check()
    assert world.amounts() == before
    assert not world.books.loans


@HISTORIES
@given(snapshots(), MOVES)
def test_books_stay_whole_whatever_happens(
    start: HostSnapshot, moves: list[tuple[int, int, int, int]]
) -> None:
    calm = {u: replace(g, state=RunState.RUNNING, job=None) for u, g in start.guests.items()}
    guests = sorted(start.books.holdings)
    world = World(replace(start, guests=calm, busy=frozenset()))
    first = room(world.snapshot)
    for who, cpu, memory, what in moves:
        if not guests:
            return
        guest = guests[who % len(guests)]
        grants = sorted(world.books.grants.values(), key=lambda g: g.since)
        match what:
            case 0 if grants:
                world.release(grants[(who * 7 + cpu) % len(grants)])
            case 1 if guest in world.books.holdings:
                world.stop(guest)
                assert guest not in world.books.holdings
            case _:
                # one resource at a time, shrinks as well as growth
                grow = (cpu - 2) * 500 if memory % 2 else 0
                world.allocate(guest, grow, 0 if grow else (memory - 2) * 32 * MIB)
        world.check()
        for now, then in zip(room(world.snapshot), first, strict=True):
            assert now >= min(0, then)
