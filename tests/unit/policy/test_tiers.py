"""Memory by tier: who may have it, which node it comes from, what strands it, in figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from device_world import NET, inventory_of, nic
from host_data import BLOCK, BOOT_MEMORY
from tier_lives import FUNCTION
from tier_world import DB, ask, host, moves, plan_of, refused, tiered

from virtfabric.model.amounts import CXL_KEY, MEMORY_KEY, Amounts, Key, Tier, tier_of
from virtfabric.model.decision import Decision
from virtfabric.model.errors import Reason
from virtfabric.model.guest import (
    FixedMemory,
    MemoryMechanism,
    MemoryRoom,
    NumaMode,
    VirtioMem,
)
from virtfabric.model.ids import RequestId
from virtfabric.model.memorysteps import AttachMemory
from virtfabric.model.plan import Plan, ResizeVirtioMem, parse_step
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.placement import plan_convergence
from virtfabric.policy.standing import capacity_of, charge_of, free, line_of

# -- keys -------------------------------------------------------------------------------------


def test_key_of_a_tier() -> None:
    assert str(CXL_KEY) == "memory@tier:cxl"
    assert Key.parse("memory@tier:cxl") == CXL_KEY
    assert [tier_of(k) for k in (MEMORY_KEY, CXL_KEY, Key.parse("memory@node:1"))] == [
        Tier.DRAM, Tier.CXL, None,
    ]  # fmt: skip
    amounts = Amounts({MEMORY_KEY: GIB, CXL_KEY: 2 * GIB})
    assert str(amounts) == "memory 1GiB, CXL memory 2GiB"
    assert Amounts.from_json(amounts.to_json()) == amounts
    assert (amounts.memory, amounts.all_memory) == (GIB, 3 * GIB)


def test_capacity_is_by_tier_and_the_reserve_is_of_dram() -> None:
    snapshot = host(tiered(far=512))
    total, left = capacity_of(snapshot), free(snapshot)
    assert (total[MEMORY_KEY], total[CXL_KEY]) == (16 * GIB - 64 * MIB, 3 * GIB)
    assert (left[MEMORY_KEY], left[CXL_KEY]) == (
        total[MEMORY_KEY] - BOOT_MEMORY,
        3 * GIB - GIB // 2,
    )


def test_unmanaged_guest_counts_with_all_that_its_devices_can_hold() -> None:
    snapshot = host()
    guest = replace(tiered(far=0), policy=None)
    cost = charge_of(guest, None, snapshot)
    assert (cost[MEMORY_KEY], cost[CXL_KEY]) == (BOOT_MEMORY + 512 * MIB, GIB)


def test_cells_and_dimms_on_cxl_nodes_count_for_the_tier_and_cannot_be_given() -> None:
    cells = (
        FixedMemory("cell 0", Bytes(96 * MIB)), FixedMemory("cell 1", Bytes(32 * MIB), CpuSet([2])),
    )  # fmt: skip
    guest = tiered(fixed_memory=cells)
    line = line_of(guest, CXL_KEY, host(guest))
    assert (line.floor, line.origin) == (32 * MIB, 32 * MIB)
    assert line_of(guest, MEMORY_KEY, host(guest)).floor == 96 * MIB + 32 * MIB


def test_memory_of_a_nodeset_of_both_tiers_is_dram() -> None:
    guest = tiered(numa_nodes=CpuSet([0, 2]))
    assert charge_of(guest, None, host(guest))[CXL_KEY] == 0


def test_limit_is_of_both_tiers_together() -> None:
    guest = tiered(far=256, limit=Bytes(BOOT_MEMORY + 300 * MIB))
    snapshot = host(guest)
    assert line_of(guest, CXL_KEY, snapshot).ceiling == 300 * MIB
    assert line_of(guest, MEMORY_KEY, snapshot).ceiling == BOOT_MEMORY + 44 * MIB
    answer = refused(snapshot, ask(guest, 64))
    assert answer.reason is Reason.ABOVE_LIMIT
    assert answer.would_fit == {"memory@tier:cxl": 44 * MIB}


# -- placement --------------------------------------------------------------------------------


def test_device_on_a_node_is_resized() -> None:
    guest = tiered(far=256)
    plan = plan_of(host(guest), ask(guest, 128))
    assert moves(plan) == [("far2", 256, 384)]
    assert [s.tier for s in plan.steps if isinstance(s, ResizeVirtioMem)] == ["cxl"]
    assert plan.node_needs.to_json() == {"memory@node:2": 128 * MIB}
    assert "virtio-mem far2 (CXL) 256MiB -> 384MiB" in str(plan.steps[0])


def test_where_there_is_none_one_is_attached_on_the_nearest_node() -> None:
    guest = tiered(numa_nodes=CpuSet([1]))
    plan = plan_of(host(guest), ask(guest, 512))
    step = plan.steps[0]
    assert isinstance(step, AttachMemory)
    assert (step.node, step.cell, step.size, step.after) == (3, 0, 2 * GIB, 512 * MIB)
    assert parse_step(step.to_json()) == step
    assert [o.why for o in plan.offers] == [
        "CXL node 3: 2GiB free, 7 from its CPUs; a device is attached",
        "CXL node 2: 1GiB free, 17 from its CPUs; a device is attached",
    ]
    assert [o.chosen for o in plan.offers] == [True, False]


def test_of_nodes_equally_far_the_one_with_more_free() -> None:
    guest = tiered(numa_nodes=CpuSet())
    plan = plan_of(host(guest), ask(guest, 512))
    assert [s.node for s in plan.steps if isinstance(s, AttachMemory)] == [3]


def test_node_that_has_it_all_goes_before_a_nearer_one() -> None:
    guest = tiered()
    plan = plan_of(host(guest), ask(guest, 1536))
    assert [s.node for s in plan.steps if isinstance(s, AttachMemory)] == [3]


def test_two_nodes_where_no_one_has_it_all() -> None:
    guest = tiered()
    plan = plan_of(host(guest), ask(guest, 2560))
    assert moves(plan) == [("ua-virtfabric-cxl3", 0, 2048), ("ua-virtfabric-cxl2", 0, 512)]
    sizes = [s.size for s in plan.steps if isinstance(s, AttachMemory)]
    assert sum(sizes) <= guest.memory_room.size


def test_farthest_memory_is_given_first() -> None:
    guest = tiered(far=256)
    more = VirtioMem(
        "far3", 0, Bytes(GIB), Bytes(BLOCK), Bytes(256 * MIB), Bytes(256 * MIB), CpuSet([3])
    )
    guest = replace(guest, virtio_mem=(*guest.virtio_mem, more))
    assert moves(plan_of(host(guest), ask(guest, -300))) == [("far3", 256, 0), ("far2", 256, 212)]


def test_dram_stays_as_it_is_when_cxl_moves_and_the_other_way_round() -> None:
    guest = tiered(far=256)
    assert moves(plan_of(host(guest), ask(guest, 64, tier=None))) == [("vm0", 0, 64)]
    assert moves(plan_of(host(guest), ask(guest, 64, tier=Tier.DRAM))) == [("vm0", 0, 64)]


def test_node_is_not_granted_twice_while_another_plan_runs() -> None:
    first, second = tiered(1), tiered(2)
    snapshot = host(first, second, cxl=(1024, 64))
    plan = plan_of(snapshot, ask(first, 1024))
    beside = replace(snapshot, pending=Amounts({CXL_KEY: GIB}) + plan.node_needs)
    assert moves(plan_of(beside, ask(second, 64))) == [("ua-virtfabric-cxl3", 0, 64)]
    answer = refused(beside, ask(second, 128))
    assert answer.reason is Reason.NO_CAPACITY
    assert answer.would_fit == {"memory@tier:cxl": 64 * MIB}


def test_loan_of_cxl_memory_comes_from_a_lower_priority_and_moves_in_first() -> None:
    batch, db = tiered(2, far=512, priority=10), tiered(1, far=0, priority=90)
    plan = plan_of(host(batch, db, cxl=(512, 0)), ask(db, 256))
    assert moves(plan) == [("far2", 512, 256), ("far2", 0, 256)]
    assert not plan.node_needs


def test_convergence_brings_both_tiers_back() -> None:
    guest = tiered(far=256)
    snapshot = host(guest)
    shrunk = replace(guest.virtio_mem[1], requested=Bytes(0), current=Bytes(0))
    found = replace(
        guest, virtio_mem=(guest.virtio_mem[0], shrunk),
        memory_current=Bytes(guest.memory_current - 256 * MIB),
    )  # fmt: skip
    plan = plan_convergence(replace(snapshot, guests={DB: found}), None, RequestId("r"))
    assert isinstance(plan, Plan)
    assert moves(plan) == [("far2", 0, 256)]


# -- refusals ---------------------------------------------------------------------------------

DEVICES = inventory_of(nic(0))


NO_DEVICE = Reason.NO_MECHANISM
MOVABLE = (
    "tier: guest1 is movable (<numatune><memory mode='restrictive'>): its memory is pulled whole "
    "from node to node, and libvirt drops the node of a single memory device; a guest is movable "
    "or tiered, never both: set mode='strict' with virsh edit"
)
PINNED = (
    "guest1 has a PCIe function, which pins all of its memory, and every CXL node here can be "
    "taken back"
)
FORBIDDEN = (
    'tier: the policy of guest1 allows it memory of tiers="dram"; virtfabric policy set guest1 '
    "--tiers dram,cxl"
)
NO_PORT = "no free PCIe root port: virtfabric ports add guest1 --count 1"
DEFLATED = {
    "mechanism": MemoryMechanism.BALLOON, "memory": 256 * MIB, "memory_current": Bytes(128 * MIB),
}  # fmt: skip


@pytest.mark.parametrize(
    ("guest", "reason", "words"),
    [
        ({"tiers": ("dram",)}, Reason.NOT_ALLOWED, FORBIDDEN),
        ({"numa_mode": NumaMode.RESTRICTIVE}, NO_DEVICE, MOVABLE),
        ({"numa_mode": NumaMode.PREFERRED}, NO_DEVICE, "guest1 is not tiered"),
        ({"numa_mode": None}, NO_DEVICE, "it has no <numatune><memory mode='strict'"),
        ({"free_ports": 0}, NO_DEVICE, NO_PORT),
        ({"memory_room": MemoryRoom(0, Bytes(GIB), 0)}, NO_DEVICE, "leaves 0 slots and 1GiB"),
        ({"memory_room": MemoryRoom(1, Bytes(MIB), 0)}, NO_DEVICE, "leaves 1 slots and 1MiB"),
        ({"memory_room": MemoryRoom(1, Bytes(GIB))}, NO_DEVICE, "it has no <numa> cell"),
        (DEFLATED, NO_DEVICE, "its balloon holds memory"),
        ({"functions": (FUNCTION,)}, Reason.STRANDS_MEMORY, PINNED),
    ],
)
def test_refused(guest: dict[str, object], reason: Reason, words: str) -> None:
    functions = guest.get("functions", ())
    fields = {name: value for name, value in guest.items() if name != "functions"}
    state = replace(tiered(**fields), devices=functions)
    answer = refused(host(state), ask(state, 64))
    assert answer.reason is reason
    assert words in answer.detail


@pytest.mark.parametrize("tier", [None, Tier.DRAM])
def test_policy_that_allows_no_dram(tier: Tier | None) -> None:
    guest = tiered(far=0, tiers=("cxl",))
    answer = refused(host(guest), ask(guest, 64, tier=tier))
    assert answer.reason is Reason.NOT_ALLOWED
    assert "ask with --tier cxl" in answer.detail
    assert moves(plan_of(host(guest), ask(guest, 64))) == [("far2", 0, 64)]


def test_tier_that_the_host_lacks() -> None:
    guest = tiered()
    snapshot = host(guest)
    none = replace(snapshot, capacity=replace(snapshot.capacity, cxl={}))
    answer = refused(none, ask(guest, 64))
    assert answer.reason is Reason.UNKNOWN_TIER
    assert answer.detail.startswith("tier: the host has no memory of tier cxl to grant")


@pytest.mark.parametrize("tier", [Tier.CXL, Tier.DRAM])
def test_size_that_is_no_multiple_of_the_block(tier: Tier) -> None:
    guest = tiered(far=256)
    answer = refused(host(guest), ask(guest, 63, tier=tier))
    assert answer.reason is Reason.INVALID_ARGUMENT
    assert answer.detail.startswith("memory: guest1 would hold")
    assert "no multiple of 2MiB" in answer.detail


def test_without_a_tier_a_size_is_rounded_up_as_ever() -> None:
    guest = tiered(far=256)
    assert moves(plan_of(host(guest), ask(guest, 63, tier=None))) == [("vm0", 0, 64)]


def test_function_and_cxl_memory_in_one_request() -> None:
    guest = tiered(far=0)
    request = ask(guest, 64, devices={NET: Want(Mode.BY, 1)})
    answer = refused(host(guest, devices=DEVICES), request)
    assert answer.reason is Reason.STRANDS_MEMORY
    assert "asks for a function as well" in answer.detail


def test_guest_with_memory_on_an_offlinable_node_gets_no_function() -> None:
    guest = tiered(far=64)
    request = Request(
        RequestId("r"), DB, AGENT, Origin.DBUS, devices={NET: Want(Mode.BY, 1)}
    )  # fmt: skip
    answer = refused(host(guest, devices=DEVICES), request)
    assert answer.reason is Reason.STRANDS_MEMORY
    assert "has memory on CXL node 2" in answer.detail
    empty = tiered(far=0)
    assert isinstance(choose_allocation(host(empty, devices=DEVICES), request), Decision)
    stays = host(guest, devices=DEVICES, stays=(2,))
    assert isinstance(choose_allocation(stays, request), Decision)


def test_guest_with_a_function_gets_memory_of_a_node_that_stays_anyway() -> None:
    guest = replace(tiered(), devices=(FUNCTION,))
    plan = plan_of(host(guest, stays=(3,)), ask(guest, 64))
    assert [s.node for s in plan.steps if isinstance(s, AttachMemory)] == [3]


def test_ports_are_counted_once_for_functions_and_memory() -> None:
    guest = tiered(free_ports=1)
    request = ask(guest, 64, devices={NET: Want(Mode.BY, 1)})
    answer = refused(host(guest, devices=DEVICES, stays=(2, 3)), request)
    assert answer.reason is Reason.NO_PLACEMENT
    assert "0B of 64MiB can be placed" in answer.detail


def test_nodes_that_it_cannot_use_are_no_capacity() -> None:
    guest = tiered(far=0, free_ports=0)
    snapshot = host(guest, cxl=(64, 2048))
    answer = refused(snapshot, ask(guest, 128))
    assert answer.reason is Reason.NO_CAPACITY
    assert answer.would_fit == {"memory@tier:cxl": 64 * MIB}
    plan = plan_of(snapshot, ask(guest, 128, partial=True))
    assert moves(plan) == [("far2", 0, 64)]
