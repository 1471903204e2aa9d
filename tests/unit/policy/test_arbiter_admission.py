"""Guests that start, by example; floors, ceilings, and what counts as used."""

from __future__ import annotations

from dataclasses import replace

from arbiter_host import (
    BATCH,
    DB,
    OTHER,
    guest,
    host,
    paid,
)

from virtfabric.model.amounts import CPU, Amounts, Key
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism, RunState, VirtioMem
from virtfabric.model.ids import RequestId
from virtfabric.model.policy import Placement
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.policy.arbiter import (
    choose_admission,
)
from virtfabric.policy.standing import capacity_of, ceiling_of, charge_of, floor_of, free


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
