"""Messages of *carded* mode, for hypothesis: a small host with everything that a form has."""

import uuid

from hypothesis import strategies as st

from virtfabric.model.amounts import CPU_KEY, CXL_KEY, MEMORY_KEY, Amounts, Tier
from virtfabric.model.decision import Course, Take
from virtfabric.model.device import GuestDevice, HeldFunction, PciAddress
from virtfabric.model.errors import Reason
from virtfabric.model.guest import (
    FixedMemory,
    GuestState,
    MemoryMechanism,
    MemoryRoom,
    NumaMode,
    RunState,
    VirtioMem,
)
from virtfabric.model.host import Capacity, HostTopology, NumaNode, Pcpu
from virtfabric.model.ids import GrantId, GuestId, HostId, LoanId, RequestId
from virtfabric.model.ledger import Books, Grant, Holding, HostSnapshot, Loan, Residue
from virtfabric.model.policy import CpuPolicy, DevicePolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.reclaim import Recall
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.model.want import Mode, Want
from virtfabric.protocol import messages as m

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
GUESTS = st.integers(0, 99).map(lambda n: GuestId(uuid.UUID(int=n)))
SIZES = st.integers(0, 1 << 40).map(Bytes)
PAGES = st.sampled_from([Bytes(0), Bytes(2 * MIB), None])
SETS = st.sets(st.integers(0, 300), max_size=4).map(CpuSet)
KEYS = st.sampled_from([CPU_KEY, MEMORY_KEY, CXL_KEY])
AMOUNTS = st.dictionaries(KEYS, st.integers(0, 1 << 40)).map(Amounts)
SIGNED = st.dictionaries(KEYS, st.integers(-(1 << 40), 1 << 40)).map(Amounts)
FUNCTION = PciAddress("0000:3b:10.1")
DEVICES = st.builds(
    VirtioMem, NAMES, st.integers(0, 3), SIZES, SIZES.map(lambda n: Bytes(n + 1)), SIZES, SIZES,
    SETS, PAGES,
)  # fmt: skip
POLICIES = st.builds(
    GuestPolicy, st.integers(0, 100),
    cpu=st.builds(
        CpuPolicy, st.integers(0, 9000).map(MilliCpu),
        st.none() | st.integers(0, 9000).map(MilliCpu), st.integers(0, 500),
        st.sampled_from(Placement),
    ),
    memory=st.builds(
        MemoryPolicy, SIZES, st.none() | SIZES, st.integers(0, 500),
        st.sampled_from([("dram",), ("dram", "cxl")]),
    ),
    devices=st.sampled_from([(), (DevicePolicy("net.vf", 2, reclaimable=True),)]),
)  # fmt: skip


@st.composite
def guests(draw, number):
    affinity = draw(st.lists(SETS, max_size=2))
    return GuestState(
        uuid=GuestId(uuid.UUID(int=number)), name=draw(NAMES),
        state=draw(st.sampled_from(RunState)),
        vcpus_max=draw(st.integers(0, 99)), vcpus_online=draw(st.integers(0, 99)),
        vcpu_affinity=dict(enumerate(affinity)), boot_memory=draw(SIZES),
        memory_current=draw(SIZES), memory_max=draw(SIZES),
        mechanism=draw(st.sampled_from(MemoryMechanism)),
        virtio_mem=tuple(draw(st.lists(DEVICES, max_size=2))),
        numa_mode=draw(st.none() | st.sampled_from(NumaMode)), numa_nodes=draw(SETS),
        config_numa_nodes=draw(SETS), job=draw(st.none() | NAMES),
        policy=draw(st.none() | POLICIES), policy_error=draw(st.just("") | NAMES),
        devices=draw(st.sampled_from([(), (GuestDevice(FUNCTION),)])),
        free_ports=draw(st.integers(0, 9)),
        fixed_memory=tuple(
            draw(st.lists(st.builds(FixedMemory, NAMES, SIZES, SETS, PAGES), max_size=2))
        ),
        memory_room=draw(
            st.builds(
                MemoryRoom, st.integers(0, 9), SIZES, st.none() | st.integers(0, 3), PAGES
            )
        ),
    )  # fmt: skip


@st.composite
def hosts(draw):
    nodes, pcpus = {}, {}
    for number in range(draw(st.integers(0, 2))):
        tier = draw(st.sampled_from(Tier))
        cpus = CpuSet(range(number * 4, number * 4 + draw(st.integers(0, 3))))
        nodes[number] = NumaNode(
            number, cpus, draw(SIZES), Bytes(0), tier=tier, offlinable=draw(st.booleans())
        )
        pcpus |= {c: Pcpu(c, number, 0, c, CpuSet([c])) for c in cpus}
    by_node = st.dictionaries(st.integers(0, 9), SIZES, max_size=2)
    capacity = Capacity(
        draw(SETS), CpuSet(), draw(by_node), draw(SIZES), draw(SIZES), draw(by_node),
        draw(st.dictionaries(st.integers(0, 9), NAMES, max_size=2)),
    )  # fmt: skip
    return HostSnapshot(
        draw(st.integers(0, 1 << 50)),
        HostTopology(HostId(draw(NAMES)), nodes, pcpus, draw(SIZES)), capacity, {}, Books(),
        draw(AMOUNTS), frozenset(draw(st.sets(GUESTS, max_size=2))),
        lend_ballooned=draw(st.booleans()),
        recall=Recall(frozenset(draw(st.sets(st.integers(0, 9), max_size=2)))),
    )  # fmt: skip


@st.composite
def books(draw, numbers):
    held = [GuestId(uuid.UUID(int=number)) for number in numbers]
    functions = st.sampled_from([(), (HeldFunction("net.vf", FUNCTION),)])
    at = st.integers(0, 1 << 40).map(lambda n: n / 1000)
    return Books(
        holdings={
            g: Holding(g, draw(AMOUNTS), functions=draw(functions), named=draw(functions))
            for g in held
        },
        grants={
            GrantId(f"g{n}"): Grant(GrantId(f"g{n}"), g, draw(AMOUNTS), RequestId(""), draw(at))
            for n, g in enumerate(held)
        },
        loans={
            LoanId(f"l{n}"): Loan(
                LoanId(f"l{n}"), GrantId("g0"), g, draw(GUESTS), draw(AMOUNTS), draw(at)
            )
            for n, g in enumerate(held)
        },
        residues=tuple(
            Residue(g, "memory", draw(st.integers(0, 1 << 40)), 0.0) for g in held[:1]
        ),
    )  # fmt: skip


@st.composite
def pictures(draw):
    numbers = draw(st.sets(st.integers(0, 99), max_size=2).map(sorted))
    parts = draw(st.integers(1, 256))
    part = draw(st.sampled_from([0, 0, parts - 1]))
    return m.HostPicture(
        draw(NAMES), part, parts, draw(hosts()) if part == 0 else None,
        tuple(draw(guests(number)) for number in numbers), draw(books(numbers)),
    )  # fmt: skip


@st.composite
def wants(draw):
    mode = draw(st.sampled_from(Mode))
    return Want(mode, draw(st.integers(0 if mode is Mode.TO else -(1 << 40), 1 << 40)))


TAKES = st.dictionaries(GUESTS, AMOUNTS, max_size=3).map(
    lambda found: tuple(Take(guest, amounts) for guest, amounts in found.items())
)
HOST_MESSAGES = {
    m.HostPicture: pictures(),
    m.HostRequest: st.builds(
        m.HostRequest, NAMES, NAMES, GUESTS, st.none() | wants(), st.none() | wants(),
        st.none() | st.sampled_from(Tier), st.booleans(),
        st.dictionaries(GUESTS, AMOUNTS, max_size=2),
    ),
    m.HostDecision: st.builds(m.HostDecision, NAMES, NAMES, SIGNED, TAKES),
    m.HostRefusal: st.builds(
        m.HostRefusal, NAMES, NAMES, st.sampled_from(Reason).map(str), NAMES,
        st.dictionaries(st.sampled_from(["cpu", "memory"]), st.integers(0, 1 << 40)),
        st.lists(NAMES, max_size=2).map(tuple),
    ),
    m.HostOutcome: st.builds(m.HostOutcome, NAMES, st.sampled_from(Course), NAMES),
}  # fmt: skip
