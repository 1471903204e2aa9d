"""The arbiter by example: each rule of architecture.md with figures that one can follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from host_data import load_host

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.decision import Decision, Return, Take, Verdict
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, VirtioMem
from virtfabric.model.host import Capacity
from virtfabric.model.ids import GrantId, GuestId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot, Residue
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.request import AGENT, Mode, Origin, Request, Want
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.policy.arbiter import (
    choose_admission,
    choose_allocation,
    choose_departure,
    choose_release,
)
from virtfabric.policy.loans import depart, settle
from virtfabric.policy.standing import capacity_of, ceiling_of, charge_of, floor_of, free

BATCH, WEB, DB, OTHER = (GuestId(f"00000000-0000-4000-8000-00000000000{n}") for n in "1234")
OVERHEAD = 10 * MIB


def guest(
    uuid: GuestId, priority: int | None, *, cpu: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None, **fields: Any,
) -> GuestState:  # fmt: skip
    policy = None
    if priority is not None:
        policy = GuestPolicy(
            priority=priority, cpu=CpuPolicy(**cpu or {}), memory=MemoryPolicy(**memory or {})
        )
    device = VirtioMem("ua-v", 0, Bytes(512 * MIB), Bytes(2 * MIB), Bytes(0), Bytes(0))
    defaults: dict[str, Any] = {
        "name": {BATCH: "batch", WEB: "web", DB: "db"}.get(uuid, "other"),
        "state": RunState.RUNNING, "vcpus_max": 4, "boot_memory": Bytes(128 * MIB),
        "memory_current": Bytes(128 * MIB), "memory_max": Bytes(640 * MIB),
        "mechanism": MemoryMechanism.VIRTIO_MEM, "virtio_mem": (device,), "policy": policy,
    }  # fmt: skip
    return GuestState(uuid=uuid, **defaults | fields)


def host(
    *entries: tuple[GuestState, int, int] | GuestState, cpus: int = 4, memory: int = 2048,
    **fields: Any,
) -> HostSnapshot:  # fmt: skip
    """Guests with milli-CPU and MiB that they hold, on this many pCPUs and MiB."""
    holdings = {
        e[0].uuid: Holding(e[0].uuid, Amounts.of(cpu=e[1], memory=e[2] * MIB))
        for e in entries if isinstance(e, tuple)
    }  # fmt: skip
    found = [e[0] if isinstance(e, tuple) else e for e in entries]
    capacity = Capacity(
        CpuSet(range(cpus)), CpuSet({0}), {0: Bytes(memory * MIB)}, Bytes(0), Bytes(OVERHEAD)
    )
    return HostSnapshot(
        5, load_host("flat-8"), capacity, {g.uuid: g for g in found}, Books(5, holdings), **fields
    )


def ask(
    uuid: GuestId, cpu: int | None = None, memory: int | None = None, *, mode: Mode = Mode.BY,
    partial: bool = False,
) -> Request:  # fmt: skip
    return Request(
        RequestId("req-1"), uuid, AGENT, Origin.DBUS,
        cpu=None if cpu is None else Want(mode, cpu),
        memory=None if memory is None else Want(mode, memory * MIB), partial=partial,
    )  # fmt: skip


def granted(snapshot: HostSnapshot, request: Request, **options: Any) -> Decision:
    answer = choose_allocation(snapshot, request, **options)
    assert isinstance(answer, Decision), answer
    return answer


def refused(snapshot: HostSnapshot, request: Request) -> Refusal:
    answer = choose_allocation(snapshot, request)
    assert isinstance(answer, Refusal), answer
    return answer


def paid(decision: Decision) -> list[tuple[GuestId, int, int]]:
    return [(t.victim, t.amounts.cpu, t.amounts.memory // MIB) for t in decision.takes]


def three(*, cpus: int = 4, memory: int = 2048, **fields: Any) -> HostSnapshot:
    """The demo: batch 10, web 50, database 90."""
    return host(
        (guest(BATCH, 10), 2000, 500), (guest(WEB, 50), 1000, 200), (guest(DB, 90), 1000, 200),
        cpus=cpus, memory=memory, **fields,
    )  # fmt: skip


def test_free_capacity_comes_first() -> None:
    decision = granted(three(cpus=5), ask(DB, 1000, 64))
    assert decision.delta == Amounts.of(cpu=1000, memory=64 * MIB) == decision.from_free
    assert not decision.takes
    assert not decision.considered
    assert decision.holdings == {DB: Amounts.of(cpu=2000, memory=264 * MIB)}


def test_the_lowest_priority_pays_and_is_told_why() -> None:
    snapshot = three(memory=900 + 30 + 64)
    decision = granted(snapshot, ask(DB, 1000, 100))
    assert paid(decision) == [(BATCH, 1000, 36)]
    assert decision.from_free == Amounts.of(memory=64 * MIB)
    assert decision.holdings == {
        DB: Amounts.of(cpu=2000, memory=300 * MIB), BATCH: Amounts.of(cpu=1000, memory=464 * MIB),
    }  # fmt: skip
    verdicts = {(c.name, c.key.resource): (c.verdict, c.pays) for c in decision.considered}
    assert verdicts == {
        ("batch", CPU): (Verdict.PAYS, 1000), ("batch", MEMORY): (Verdict.PAYS, 36 * MIB),
        ("web", CPU): (Verdict.NOT_NEEDED, 0), ("web", MEMORY): (Verdict.NOT_NEEDED, 0),
    }  # fmt: skip


def test_each_is_drained_to_its_floor_before_the_next() -> None:
    decision = granted(three(), ask(DB, 2500))
    assert paid(decision) == [(BATCH, 1900, 0), (WEB, 600, 0)]


def test_equal_priorities_pay_by_what_they_hold_above_the_floor_per_share() -> None:
    rich = guest(BATCH, 10, cpu={"shares": 400})
    poor = guest(WEB, 10, cpu={"shares": 100})
    snapshot = host((rich, 2100, 128), (poor, 900, 128), (guest(DB, 90), 1000, 128))
    assert paid(granted(snapshot, ask(DB, 500))) == [(WEB, 500, 0)]  # 8 a share against 5


def test_equal_standing_is_settled_by_uuid() -> None:
    snapshot = host((guest(WEB, 10), 1500, 128), (guest(BATCH, 10), 1500, 128),
                    (guest(DB, 90), 1000, 128))  # fmt: skip
    assert paid(granted(snapshot, ask(DB, 500))) == [(BATCH, 500, 0)]


def test_equal_and_higher_priorities_never_pay() -> None:
    refusal = refused(three(), ask(BATCH, 1))
    assert refusal.reason is Reason.NO_CAPACITY
    assert refusal.would_fit == {"cpu": 0}
    assert len(refusal.considered) == 2
    assert all("priority-not-lower" in line for line in refusal.considered)


def test_all_or_nothing_across_resources() -> None:
    snapshot = three(memory=930, busy=frozenset({WEB}))
    refusal = refused(snapshot, ask(DB, 100, 400))
    assert refusal.reason is Reason.NO_CAPACITY
    assert refusal.would_fit == {"cpu": 1900, "memory": 372 * MIB}
    refusal = refused(snapshot, ask(DB, 2900, 10))
    assert refusal.would_fit == {"cpu": 1900, "memory": 372 * MIB}
    assert "db" in refusal.detail
    assert "2.9" in refusal.detail
    assert any("batch" in line and "could pay 1.9" in line for line in refusal.considered)


def test_partial_takes_what_fits() -> None:
    snapshot = three(memory=930)
    assert granted(snapshot, ask(DB, 2900, 10, partial=True)).delta == Amounts.of(
        cpu=2800, memory=10 * MIB
    )
    assert refused(snapshot, ask(BATCH, 100, partial=True)).reason is Reason.NO_CAPACITY


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"job": "backup"}, Verdict.BUSY),
        ({"state": RunState.PAUSED}, Verdict.BUSY),
        ({"mechanism": MemoryMechanism.FIXED}, Verdict.NO_MECHANISM),
        ({"mechanism": MemoryMechanism.BALLOON}, Verdict.NO_MECHANISM),
        ({"policy": None}, Verdict.UNMANAGED),
        ({"memory_current": Bytes(0), "boot_memory": Bytes(500 * MIB)}, Verdict.AT_FLOOR),
    ],
)
def test_who_does_not_pay_memory(change: dict[str, Any], verdict: Verdict) -> None:
    snapshot = three()
    batch = replace(snapshot.guests[BATCH], **change)
    snapshot = replace(snapshot, guests={**snapshot.guests, BATCH: batch})
    spare = free(snapshot).memory
    decision = granted(snapshot, ask(DB, memory=0, mode=Mode.BY))
    assert not decision.delta
    snapshot = replace(snapshot, pending=Amounts.of(memory=max(0, spare)))
    decision = granted(snapshot, ask(DB, memory=20))
    assert [t.victim for t in decision.takes] == [WEB]
    assert {c.guest: c.verdict for c in decision.considered}[BATCH] is verdict


def test_a_paused_victim_still_pays_cpu() -> None:
    snapshot = three()
    batch = replace(snapshot.guests[BATCH], state=RunState.PAUSED)
    snapshot = replace(snapshot, guests={**snapshot.guests, BATCH: batch})
    assert paid(granted(snapshot, ask(DB, 100))) == [(BATCH, 100, 0)]


def test_a_guest_that_another_plan_touches_is_no_victim() -> None:
    decision = granted(three(busy=frozenset({BATCH})), ask(DB, 100))
    assert paid(decision) == [(WEB, 100, 0)]


def test_ballooned_memory_is_lent_only_when_configured() -> None:
    batch = guest(BATCH, 10, mechanism=MemoryMechanism.BALLOON, virtio_mem=())
    entries = (batch, 1000, 400), (guest(DB, 90), 1000, 128)
    memory = 640 + 128 + 20
    assert refused(host(*entries, memory=memory), ask(DB, memory=64)).would_fit == {"memory": 0}
    lending = host(*entries, memory=400 + 128 + 20, lend_ballooned=True)
    assert paid(granted(lending, ask(DB, memory=64))) == [(BATCH, 0, 64)]
    assert refused(lending, ask(DB, memory=337 + 2)).would_fit == {"memory": 336 * MIB}


def test_a_balloon_that_is_not_lent_deflates_for_nothing() -> None:
    db = guest(DB, 90, mechanism=MemoryMechanism.BALLOON, virtio_mem=())
    snapshot = host((db, 1000, 300), memory=650)
    decision = granted(snapshot, ask(DB, memory=340))
    assert decision.delta.memory == 340 * MIB
    assert not decision.from_free
    assert free(snapshot).memory == 0


def test_dedicated_guests_trade_whole_cpus() -> None:
    whole = {"placement": Placement.DEDICATED}
    batch = guest(BATCH, 10, cpu=whole)
    snapshot = host((batch, 3000, 128), (guest(DB, 90), 900, 128))
    decision = granted(snapshot, ask(DB, 250))  # 100 is free
    assert paid(decision) == [(BATCH, 1000, 0)]
    assert decision.from_free.cpu == 100
    assert decision.delta.cpu == 250
    db = guest(DB, 90, cpu=whole)
    snapshot = host((batch, 2000, 128), (db, 1000, 128), cpus=5)
    assert granted(snapshot, ask(DB, 1)).delta.cpu == 1000
    assert granted(snapshot, ask(DB, 1500, mode=Mode.TO)).delta.cpu == 1000
    assert refused(snapshot, ask(DB, -1)).reason is Reason.BELOW_FLOOR
    assert not granted(host((db, 2000, 128)), ask(DB, -1)).delta


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


def test_memory_is_rounded_to_blocks_but_not_past_the_limit() -> None:
    db = guest(DB, 90, memory={"limit": Bytes(301 * MIB)})
    snapshot = host((db, 1000, 200))
    assert granted(snapshot, ask(DB, memory=3)).delta.memory == 4 * MIB
    assert refused(snapshot, ask(DB, memory=301, mode=Mode.TO)).would_fit == {"memory": 100 * MIB}
    assert granted(snapshot, ask(DB, memory=299, mode=Mode.TO)).delta.memory == 100 * MIB
    assert granted(snapshot, ask(DB, memory=-3)).delta.memory == -2 * MIB


def test_caps_pass_the_rest_on_to_the_next_victim() -> None:
    snapshot = three(memory=930)
    caps = {BATCH: Amounts.of(cpu=1 << 40, memory=30 * MIB)}
    assert paid(granted(snapshot, ask(DB, 1000, 64), caps=caps)) == [
        (BATCH, 1000, 30),
        (WEB, 0, 34),
    ]
    decision = granted(snapshot, ask(DB, memory=64), caps={BATCH: Amounts()})
    assert paid(decision) == [(WEB, 0, 64)]
    assert decision.considered[-1].verdict is Verdict.NO_MECHANISM


@pytest.mark.parametrize(
    ("change", "request_", "reason", "words"),
    [
        ({}, ask(OTHER, 100), Reason.UNKNOWN_GUEST, [OTHER]),
        ({"policy": None, "policy_error": "broken XML"}, ask(DB, 1), Reason.UNMANAGED_GUEST,
         ["db", "broken XML"]),
        ({"state": RunState.SHUTOFF}, ask(DB, 1), Reason.NOT_RUNNING, ["db"]),
        ({"job": "backup"}, ask(DB, 1), Reason.BUSY, ["db", "backup"]),
        ({"mechanism": MemoryMechanism.FIXED}, ask(DB, memory=2), Reason.NO_MECHANISM, ["db"]),
        ({}, ask(DB, 3001), Reason.ABOVE_LIMIT, ["db", "4.001", "4"]),
        ({}, ask(DB, memory=641, mode=Mode.TO), Reason.ABOVE_LIMIT, ["db", "641MiB", "640MiB"]),
        ({}, ask(DB, -901), Reason.BELOW_FLOOR, ["db", "0.099", "0.1"]),
        ({}, ask(DB, memory=127, mode=Mode.TO), Reason.BELOW_FLOOR, ["db", "127MiB", "128MiB"]),
        ({}, ask(DB, -5000, mode=Mode.TO), Reason.BELOW_FLOOR, ["db"]),
    ],
)  # fmt: skip
def test_refusals_name_the_guest_and_the_figures(
    change: dict[str, Any], request_: Request, reason: Reason, words: list[str]
) -> None:
    snapshot = three()
    db = replace(snapshot.guests[DB], **change)
    refusal = refused(replace(snapshot, guests={**snapshot.guests, DB: db}), request_)
    assert refusal.reason is reason
    assert all(word in refusal.detail for word in words), refusal.detail


def test_a_guest_under_a_plan_or_not_in_the_books_is_busy() -> None:
    assert refused(three(busy=frozenset({DB})), ask(DB, 1)).reason is Reason.BUSY
    assert refused(host(guest(DB, 90)), ask(DB, 1)).reason is Reason.BUSY


def test_no_change_is_an_empty_decision() -> None:
    decision = granted(three(), ask(DB, 1000, 200, mode=Mode.TO))
    assert decision.delta == Amounts()
    assert decision.holdings == {}
    assert granted(three(), ask(DB)).delta == Amounts()


def test_paused_guests_may_ask() -> None:
    snapshot = three(cpus=5)
    db = replace(snapshot.guests[DB], state=RunState.PAUSED)
    snapshot = replace(snapshot, guests={**snapshot.guests, DB: db})
    assert granted(snapshot, ask(DB, 100)).delta.cpu == 100


def test_an_overcommitted_host_still_lends_between_guests() -> None:
    snapshot = three(cpus=3)
    assert free(snapshot).cpu == -1000
    assert paid(granted(snapshot, ask(DB, 500))) == [(BATCH, 500, 0)]


# -- what goes home ---------------------------------------------------------------------------


def committed(
    snapshot: HostSnapshot, decision: Decision, ends: Grant | None = None, name: str = "g",
    at: float = 1.0,
) -> tuple[HostSnapshot, Grant]:  # fmt: skip
    grant = Grant(GrantId(name), decision.guest, decision.delta.positive(), decision.request, at)
    books = settle(
        snapshot.books, decision, grant=ends, new_grant=grant if grant.amounts else None,
        loan_ids=[LoanId(f"l{name[1:]}{n}") for n in range(len(decision.takes))], at=at, orders={},
    )  # fmt: skip
    return replace(snapshot, books=books), grant


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


# -- starting ---------------------------------------------------------------------------------


def test_a_start_gets_its_floor_and_cpu_that_is_free() -> None:
    new = guest(DB, 90, state=RunState.SHUTOFF, vcpus_online=2, cpu={"reservation": MilliCpu(500)})
    answer = choose_admission(host(cpus=4), new, RequestId("start"))
    assert isinstance(answer, Decision)
    assert answer.delta == Amounts.of(cpu=2000, memory=128 * MIB)
    assert answer.from_free == Amounts.of(cpu=2000, memory=138 * MIB)


def test_a_start_reclaims_no_more_than_its_floor() -> None:
    new = guest(DB, 90, state=RunState.SHUTOFF, vcpus_online=2, cpu={"reservation": MilliCpu(500)})
    snapshot = host((guest(BATCH, 10), 1900, 300), cpus=2, memory=400)
    answer = choose_admission(snapshot, new, RequestId("start"))
    assert isinstance(answer, Decision)
    assert answer.delta == Amounts.of(cpu=500, memory=128 * MIB)
    assert paid(answer) == [(BATCH, 400, 48)]


def test_a_start_that_does_not_fit_is_refused_with_figures() -> None:
    new = guest(DB, 10, state=RunState.SHUTOFF)
    snapshot = host((guest(BATCH, 10), 1000, 300), cpus=2, memory=400)
    answer = choose_admission(snapshot, new, RequestId("start"))
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.NO_CAPACITY
    assert all(word in answer.detail for word in ("db", "138MiB", "90MiB"))


def test_memory_at_boot_counts_not_the_reservation_alone() -> None:
    balloon = guest(DB, 90, mechanism=MemoryMechanism.BALLOON, state=RunState.SHUTOFF)
    asked = VirtioMem("v", 0, Bytes(512 * MIB), Bytes(2 * MIB), Bytes(127 * MIB), Bytes(0))
    plugged = guest(DB, 90, virtio_mem=(asked,), state=RunState.SHUTOFF)
    for new, memory in ((balloon, 640), (plugged, 256)):
        answer = choose_admission(host(lend_ballooned=True), new, RequestId("start"))
        assert isinstance(answer, Decision)
        assert answer.delta.memory == memory * MIB


# -- standing ---------------------------------------------------------------------------------


def test_floors_and_ceilings() -> None:
    snapshot = host()
    shared = guest(DB, 90, cpu={"limit": MilliCpu(9000)}, memory={"limit": Bytes(100 * MIB)})
    assert floor_of(shared, snapshot) == Amounts.of(cpu=100, memory=128 * MIB)
    assert ceiling_of(shared, snapshot) == Amounts.of(cpu=4000, memory=128 * MIB)
    cpu = {"placement": Placement.DEDICATED, "reservation": MilliCpu(1200),
           "limit": MilliCpu(3900)}  # fmt: skip
    dedicated = guest(DB, 90, cpu=cpu)
    assert (floor_of(dedicated, snapshot).cpu, ceiling_of(dedicated, snapshot).cpu) == (2000, 3000)


def test_an_unmanaged_guest_counts_with_all_it_can_reach() -> None:
    snapshot = host(cpus=2)  # of 8
    stray = guest(OTHER, None, vcpus_online=3, vcpu_affinity={0: CpuSet({0, 5}), 1: CpuSet({7})})
    assert charge_of(stray, None, snapshot) == Amounts.of(cpu=500 + 250, memory=650 * MIB)
    snapshot = replace(snapshot, guests={OTHER: stray})
    assert free(snapshot) == capacity_of(snapshot) - charge_of(stray, None, snapshot)


def test_a_holding_counts_before_the_guest_is_seen_running() -> None:
    entry = (guest(DB, 90, state=RunState.SHUTOFF), 1000, 200)
    snapshot = host(entry)
    used = Amounts.of(cpu=1000, memory=210 * MIB)
    assert free(snapshot) == capacity_of(snapshot) - used
    assert free(replace(snapshot, guests={})) == capacity_of(snapshot) - used
    assert free(snapshot, without=DB) == capacity_of(snapshot)
    assert Key(CPU) in used
