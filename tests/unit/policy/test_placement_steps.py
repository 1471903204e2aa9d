"""Plans step by step: what is in them, what is not, and in which order."""

from dataclasses import replace

import pytest
from host_data import (
    BLOCK,
    BOOT_MEMORY,
    decision_of,
    guest_id,
    load_host,
    make_guest,
    settle,
    snapshot_of,
)  # fmt: skip

from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import MemoryMechanism, NumaMode, RunState, SchedulerState, VirtioMem
from virtfabric.model.ids import RequestId
from virtfabric.model.ledger import Books, Holding
from virtfabric.model.mark import NO_MARK, MarkedPin, PinMark
from virtfabric.model.plan import (
    MarkPins,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetQuota,
    SetShares,
    SetVcpuCount,
)  # fmt: skip
from virtfabric.model.policy import Smt
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.policy.intent import differences, intended_state, quota_of
from virtfabric.policy.layout import choose_layout
from virtfabric.policy.placement import order_pins, plan_convergence, plan_decision, plan_lift

A, B, C = guest_id(1), guest_id(2), guest_id(3)
REQUEST = RequestId("req-1")


def placed(host, guests, wants, **options):
    """A settled host: `wants[n]` CPUs held by guest number n, memory as it has."""
    topology = load_host(host)
    by_id = {g.uuid: g for g in guests}
    held = {
        guest_id(n): Amounts.of(cpu=int(c * 1000), memory=by_id[guest_id(n)].memory_current)
        for n, c in wants.items()
    }
    snapshot = snapshot_of(topology, guests, {g: (a, ()) for g, a in held.items()}, **options)
    layout = choose_layout(snapshot, held)
    books = Books(7, {g: Holding(g, a, layout.orders.get(g, ())) for g, a in held.items()})
    snapshot = replace(snapshot, books=books)
    return settle(snapshot, {g: intended_state(snapshot, held, layout, g) for g in held})


def decide(snapshot, guest, **changes):
    """A decision by guest: {guest: (cpu delta in CPUs, memory delta in MiB)}."""
    after = {}
    for number, (cpu, memory) in changes["to"].items():
        held = snapshot.books.holdings[guest_id(number)].amounts
        after[guest_id(number)] = held + Amounts.of(cpu=int(cpu * 1000), memory=memory * MIB)
    return decision_of(snapshot, guest, after)


def kinds(plan):
    return [type(s) for s in plan.steps]


def test_a_settled_host_needs_no_steps():
    snapshot = placed("smt-4x2", [make_guest(1, dedicated=True), make_guest(2)], {1: 2, 2: 1})
    assert plan_convergence(snapshot, None, REQUEST).steps == ()
    assert plan_convergence(snapshot, [A], REQUEST).generation == snapshot.generation


def test_the_whole_order_of_a_decision():
    batch = make_guest(1, memory=BOOT_MEMORY + 128 * MIB)
    database = make_guest(2, dedicated=True)
    snapshot = placed("flat-8", [batch, database], {1: 3, 2: 1})
    plan = plan_decision(snapshot, decide(snapshot, B, to={1: (-1.5, -64), 2: (1, 64)}))
    assert [str(s) for s in plan.steps] == [
        "guest1: virtio-mem vm0 128MiB -> 64MiB",
        "guest2: virtio-mem vm0 0B -> 64MiB",
        "guest2: vCPUs online 1 -> 2",
        "guest1: cap 3 CPU -> 1.5 CPU",
        "guest1: vCPU 0 on pCPU 0,2-7 -> 0,3-7",
        "guest1: vCPU 1 on pCPU 0,2-7 -> 0,3-7",
        "guest1: vCPU 2 on pCPU 0,2-7 -> 0,3-7",
        "guest2: vCPU 1 on pCPU 2 -> 2",
        "guest1: mark of our pins 0=0,2-7 1=0,2-7 2=0,2-7 emulator=0 -> "
        "0=0,3-7 1=0,3-7 2=0,3-7 emulator=0",
        "guest2: mark of our pins 0=1 emulator=0 -> 0=1 1=2 emulator=0",
        "guest1: vCPUs online 3 -> 2",
    ]
    assert [s.optional for s in plan.steps] == [False] * 10 + [True]
    assert plan.orders == {B: (1, 2)}
    assert plan.offers[0].chosen


def test_giving_back_widens_the_pool_after_the_leaver():
    snapshot = placed("flat-8", [make_guest(1), make_guest(2, dedicated=True)], {1: 1, 2: 2})
    plan = plan_decision(snapshot, decide(snapshot, B, to={2: (-1, 0)}))
    assert [str(s) for s in plan.steps] == [
        "guest2: vCPU 1 on pCPU 2 -> 1",
        "guest1: vCPU 0 on pCPU 0,3-7 -> 0,2-7",
        "guest2: mark of our pins 0=1 1=2 emulator=0 -> 0=1 1=1 emulator=0",
        "guest1: mark of our pins 0=0,3-7 emulator=0 -> 0=0,2-7 emulator=0",
        "guest2: vCPUs online 2 -> 1",
    ]


@pytest.mark.parametrize("why", [{"vcpu_unplug": False}, {"vcpus_boot": 2}])
def test_a_guest_that_cannot_unplug_keeps_its_vcpus_stacked_and_that_is_no_drift(why):
    guest = make_guest(1, dedicated=True, **why)
    snapshot = placed("flat-8", [guest], {1: 2})
    decision = decide(snapshot, A, to={1: (-1, 0)})
    plan = plan_decision(snapshot, decision)
    assert [str(s) for s in plan.steps] == [
        "guest1: vCPU 1 on pCPU 2 -> 1",
        "guest1: mark of our pins 0=1 1=2 emulator=0 -> 0=1 1=1 emulator=0",
    ]
    held = dict(decision.holdings)
    intended = intended_state(snapshot, held, choose_layout(snapshot, held), A)
    found = replace(snapshot.guests[A], vcpu_affinity={0: CpuSet((1,)), 1: CpuSet((1,))})
    assert differences(intended, found) == []


def test_others_get_pins_only_whatever_else_is_amiss_with_them():
    snapshot = placed("flat-8", [make_guest(1), make_guest(2, dedicated=True)], {1: 1, 2: 1})
    odd = replace(
        snapshot.guests[A], scheduler=SchedulerState(3, 100_000, 7_000),
        memory_current=Bytes(BOOT_MEMORY + 90 * MIB), vcpus_online=3,
    )  # fmt: skip
    snapshot = replace(snapshot, guests={**snapshot.guests, A: odd})
    plan = plan_decision(snapshot, decide(snapshot, B, to={2: (1, 0)}))
    assert {type(s) for s in plan.steps if s.guest == A} == {PinVcpu, MarkPins}
    # a guest whose pool stays as it is is left alone
    plan = plan_decision(snapshot, decide(snapshot, B, to={2: (0, 64)}))
    assert plan.guests == {B}


def test_memory_is_left_alone_where_only_cpu_changes_and_it_sticks_within_tolerance():
    snapshot = placed("flat-8", [make_guest(1, memory=BOOT_MEMORY + 64 * MIB)], {1: 1})
    stuck = VirtioMem("vm0", 0, Bytes(512 * MIB), Bytes(BLOCK), Bytes(66 * MIB), Bytes(66 * MIB))
    state = replace(
        snapshot.guests[A], virtio_mem=(stuck,), memory_current=Bytes(BOOT_MEMORY + 66 * MIB)
    )
    snapshot = replace(snapshot, guests={A: state})
    plan = plan_decision(snapshot, decide(snapshot, A, to={1: (0.5, 0)}))
    assert ResizeVirtioMem not in kinds(plan)
    assert kinds(plan_convergence(snapshot, [A], REQUEST)) == [ResizeVirtioMem]


def test_virtio_mem_devices_shrink_last_first_and_grow_first_first():
    guest = make_guest(1, memory=BOOT_MEMORY + 200 * MIB, memory_max=BOOT_MEMORY + 300 * MIB,
                       devices=3)  # fmt: skip
    snapshot = placed("small-2", [guest], {1: 1})
    plan = plan_decision(snapshot, decide(snapshot, A, to={1: (0, -120)}))
    assert [(s.alias, s.before, s.after) for s in plan.steps] == [
        ("vm0", 100 * MIB, 80 * MIB), ("vm1", 100 * MIB, 0),
    ]  # fmt: skip
    plan = plan_decision(snapshot, decide(snapshot, A, to={1: (0, 50)}), deadline_s=3.0)
    assert [(s.alias, s.before, s.after) for s in plan.steps] == [("vm2", 0, 50 * MIB)]
    assert plan.steps[0].deadline_s == 3.0


def test_balloon_and_fixed_memory():
    balloon = make_guest(1, mechanism=MemoryMechanism.BALLOON, memory=256 * MIB)
    fixed = make_guest(2, mechanism=MemoryMechanism.FIXED)
    snapshot = placed("flat-8", [balloon, fixed], {1: 1, 2: 1})
    plan = plan_decision(snapshot, decide(snapshot, A, to={1: (0, -64), 2: (0, 64)}))
    assert [(type(s), s.before, s.after) for s in plan.steps] == [
        (SetBalloon, 256 * MIB, 192 * MIB)
    ]


def test_a_fresh_guest_is_brought_in_and_restored_to_what_was_found():
    topology = load_host("smt-4x2")
    fresh = make_guest(
        1, shares=50, vcpus_online=2, emulator_affinity=topology.cpus,
        vcpu_affinity={0: topology.cpus, 1: topology.cpus},
    )  # fmt: skip
    held = Amounts.of(cpu=1500, memory=BOOT_MEMORY)
    snapshot = snapshot_of(topology, [fresh], {A: (held, ())}, cpus="0-3", housekeeping="4")
    plan = plan_convergence(snapshot, [A], REQUEST)
    assert kinds(plan) == [SetQuota, PinVcpu, PinVcpu, SetShares, PinEmulator, MarkPins]
    assert [(str(s.before), str(s.after)) for s in plan.steps] == [
        ("-1", "1500"), ("0-7", "0-3"), ("0-7", "0-3"), ("100", "50"), ("0-7", "4"),
        ("", "0=0-3 1=0-3 emulator=4"),
    ]  # fmt: skip


def test_affinity_that_was_not_read_counts_as_anywhere():
    guest = make_guest(1, vcpus_online=1)
    snapshot = snapshot_of(
        load_host("flat-8"), [guest], {A: (Amounts.of(cpu=500), ())}, cpus="4-7", housekeeping="4"
    )
    plan = plan_convergence(snapshot, None, REQUEST)
    assert all(s.before for s in plan.steps if isinstance(s, PinVcpu | PinEmulator))
    assert SetBalloon not in kinds(plan)
    assert ResizeVirtioMem not in kinds(plan), "no memory in the books: not ours to set"


def test_a_paused_guest_is_mended_without_asking_it():
    guest = make_guest(1, dedicated=True)
    snapshot = placed("flat-8", [guest], {1: 2})
    paused = replace(
        snapshot.guests[A], state=RunState.PAUSED, vcpus_online=1, vcpu_affinity={0: CpuSet((7,))}
    )
    plan = plan_convergence(replace(snapshot, guests={A: paused}), None, REQUEST)
    assert [str(s) for s in plan.steps] == ["guest1: vCPU 0 on pCPU 7 -> 1"]


@pytest.mark.parametrize("change", [{"state": RunState.SHUTOFF, "pid": None}, {"policy": None}])
def test_guests_that_do_not_run_or_are_not_managed_are_never_touched(change):
    snapshot = placed("flat-8", [make_guest(1), make_guest(2, dedicated=True)], {1: 1, 2: 1})
    other = replace(snapshot.guests[A], vcpu_affinity={0: CpuSet((3,))}, **change)
    snapshot = replace(snapshot, guests={**snapshot.guests, A: other})
    assert plan_convergence(snapshot, None, REQUEST).guests <= {B}
    assert plan_decision(snapshot, decide(snapshot, B, to={2: (1, 0)})).guests == {B}


def test_the_operators_pins_hold_for_shared_guests_and_after_a_lift():
    pins = {0: CpuSet((3, 4)), 1: CpuSet((1,))}
    shared = make_guest(1, config_pins=pins)
    snapshot = placed("flat-8", [shared, make_guest(2, dedicated=True)], {1: 2, 2: 1})
    assert snapshot.guests[A].vcpu_affinity[0] == CpuSet((3, 4))
    # pCPU 1 went to the dedicated guest: nothing is left of the pin, so the vCPU floats
    assert snapshot.guests[A].vcpu_affinity[1] == CpuSet.parse("0,2-7")
    plan = plan_lift(snapshot, A, REQUEST)
    assert [str(s) for s in plan.steps] == [
        "guest1: vCPU 1 on pCPU 0,2-7 -> 1",
        "guest1: cap 2 CPU -> none",
        "guest1: emulator on pCPU 0 -> 0-7",
        "guest1: mark of our pins 1=0,2-7/1 emulator=0 -> none",
    ]
    assert plan_lift(snapshot, C, REQUEST).steps == ()


def test_a_guest_dedicated_no_more_gives_its_order_back():
    snapshot = placed("flat-8", [make_guest(1, dedicated=True)], {1: 2})
    shared = replace(snapshot.guests[A], policy=make_guest(1).policy)
    plan = plan_convergence(replace(snapshot, guests={A: shared}), None, REQUEST)
    assert plan.orders == {A: ()}
    assert kinds(plan) == [SetQuota, PinVcpu, PinVcpu, MarkPins]


def test_a_movable_guest_is_pulled_after_its_pcpus():
    nodes = CpuSet((0,))
    movable = make_guest(1, dedicated=True, numa_mode=NumaMode.RESTRICTIVE, numa_nodes=nodes)
    full = make_guest(2, dedicated=True, vcpus_max=64)
    snapshot = placed("two-sockets", [movable, full], {1: 1, 2: 1})
    cpus = tuple(
        c for c in load_host("two-sockets").nodes[0].cpus
        if c not in snapshot.books.holdings[A].order
    )  # fmt: skip
    books = Books(7, {
        A: snapshot.books.holdings[A],
        B: Holding(B, Amounts.of(cpu=1000 * len(cpus), memory=BOOT_MEMORY), cpus),
    })  # fmt: skip
    snapshot = replace(snapshot, books=books)
    plan = plan_decision(snapshot, decide(snapshot, A, to={1: (1, 0)}))
    pulls = [s for s in plan.steps if isinstance(s, SetNodeset)]
    assert [(str(s.before), str(s.after)) for s in pulls] == [("0", "1")]


def test_a_refusal_passes_through():
    snapshot = placed("smt-4x2", [make_guest(1, dedicated=True, smt=Smt.ISOLATE)], {1: 4})
    refused = plan_decision(snapshot, decide(snapshot, A, to={1: (1, 0)}))
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.NO_PLACEMENT


def pin(guest, before, after, vcpu=0):
    return PinVcpu(guest=guest, vcpu=vcpu, before=CpuSet.parse(before), after=CpuSet.parse(after))


def test_moves_wait_for_who_leaves_and_a_ring_is_cut_once():
    chain = [pin(A, "1", "2"), pin(B, "2", "3"), pin(C, "3", "4")]
    assert [p.guest for p in order_pins(chain, ())] == [C, B, A]
    ring = [pin(A, "9", "1"), pin(B, "1", "2"), pin(C, "2", "1")]
    assert [p.guest for p in order_pins(ring, ())] == [B, A, C]


def test_narrowing_goes_first_and_widening_last():
    pins = [pin(A, "1", "1-3"), pin(B, "5", "6"), pin(C, "3-6", "4")]
    assert [p.guest for p in order_pins(pins, ())] == [C, B, A]
    both = [pin(A, "0-3", "1"), pin(B, "0-3", "0,2-3")]
    assert [p.guest for p in order_pins(both, {A})] == [B, A], "the pool withdraws first"


def test_differences_name_each_thing():
    snapshot = placed("flat-8", [make_guest(1, memory=BOOT_MEMORY + 64 * MIB)], {1: 2})
    held = {g: h.amounts for g, h in snapshot.books.holdings.items()}
    intended = intended_state(snapshot, held, choose_layout(snapshot, held), A)
    state = snapshot.guests[A]
    assert differences(intended, state) == []
    near = replace(state, memory_current=Bytes(state.memory_current - 4 * MIB))
    assert differences(intended, near) == []
    off = replace(
        state, vcpus_online=3, emulator_affinity=CpuSet((5,)),
        vcpu_affinity={**state.vcpu_affinity, 1: CpuSet((7,))},
        scheduler=SchedulerState(200, 50_000, 50_000),
        memory_current=Bytes(state.memory_current - 5 * MIB),
    )  # fmt: skip
    assert [str(d) for d in differences(intended, off)] == [
        "vcpu 1 affinity: 7 instead of 0-7",
        "vcpus: 3 instead of 2",
        "quota: 1 CPU instead of 2 CPU",
        "shares: 200 instead of 100",
        "memory: 187MiB instead of 192MiB",
        "emulator: 5 instead of 0",
    ]
    fewer = replace(state, vcpus_online=1, vcpu_affinity={0: state.vcpu_affinity[0]})
    assert [d.what for d in differences(intended, fewer)] == ["vcpus"]


def test_quota_is_read_against_its_period():
    guest = make_guest(1, scheduler=SchedulerState(None, 50_000, 25_000))
    assert quota_of(guest) == 500
    assert quota_of(replace(guest, scheduler=SchedulerState())) == -1
    assert SetVcpuCount.needs_guest


def test_a_mark_that_was_lost_is_written_again_and_only_then():
    snapshot = placed("flat-8", [make_guest(1), make_guest(2, dedicated=True)], {1: 1, 2: 2})
    bare = replace(snapshot.guests[B], marked_pins=NO_MARK)
    lost = replace(snapshot, guests={**snapshot.guests, B: bare})
    [step] = plan_convergence(lost, None, REQUEST).steps
    assert isinstance(step, MarkPins)
    assert (step.guest, str(step.after)) == (B, "0=1 1=2 emulator=0")


def test_entries_of_vcpus_that_left_do_not_bring_a_step():
    snapshot = placed("flat-8", [make_guest(1, dedicated=True)], {1: 2})
    guest = snapshot.guests[A]
    more = PinMark((*guest.marked_pins.pins, MarkedPin(5, CpuSet((7,)))))
    known = replace(snapshot, guests={A: replace(guest, marked_pins=more)})
    assert plan_convergence(known, None, REQUEST).steps == ()


def test_the_operators_own_pins_are_not_marked():
    pins = {0: CpuSet((3, 4)), 1: CpuSet((1, 3))}
    snapshot = placed("flat-8", [make_guest(1, config_pins=pins)], {1: 2}, cpus="2-5")
    assert str(snapshot.guests[A].marked_pins) == "1=3/1,3 emulator=0"


def test_a_guest_that_may_run_anywhere_and_is_not_pinned_has_no_mark():
    topology = load_host("flat-8")
    free = make_guest(1)
    held = Amounts.of(cpu=1000, memory=BOOT_MEMORY)
    snapshot = snapshot_of(topology, [free], {A: (held, ())}, housekeeping="0-7")
    assert MarkPins not in kinds(plan_convergence(snapshot, None, REQUEST))
