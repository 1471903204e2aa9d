"""Placement as properties, on every host: a small pure simulator applies and undoes the plans."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from examples import examples as share
from host_data import (
    BLOCK,
    BOOT_MEMORY,
    HOSTS,
    decision_of,
    guest_id,
    load_host,
    make_guest,
    settle,
    snapshot_of,
)  # fmt: skip
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import MemoryMechanism, SchedulerState, VirtioMem
from virtfabric.model.ids import RequestId
from virtfabric.model.ledger import Books, Holding
from virtfabric.model.mark import PinMark
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
    parse_step,
)  # fmt: skip
from virtfabric.model.policy import Placement, Smt
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.policy.intent import differences, intended_pins, intended_state, quota_of, shares_of
from virtfabric.policy.layout import choose_layout
from virtfabric.policy.placement import (
    plan_convergence,
    plan_decision,
    plan_lift,
)
from virtfabric.policy.stepper import spread_virtio_mem

REQUEST = RequestId("req-1")


@dataclass
class Sim:
    """One guest as libvirt would show it; a vCPU keeps its pin while it is unplugged."""

    online: int
    pins: dict[int, CpuSet]
    emulator: CpuSet
    quota: int
    shares: int
    nodes: CpuSet
    memory: dict[str, int]
    mark: PinMark
    settled: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, state):
        memory = {d.alias: int(d.requested) for d in state.virtio_mem}
        if state.mechanism is MemoryMechanism.BALLOON:
            memory["balloon"] = int(state.memory_current)
        return cls(
            state.vcpus_online, dict(state.vcpu_affinity), state.emulator_affinity,
            quota_of(state), shares_of(state), state.numa_nodes, memory,
            state.marked_pins, set(range(state.vcpus_online)),
        )  # fmt: skip

    def run(self, step, *, undo=False):
        if undo:
            step = step.inverse()
        match step:
            case SetVcpuCount():
                assert self.online == step.before
                self.online = step.after
                self.settled &= set(range(self.online))
                if undo and step.optional:
                    self.settled |= set(range(self.online))
            case PinVcpu():
                if step.vcpu < self.online:
                    assert step.vcpu not in self.settled or self.pins[step.vcpu] == step.before
                    self.pins[step.vcpu] = step.after
                    if undo and step.before == step.after:
                        self.settled.discard(step.vcpu)
                    else:
                        self.settled.add(step.vcpu)
            case ResizeVirtioMem():
                assert self.memory[step.alias] == step.before
                self.memory[step.alias] = step.after
            case SetBalloon():
                assert self.memory["balloon"] == step.before
                self.memory["balloon"] = step.after
            case PinEmulator() | SetQuota() | SetShares() | SetNodeset() | MarkPins():
                name = {
                    PinEmulator: "emulator", SetQuota: "quota", SetShares: "shares",
                    SetNodeset: "nodes",
                    MarkPins: "mark",
                }[type(step)]  # fmt: skip
                assert getattr(self, name) == step.before
                setattr(self, name, step.after)

    def seen(self):
        # what a vCPU is pinned to between its plug and its first pin is libvirt's business
        pins = {v: c for v, c in self.pins.items() if v < self.online and v in self.settled}
        return (
            self.online, pins, self.emulator, self.quota, self.shares, self.nodes,
            dict(self.memory), self.mark,
        )  # fmt: skip


def simulate(snapshot):
    return {g: Sim.of(s) for g, s in snapshot.guests.items()}


def seen(sims):
    return {g: s.seen() for g, s in sims.items()}


def amounts_of(snapshot):
    return {g: h.amounts for g, h in snapshot.books.holdings.items()}


@st.composite
def guests_on(draw, name):
    """A host with its guests placed and settled: live state is what the books intend."""
    topology = load_host(name)
    spare = min(len(topology.cpus), 24)
    guests, held = [], {}
    for number in range(draw(st.integers(1, min(6, spare)))):
        dedicated = draw(st.booleans())
        most = draw(st.integers(1, 8))
        cpu = 1000 * draw(st.integers(1, most)) if dedicated else draw(st.integers(10, 2500))
        assume(cpu <= most * 1000 or not dedicated)
        mechanism = draw(st.sampled_from([MemoryMechanism.VIRTIO_MEM, MemoryMechanism.BALLOON]))
        memory = BOOT_MEMORY + BLOCK * draw(st.integers(0, 64))
        guests.append(
            make_guest(
                number, dedicated=dedicated, smt=draw(st.sampled_from(Smt)), vcpus_max=most,
                mechanism=mechanism, memory=memory, devices=draw(st.integers(1, 3)),
                shares=draw(st.sampled_from([50, 100])),
            )
        )  # fmt: skip
        if draw(st.booleans()) or number == 0:
            held[guest_id(number)] = Amounts.of(cpu=cpu, memory=memory)
    cpus = draw(st.sampled_from([topology.cpus, CpuSet(sorted(topology.cpus)[1:])]))
    assume(sum(a.cpu for a in held.values()) <= 1000 * len(cpus))
    snapshot = snapshot_of(topology, guests, {g: (a, ()) for g, a in held.items()}, cpus=cpus)
    layout = choose_layout(snapshot, held)
    assume(not isinstance(layout, Refusal))
    holdings = {g: Holding(g, a, layout.orders.get(g, ())) for g, a in held.items()}
    snapshot = replace(snapshot, books=Books(7, holdings))
    intended = {g: intended_state(snapshot, held, layout, g) for g in held}
    unknown = {
        g: replace(s, vcpu_affinity={0: topology.cpus}, emulator_affinity=topology.cpus)
        for g, s in snapshot.guests.items()
    }
    settled = settle(replace(snapshot, guests=unknown), intended)
    return with_surplus(draw, settled, layout)


def with_surplus(draw, snapshot, layout):
    """Some guests have kept vCPUs that they hold nothing for: stacked, as an unplug that failed."""
    guests = dict(snapshot.guests)
    for guest in snapshot.books.holdings:
        state = guests[guest]
        online = draw(st.integers(state.vcpus_online, state.vcpus_max))
        pins = intended_pins(state, layout.orders.get(guest, ()), layout.pool, online)
        guests[guest] = replace(
            state, vcpus_online=online, vcpu_affinity=pins, vcpu_unplug=draw(st.booleans()),
            vcpus_boot=draw(st.integers(1, online)),
        )  # fmt: skip
    return replace(snapshot, guests=guests)


@st.composite
def decisions_on(draw, name):
    """A settled host and a decision that moves CPU and memory between its guests."""
    snapshot = draw(guests_on(name))
    after = {}
    chosen = draw(st.lists(st.sampled_from(sorted(snapshot.guests)), min_size=1, unique=True))
    for guest in chosen:
        state = snapshot.guests[guest]
        whole = state.policy.cpu.placement is Placement.DEDICATED
        cpu = (
            st.integers(1, state.vcpus_max).map(lambda n: n * 1000)
            if whole
            else (st.integers(10, state.vcpus_max * 1000))
        )
        memory = st.integers(0, 64).map(lambda n: BOOT_MEMORY + n * BLOCK)
        after[guest] = Amounts.of(cpu=draw(cpu), memory=draw(memory))
    total = amounts_of(snapshot) | after
    assume(sum(a.cpu for a in total.values()) <= 1000 * len(snapshot.capacity.cpus))
    return snapshot, decision_of(snapshot, chosen[0], after)


@st.composite
def handovers_on(draw, name):
    """A full host on which one dedicated guest pays whole CPUs to another."""
    topology = load_host(name)
    count = min(len(topology.cpus), 8)
    cpus = CpuSet(sorted(topology.cpus)[-count:])
    first = draw(st.integers(1, count - 1))
    held = {guest_id(0): first, guest_id(1): count - first}
    payer = guest_id(draw(st.integers(0, 1)))
    gainer = min(set(held) - {payer})
    paid = draw(st.integers(0, held[payer] - 1))
    amounts = {g: Amounts.of(cpu=1000 * n, memory=BOOT_MEMORY) for g, n in held.items()}
    guests = [make_guest(n, dedicated=True, vcpus_max=count) for n in range(2)]
    snapshot = snapshot_of(topology, guests, {g: (a, ()) for g, a in amounts.items()}, cpus=cpus)
    layout = choose_layout(snapshot, amounts)
    holdings = {g: Holding(g, a, layout.orders[g]) for g, a in amounts.items()}
    snapshot = replace(snapshot, books=Books(7, holdings))
    intended = {g: intended_state(snapshot, amounts, layout, g) for g in amounts}
    snapshot = with_surplus(draw, settle(snapshot, intended), layout)
    change = Amounts.of(cpu=1000 * paid)
    after = {payer: amounts[payer] - change, gainer: amounts[gainer] + change}
    return snapshot, decision_of(snapshot, gainer, after)


@st.composite
def drifted(draw, name):
    """A settled host whose guests somebody else has touched."""
    snapshot = draw(guests_on(name))
    everywhere = sorted(snapshot.topology.cpus)
    some = st.lists(st.sampled_from(everywhere), min_size=1, unique=True).map(CpuSet)
    guests = dict(snapshot.guests)
    for guest in draw(st.lists(st.sampled_from(sorted(guests)), unique=True)):
        state = guests[guest]
        online = draw(st.integers(1, state.vcpus_max))
        guests[guest] = replace(
            state,
            vcpus_online=online,
            vcpu_affinity={v: draw(some) for v in range(online)},
            emulator_affinity=draw(some),
            scheduler=SchedulerState(draw(st.sampled_from([None, 30])), 100_000, 40_000),
        )
    return replace(snapshot, guests=guests)


def on_all_hosts(strategy, examples=15):
    def decorate(check):
        @pytest.mark.parametrize("name", HOSTS)
        def test(name):
            @settings(
                max_examples=share(examples), deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(strategy(name))
            def run(value):
                check(value)

            run()

        test.__name__ = check.__name__
        return test

    return decorate


@on_all_hosts(decisions_on, examples=30)
def test_sets_are_disjoint_and_smt_holds(case):
    snapshot, decision = case
    held = {g: a for g, a in (amounts_of(snapshot) | decision.holdings).items() if a}
    layout = choose_layout(snapshot, held)
    assume(not isinstance(layout, Refusal))
    used = Counter(c for order in layout.orders.values() for c in order)
    assert all(count == 1 for count in used.values())
    assert layout.pool.isdisjoint(used)
    assert layout.pool | set(used) <= snapshot.capacity.cpus
    floating = [g for g in held if g not in layout.orders]
    assert not floating or len(layout.pool) * 1000 >= sum(held[g].cpu for g in floating)
    assert not floating or layout.pool
    assert layout.housekeeping
    for guest, order in layout.orders.items():
        assert len(order) == held[guest].cpu // 1000
        smt = snapshot.guests[guest].policy.cpu.smt
        others = (set(used) | layout.pool) - set(order)
        cores = {snapshot.topology.pcpus[c].siblings for c in order}
        if smt is not Smt.PREFER:
            assert all(core.isdisjoint(others) for core in cores)
        if smt is Smt.ISOLATE:
            assert len(cores) == len(order)
        if smt is Smt.REQUIRE:
            assert len(cores) == -(-len(order) // max(len(c) for c in cores))


@on_all_hosts(decisions_on, examples=30)
def test_steps_lead_exactly_to_the_intended_state_and_back_from_any_prefix(case):
    snapshot, decision = case
    plan = plan_decision(snapshot, decision, deadline_s=12.0)
    assume(not isinstance(plan, Refusal))
    sims = simulate(snapshot)
    start = seen(sims)
    trail = [start]
    for step in plan.steps:
        assert step.before or step.before == 0 or isinstance(step, MarkPins)
        sims[step.guest].run(step)
        trail.append(seen(sims))
    held = {g: a for g, a in (amounts_of(snapshot) | decision.holdings).items() if a}
    layout = choose_layout(snapshot, held)
    former = {g: h.order for g, h in snapshot.books.holdings.items() if h.order}
    afterwards = dict.fromkeys(former, ()) | layout.orders
    assert former | plan.orders == afterwards
    assert all(order != former.get(g, ()) for g, order in plan.orders.items())
    for guest in held:
        intended = intended_state(snapshot, held, layout, guest)
        sim, state = sims[guest], snapshot.guests[guest]
        # others than those of the decision get pins; a surplus vCPU of theirs may stay
        assert sim.online == (intended.vcpus if guest in decision.holdings else state.vcpus_online)
        assert all(sim.pins[v] == c for v, c in intended.pins.items() if v < sim.online)
        assert sim.emulator == intended.emulator
        assert (sim.quota, sim.shares) == (intended.quota, intended.shares)
        boot = 0 if state.mechanism is MemoryMechanism.BALLOON else BOOT_MEMORY
        most = boot + sum(d.size for d in state.virtio_mem)
        expected = intended.memory if boot == 0 else min(intended.memory, most)
        assert boot + sum(sim.memory.values()) == expected
    for index in reversed(range(len(plan.steps))):
        step = plan.steps[index]
        sims[step.guest].run(step, undo=True)
        assert seen(sims) == trail[index]


@on_all_hosts(decisions_on)
def test_steps_are_ordered_encodable_and_deterministic(case):
    snapshot, decision = case
    plan = plan_decision(snapshot, decision, deadline_s=12.0)
    assume(not isinstance(plan, Refusal))
    assert plan == plan_decision(snapshot, decision, deadline_s=12.0)
    assert plan.generation == snapshot.generation
    assert plan.request == decision.request
    firm = [s.needs_guest for s in plan.steps if not s.optional]
    assert firm == sorted(firm, reverse=True), "what needs a guest comes first"
    optional = [s.optional for s in plan.steps]
    assert optional == sorted(optional), "an unplug that may fail comes last"
    for step in plan.steps:
        assert parse_step(step.to_json()) == step
        assert step.inverse().inverse() == step
        assert str(step)
        assert getattr(step, "deadline_s", 12.0) == 12.0
        if step.before == step.after:
            assert isinstance(step, PinVcpu)
            assert step.vcpu >= snapshot.guests[step.guest].vcpus_online
    plugged = {(s.guest): i for i, s in enumerate(plan.steps) if isinstance(s, SetVcpuCount)}
    for index, step in enumerate(plan.steps):
        if isinstance(step, PinVcpu) and step.vcpu >= snapshot.guests[step.guest].vcpus_online:
            assert plugged[step.guest] < index


def check_no_overlap(case):
    snapshot, decision = case
    plan = plan_decision(snapshot, decision)
    assume(not isinstance(plan, Refusal))
    # where a guest had to move aside for another, a ring of moves may be unavoidable
    assume(not any("nothing else fits" in o.why for o in plan.offers))
    old = {g for g, h in snapshot.books.holdings.items() if h.order}
    dedicated = [g for g in plan.orders if plan.orders[g] and g in old]
    sims = simulate(snapshot)
    for step in plan.steps:
        sims[step.guest].run(step)
        used = Counter()
        for guest in dedicated:
            sim = sims[guest]
            used.update({c for v in sim.settled if v < sim.online for c in sim.pins[v]})
        assert all(count == 1 for count in used.values()), str(step)


@on_all_hosts(decisions_on)
def test_dedicated_guests_never_overlap_on_the_way(case):
    check_no_overlap(case)


@on_all_hosts(handovers_on)
def test_pcpus_change_hands_without_overlap(case):
    check_no_overlap(case)


@on_all_hosts(drifted)
def test_convergence_mends_every_guest_and_then_finds_nothing_more(snapshot):
    plan = plan_convergence(snapshot, None, REQUEST)
    assert not isinstance(plan, Refusal)
    held = amounts_of(snapshot)
    layout = choose_layout(snapshot, held)
    sims = simulate(snapshot)
    for step in plan.steps:
        sims[step.guest].run(step)
    guests = dict(snapshot.guests)
    for guest in held:
        sim = sims[guest]
        guests[guest] = replace(
            guests[guest],
            vcpus_online=sim.online,
            vcpu_affinity={v: c for v, c in sim.pins.items() if v < sim.online},
            emulator_affinity=sim.emulator,
            scheduler=SchedulerState(sim.shares, 100_000, max(-1, sim.quota * 100)),
            marked_pins=sim.mark,
        )
        ours = {p.vcpu: p.cpus for p in sim.mark.pins}
        assert {v: ours[v] for v in range(sim.online)} == guests[guest].vcpu_affinity
        assert ours[None] == sim.emulator
        intended = intended_state(snapshot, held, layout, guest)
        assert not differences(intended, guests[guest])
    mended = replace(snapshot, guests=guests)
    assert not plan_convergence(mended, None, REQUEST).steps
    assert plan.guests <= set(held)


@on_all_hosts(drifted)
def test_lift_frees_a_guest(snapshot):
    guest = min(snapshot.books.holdings)
    plan = plan_lift(snapshot, guest, REQUEST)
    sims = simulate(snapshot)
    for step in plan.steps:
        sims[step.guest].run(step)
    sim = sims[guest]
    everywhere = snapshot.topology.cpus
    assert all(sim.pins[v] == everywhere for v in range(sim.online))
    assert (sim.emulator, sim.quota, sim.shares) == (everywhere, -1, 100)
    assert not sim.mark
    assert plan.guests <= {guest}


@settings(max_examples=share(60), deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(0, 32), min_size=1, max_size=4),
    target=st.integers(0, 128),
    odd=st.integers(0, BLOCK - 1),
)
def test_virtio_mem_is_spread_in_whole_blocks(sizes, target, odd):
    devices = tuple(
        VirtioMem(f"vm{i}", 0, Bytes(32 * BLOCK), Bytes(BLOCK), Bytes(n * BLOCK), Bytes(n * BLOCK))
        for i, n in enumerate(sizes)
    )
    found = spread_virtio_mem(devices, target * BLOCK + odd)
    assert all(0 <= f <= 32 * BLOCK and f % BLOCK == 0 for f in found)
    assert abs(sum(found) - min(target * BLOCK + odd, len(sizes) * 32 * BLOCK)) < BLOCK
    growing = [f - n * BLOCK for f, n in zip(found, sizes, strict=True)]
    assert all(g >= 0 for g in growing) or all(g <= 0 for g in growing)
