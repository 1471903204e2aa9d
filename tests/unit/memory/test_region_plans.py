"""Plans of regions on recorded machines, carried out by the real handlers with tools that act."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from ndctl import FakeNdctl

from virtfabric.adapters.cxl.handlers import cxl_handlers
from virtfabric.adapters.cxl.marks import RegionMarks
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.adapters.simulated.machines import small_host, small_topology
from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import MemoryUse
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import FixedMemory, VirtioMem
from virtfabric.model.host import Capacity
from virtfabric.model.ids import RequestId
from virtfabric.model.ledger import Books, HostSnapshot
from virtfabric.model.memorysteps import DetachMemory
from virtfabric.model.plan import Plan, parse_step
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.policy.regionplans import RegionWish, plan_region, plan_region_end, users_of_node

if TYPE_CHECKING:
    from machine import Machine

    from virtfabric.model.guest import GuestState

REQUEST = RequestId("req-1")


class Context:
    """Nobody waits, nobody cancels."""

    cancelled = threading.Event()

    def progress(self, fraction: float, text: str) -> None:
        """Nobody looks."""


def host(*guests: GuestState) -> HostSnapshot:
    topology = small_topology()
    capacity = Capacity(topology.cpus, topology.cpus, {}, Bytes(0), Bytes(0))
    return HostSnapshot(7, topology, capacity, {g.uuid: g for g in guests}, Books())


def wish(window: str, *serials: int, **options: object) -> RegionWish:
    return RegionWish(window, tuple(map(Serial, serials)), **options)  # type: ignore[arg-type]


def plan_of(machine: Machine, wanted: RegionWish) -> Plan:
    plan = plan_region(machine.memory().read_memory(), wanted, REQUEST, 7)
    assert isinstance(plan, Plan), plan
    return plan


def carry_out(machine: Machine, plan: Plan) -> None:
    """From the journal's encoding, as after a restart."""
    tool = FakeNdctl(machine)
    handlers = HandlerRegistry(
        cxl_handlers(machine.sys, machine.proc, marks=machine.marks, run=tool)
    )
    for step in plan.steps:
        read = parse_step(step.to_json())
        handlers.for_step(read).apply(read, Context())
        handlers.for_step(read).verify(read)


@pytest.mark.parametrize("use", [MemoryUse.MOVABLE, MemoryUse.NORMAL])
@pytest.mark.parametrize(
    ("window", "serials", "granularity"),
    [("0x150000000", (0x100,), None), ("decoder0.1", (0x102, 0x103), 1024),
     ("0x250000000", (0x101, 0x104), None), ("0x250000000", (0x104, 0x101), None)],
)  # fmt: skip
def test_what_is_planned_is_what_the_kernel_shows(
    idle: Machine, window: str, serials: tuple[int, ...], granularity: int | None, use: MemoryUse
) -> None:
    plan = plan_of(idle, wish(window, *serials, granularity=granularity, use=use))
    carry_out(idle, plan)
    (region,) = idle.read().regions
    assert {*region.members} == {*serials}
    assert (region.size, region.ours, region.committed) == (256 * MIB * len(serials), True, True)
    assert [(d.state.value, d.movable) for d in region.dax] == [
        ("online", use is MemoryUse.MOVABLE)
    ]


def test_what_was_made_is_taken_down(idle: Machine) -> None:
    carry_out(idle, plan_of(idle, wish("decoder0.0", 0x100)))
    memory = idle.memory().read_memory()
    end = plan_region_end(host(), memory, memory.cxl.regions[0], REQUEST)
    assert isinstance(end, Plan), end
    carry_out(idle, end)
    assert idle.read().regions == ()
    assert list(idle.marks.iterdir()) == []


def test_empty_devices_leave_before_their_node_does(idle: Machine, guest: GuestState) -> None:
    """Those that the agent attached there; a guest that keeps one does not keep the region."""
    carry_out(idle, plan_of(idle, wish("decoder0.0", 0x100)))
    memory = idle.memory().read_memory()
    (region,) = memory.cxl.regions
    (node,) = region.nodes
    ours = VirtioMem(
        "ua-virtfabric-cxl1", 0, Bytes(GIB), Bytes(2 * MIB), Bytes(0), Bytes(0),
        host_nodes=CpuSet([node]),
    )  # fmt: skip
    theirs = replace(ours, alias="ua-theirs")
    elsewhere = replace(ours, alias="ua-virtfabric-cxl7", host_nodes=CpuSet([node + 6]))
    db = replace(guest, fixed_memory=(), virtio_mem=(theirs, ours, elsewhere))
    end = plan_region_end(host(db), memory, region, REQUEST)
    assert isinstance(end, Plan), end
    detach, offline, destroy = end.steps
    assert isinstance(detach, DetachMemory)
    assert (detach.name, detach.alias, detach.optional) == ("db", ours.alias, True)
    assert [step.kind for step in (offline, destroy)] == ["online-memory", "create-region"]
    unmanaged = plan_region_end(host(replace(db, policy=None)), memory, region, REQUEST)
    assert isinstance(unmanaged, Plan)
    assert len(unmanaged.steps) == 2


def test_regions_by_hand_stay(busy: Machine) -> None:
    memory = busy.memory().read_memory()
    for region in memory.cxl.regions:
        answer = plan_region_end(host(), memory, region, REQUEST)
        assert isinstance(answer, Refusal)
        assert "was made by hand" in answer.detail


def test_normal_memory_stays(mixed: Machine) -> None:
    for region in mixed.read().regions:
        window = next(w for w in mixed.read().windows if w.name == region.window)
        RegionMarks(mixed.marks).put(window.base, region.members)
    memory = mixed.memory().read_memory()
    answers = [plan_region_end(host(), memory, r, REQUEST) for r in memory.cxl.regions]
    refused = [a for a in answers if isinstance(a, Refusal)]
    assert [a.reason for a in refused] == [Reason.NO_MECHANISM]
    assert "ZONE_NORMAL" in refused[0].detail
    steps = sorted(len(a.steps) for a in answers if isinstance(a, Plan))
    assert steps == [1, 2]  # what is offline already needs one


def test_memory_bound_to_several_nodes_counts_in_full(guest: GuestState) -> None:
    assert users_of_node(host(guest), 2) == {"db": 512 * MIB}
    assert users_of_node(host(guest), 0) == {"db": 512 * MIB}
    assert users_of_node(host(guest), 3) == {}


@pytest.fixture
def guest() -> GuestState:
    (found,) = [g for g in small_host().read_guests().values() if g.name == "cache"]
    parts = (FixedMemory("cell 0", Bytes(512 * MIB), CpuSet([0, 2])),)
    return replace(found, name="db", fixed_memory=parts)
