"""The arbiter by example: each rule of architecture.md with figures that one can follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from arbiter_host import (
    BATCH,
    DB,
    WEB,
    ask,
    granted,
    guest,
    host,
    paid,
    refused,
    three,
)

from virtfabric.model.amounts import CPU, MEMORY, Amounts
from virtfabric.model.decision import Verdict
from virtfabric.model.errors import Reason
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.model.policy import Placement
from virtfabric.model.units import MIB, Bytes
from virtfabric.model.want import Mode
from virtfabric.policy.standing import free


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
    assert decision.considered[-1].verdict is Verdict.GIVES_NO_MORE


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
