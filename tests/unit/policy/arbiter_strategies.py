"""Hypothesis strategies for arbiter tests: guests of every kind, and hosts that they crowd.

Holdings are generated between each guest's floor and ceiling as an independent reading of
architecture.md has them (`bounds`, shared with the reference allocator; nothing from `policy`).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace

from host_data import HOSTS, load_host
from hypothesis import strategies as st

from virtfabric.model.amounts import Amounts
from virtfabric.model.guest import GuestState, MemoryMechanism, RunState, VirtioMem
from virtfabric.model.host import Capacity
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.model.want import Mode, Want

PRIORITIES = (0, 10, 10, 50, 50, 90, 100)
OVERHEAD = 32 * MIB
RESERVE = 16 * MIB


def uuid_of(number: int) -> GuestId:
    """UUIDs whose order is not the order of the numbers."""
    return GuestId(uuid.UUID(int=(number * 0x9E3779B97F4A7C15_F39CC0605CEDC835) % (1 << 128)))


@dataclass(frozen=True)
class Bounds:
    """Floor, ceiling and step of one resource."""

    floor: int
    ceiling: int
    step: int


def cpu_bounds(guest: GuestState) -> Bounds:
    policy = guest.policy.cpu
    most = guest.vcpus_max * 1000
    limit = min(most, policy.limit if policy.limit is not None else most)
    if policy.placement is Placement.DEDICATED:
        floor = min(most, max(1, -(-policy.reservation // 1000)) * 1000)
        return Bounds(floor, max(floor, limit // 1000 * 1000), 1000)
    floor = min(most, max(100, policy.reservation))
    return Bounds(floor, max(floor, limit), 1)


def memory_bounds(guest: GuestState, *, lend: bool) -> Bounds:
    policy = guest.policy.memory
    limit = min(guest.memory_max, guest.memory_max if policy.limit is None else policy.limit)
    if guest.mechanism is MemoryMechanism.VIRTIO_MEM:
        block = max(d.block for d in guest.virtio_mem)
        boot = guest.boot_memory
        blocks = (guest.memory_max - boot) // block
        floor = boot
        while floor < policy.reservation and floor < boot + blocks * block:
            floor += block
        ceiling = boot + min(blocks, (limit - boot) // block) * block
        return Bounds(floor, max(floor, ceiling), block)
    if guest.mechanism is MemoryMechanism.BALLOON and lend:
        floor = min(guest.memory_max, max(policy.reservation, 64 * MIB))
        return Bounds(floor, max(floor, limit), MIB)
    return Bounds(guest.memory_max, guest.memory_max, MIB)


@st.composite
def policies(draw: st.DrawFn, *, plain: bool) -> GuestPolicy:
    dedicated = not plain and draw(st.booleans())
    reservation = draw(st.sampled_from((0, 0, 50, 250, 1000, 1500)))
    limit = draw(st.none() | st.integers(reservation, 6000))
    memory = draw(st.integers(0, 300)) * MIB
    memory_limit = draw(st.none() | st.integers(300, 900))
    if plain:
        limit = memory_limit = None
    return GuestPolicy(
        priority=draw(st.sampled_from(PRIORITIES)),
        cpu=CpuPolicy(
            MilliCpu(reservation),
            None if limit is None else MilliCpu(limit),
            draw(st.sampled_from((1, 50, 100, 100, 300))),
            Placement.DEDICATED if dedicated else Placement.SHARED,
        ),
        memory=MemoryPolicy(
            Bytes(memory),
            None if memory_limit is None else Bytes(memory_limit * MIB),
            draw(st.sampled_from((10, 100, 100, 400))),
        ),
    )


@st.composite
def guests(draw: st.DrawFn, number: int, *, plain: bool = False) -> GuestState:
    """One guest; `plain` ones are managed, running, shared, with virtio-mem and far ceilings."""
    kind = MemoryMechanism.VIRTIO_MEM if plain else draw(st.sampled_from(list(MemoryMechanism)))
    block = 2 * MIB if plain else draw(st.sampled_from((2, 2, 8, 128))) * MIB
    boot = draw(st.sampled_from((64, 100, 256))) * MIB
    virtio = kind is MemoryMechanism.VIRTIO_MEM
    size = draw(st.integers(0, 4)) * 128 * MIB
    size = 1 << 50 if plain else max(size, block)
    most = boot + size if virtio else max(boot, size)
    state = st.just(RunState.RUNNING) if plain else st.sampled_from(RUN_STATES)
    devices = (VirtioMem("v", 0, Bytes(size), Bytes(block), Bytes(0), Bytes(0)),)
    return GuestState(
        uuid=uuid_of(number),
        name=f"guest{number}",
        state=draw(state),
        vcpus_max=1 << 20 if plain else draw(st.integers(1, 6)),
        vcpus_online=1 if plain else draw(st.integers(1, 2)),
        boot_memory=Bytes(boot if virtio else most),
        memory_current=Bytes(boot if virtio else most),
        memory_max=Bytes(most),
        mechanism=kind,
        virtio_mem=devices if virtio else (),
        job=None if plain else draw(st.sampled_from((None, None, None, "backup"))),
        policy=draw(policies(plain=plain)) if plain or draw(st.integers(0, 5)) else None,
    )


RUN_STATES = [RunState.RUNNING] * 4 + [RunState.PAUSED, RunState.SHUTOFF]


def between(bounds: Bounds) -> st.SearchStrategy[int]:
    steps = (bounds.ceiling - bounds.floor) // bounds.step
    picks = st.integers(0, min(steps, 3000))
    return picks.map(lambda n: bounds.floor + n * bounds.step)


@st.composite
def snapshots(draw: st.DrawFn, *, plain: bool = False) -> HostSnapshot:
    """A host with up to eight guests; its memory is near what they use, its CPUs may be too few."""
    topology = load_host(draw(st.sampled_from(HOSTS)))
    lend = draw(st.booleans())
    count = draw(st.integers(3, 4) if plain else st.integers(0, 8))
    found = [draw(guests(number, plain=plain)) for number in range(count)]
    holdings: dict[GuestId, Holding] = {}
    for guest in found:
        if guest.policy is None or (guest.state is RunState.SHUTOFF and draw(st.booleans())):
            continue
        amounts = Amounts.of(
            cpu=draw(between(cpu_bounds(guest))),
            memory=draw(between(memory_bounds(guest, lend=lend))),
        )
        holdings[guest.uuid] = Holding(guest.uuid, amounts)
    busy = [] if plain or not found else draw(st.lists(st.sampled_from(found), max_size=2))
    snapshot = HostSnapshot(
        generation=draw(st.integers(1, 9)),
        topology=topology,
        capacity=Capacity(CpuSet(), CpuSet({0}), {}, Bytes(RESERVE), Bytes(OVERHEAD)),
        guests={g.uuid: g for g in found},
        books=Books(3, holdings),
        busy=frozenset(g.uuid for g in busy),
        lend_ballooned=lend,
    )
    used_cpu, used_memory = used(snapshot)
    cpus = min(len(topology.cpus), -(-used_cpu // 1000) + draw(st.integers(0, 3)))
    memory = used_memory + RESERVE + draw(st.integers(-64, 512)) * MIB
    managed = CpuSet(topology.cpus.sorted()[: max(1, cpus)])
    capacity = replace(snapshot.capacity, cpus=managed, memory={0: Bytes(max(0, memory))})
    return replace(snapshot, capacity=capacity)


def starting(guest: GuestState, *, lend: bool) -> Amounts:
    """What a managed guest counts with until it is taken over."""
    least = max(memory_bounds(guest, lend=lend).floor, guest.memory_current)
    return Amounts.of(cpu=cpu_bounds(guest).floor, memory=least)


def used(snapshot: HostSnapshot) -> tuple[int, int]:
    """Milli-CPU and bytes in use, guest by guest, as architecture.md counts them."""
    cpu = memory = 0
    host, managed = snapshot.topology.cpus, snapshot.capacity.cpus or snapshot.topology.cpus
    for guest in snapshot.guests.values():
        holding = snapshot.books.holdings.get(guest.uuid)
        running = guest.state is not RunState.SHUTOFF
        if holding is None and not running:
            continue
        memory += snapshot.capacity.overhead
        if guest.policy is None and (running or holding is None):
            cpu += -(-guest.vcpus_online * 1000 * len(managed) // len(host))
            memory += guest.memory_max
            continue
        amounts = holding.amounts if holding else starting(guest, lend=snapshot.lend_ballooned)
        cpu += amounts.cpu
        ballooned = guest.mechanism is MemoryMechanism.BALLOON and snapshot.lend_ballooned
        removable = ballooned or guest.mechanism is MemoryMechanism.VIRTIO_MEM
        held = amounts.memory
        memory += held if removable else max(held, guest.memory_max)
    return cpu, memory


def wants(step: int) -> st.SearchStrategy[Want | None]:
    by = st.integers(-40, 40).map(lambda n: Want(Mode.BY, n * step))
    to = st.integers(0, 60).map(lambda n: Want(Mode.TO, n * step))
    return st.none() | by | by | to


@st.composite
def requests(draw: st.DrawFn, snapshot: HostSnapshot) -> Request:
    known = sorted(snapshot.guests) or [uuid_of(99)]
    return Request(
        RequestId("req"), draw(st.sampled_from(known)), AGENT, Origin.AGENT,
        cpu=draw(wants(100)), memory=draw(wants(7 * MIB)), partial=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[HostSnapshot, Request]:
    """Any host and any request, sensible or not."""
    snapshot = draw(snapshots())
    return snapshot, draw(requests(snapshot))


@st.composite
def hopeful_cases(draw: st.DrawFn) -> tuple[HostSnapshot, Request]:
    """A request for more, for a guest that may have it: mostly granted, mostly at others' cost."""
    snapshot = draw(snapshots())
    free_cpu, free_memory = draw(st.integers(0, 700)), draw(st.integers(0, 40)) * MIB
    borrower = draw(guests(50, plain=True))
    assert borrower.policy is not None
    kind = draw(st.sampled_from((Placement.SHARED, Placement.SHARED, Placement.DEDICATED)))
    cpu = replace(borrower.policy.cpu, placement=kind)
    policy = replace(borrower.policy, priority=draw(st.sampled_from((50, 91, 91))), cpu=cpu)
    borrower = replace(borrower, policy=policy)
    held = Amounts.of(
        cpu=cpu_bounds(borrower).floor, memory=memory_bounds(borrower, lend=False).floor
    )
    books = replace(
        snapshot.books,
        holdings={**snapshot.books.holdings, borrower.uuid: Holding(borrower.uuid, held)},
    )
    snapshot = replace(snapshot, guests={**snapshot.guests, borrower.uuid: borrower}, books=books)
    used_cpu, used_memory = used(snapshot)
    cpus = CpuSet(snapshot.topology.cpus.sorted()[: max(1, -(-(used_cpu + free_cpu) // 1000))])
    memory = {0: Bytes(used_memory + RESERVE + free_memory)}
    snapshot = replace(snapshot, capacity=replace(snapshot.capacity, cpus=cpus, memory=memory))
    step = 1000 if kind is Placement.DEDICATED else 100
    cpu_want = draw(st.none() | st.integers(0, 12).map(lambda n: Want(Mode.BY, n * step)))
    memory_want = draw(st.none() | st.integers(0, 60).map(lambda n: Want(Mode.BY, n * 4 * MIB)))
    return snapshot, Request(
        RequestId("req"), borrower.uuid, AGENT, Origin.AGENT, cpu_want, memory_want,
        partial=draw(st.booleans()),
    )  # fmt: skip


def any_case() -> st.SearchStrategy[tuple[HostSnapshot, Request]]:
    return hopeful_cases() | hopeful_cases() | cases()
