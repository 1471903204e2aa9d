"""Guests and hosts with memory by tier, and what is asked of them, in figures."""

from __future__ import annotations

from dataclasses import replace

from host_data import BLOCK, guest_id, make_guest, snapshot_of
from tier_lives import four_nodes

from virtfabric.model.amounts import CXL_KEY, MEMORY_KEY, Amounts, Key, Tier
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import (
    GuestState,
    MemoryRoom,
    NumaMode,
    VirtioMem,
)
from virtfabric.model.ids import RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.memorysteps import AttachMemory
from virtfabric.model.plan import Plan, ResizeVirtioMem
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.placement import plan_decision

DB, BATCH = guest_id(1), guest_id(2)


def tiered(number: int = 1, *, far: int | None = None, on: int = 2, **fields: object) -> GuestState:
    """A strict guest on node 0 with two ports and two slots; `far` MiB on a device of node `on`."""
    tiers = fields.pop("tiers", ("dram", "cxl"))
    limit = fields.pop("limit", None)
    options = {
        "numa_mode": NumaMode.STRICT, "numa_nodes": CpuSet([0]), "free_ports": 2,
        "memory_room": MemoryRoom(2, Bytes(4 * GIB), 0),
    } | fields  # fmt: skip
    guest = make_guest(number, **options)
    if far is not None:
        size = Bytes(far * MIB)
        device = VirtioMem(f"far{on}", 0, Bytes(GIB), Bytes(BLOCK), size, size, CpuSet([on]))
        guest = replace(
            guest, virtio_mem=(*guest.virtio_mem, device),
            memory_max=Bytes(guest.memory_max + GIB),
            memory_current=Bytes(guest.memory_current + size),
        )  # fmt: skip
    memory = replace(guest.policy.memory, tiers=tiers, limit=limit)
    return replace(guest, policy=replace(guest.policy, memory=memory))


def host(
    *guests: GuestState, cxl: tuple[int, int] = (1024, 2048), stays: tuple[int, ...] = (),
    **fields: object,
) -> HostSnapshot:  # fmt: skip
    """MiB that nodes 2 and 3 may grant; nodes of `stays` are not offlinable."""
    topology = four_nodes(offlinable=frozenset({2, 3} - set(stays)))
    snapshot = snapshot_of(topology, guests, overhead=0)
    holdings = {}
    for guest in guests:
        far = sum(d.requested for d in guest.virtio_mem if d.host_nodes)
        held = {Key.parse("cpu"): 500, MEMORY_KEY: guest.memory_current - far, CXL_KEY: far}
        holdings[guest.uuid] = Holding(guest.uuid, Amounts(held))
    capacity = replace(
        snapshot.capacity, memory={0: Bytes(8 * GIB), 1: Bytes(8 * GIB)},
        cxl={2: Bytes(cxl[0] * MIB), 3: Bytes(cxl[1] * MIB)},
    )  # fmt: skip
    return replace(snapshot, capacity=capacity, books=Books(7, holdings), **fields)


def ask(
    guest: GuestState, mib: int, *, tier: Tier | None = Tier.CXL, mode: Mode = Mode.BY, **fields
) -> Request:
    return Request(
        RequestId("req-1"), guest.uuid, AGENT, Origin.DBUS,
        memory=Want(mode, mib * MIB), tier=tier, **fields,
    )  # fmt: skip


def plan_of(snapshot: HostSnapshot, request: Request) -> Plan:
    decision = choose_allocation(snapshot, request)
    assert isinstance(decision, Decision), decision
    plan = plan_decision(snapshot, decision)
    assert isinstance(plan, Plan), plan
    return plan


def moves(plan: Plan) -> list[tuple[str, int, int]]:
    steps = [s for s in plan.steps if isinstance(s, ResizeVirtioMem | AttachMemory)]
    return [(s.alias, s.before // MIB, s.after // MIB) for s in steps]


def refused(snapshot: HostSnapshot, request: Request) -> Refusal:
    answer = choose_allocation(snapshot, request)
    if isinstance(answer, Decision):
        answer = plan_decision(snapshot, answer)
    assert isinstance(answer, Refusal), answer
    return answer
