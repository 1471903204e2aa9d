"""Memory in quarantine, memory called home, huge pages and DIMMs: what each makes of the others."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.machines import small_cxl
from virtfabric.model.amounts import Tier
from virtfabric.model.cxl import Condition, PoisonRecord, Serial
from virtfabric.model.errors import RefusedError
from virtfabric.model.hugepages import PoolKey
from virtfabric.model.ids import RequestId
from virtfabric.model.memorysteps import DetachMemory
from virtfabric.model.plan import parse_step
from virtfabric.model.policy import Growth
from virtfabric.model.reclaim import Recall
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import GIB, MIB, Bytes
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.placement import plan_decision

BOTH = ("dram", "cxl")
DB, CACHE = aw.uuid_of(90), aw.uuid_of(70)
POISON = Condition("ok", (PoisonRecord(0, 64, "Injected"),))
PAGE = 2 * MIB
BOOT = 128
"""Pages of 2 MiB that `make_spec`'s boot memory takes."""


@pytest.fixture
def build():
    """Node 1 is of memdev 0x100, node 2 of 0x102, 1 GiB each; both with an empty pool."""
    made = []

    def start(*specs, **options):
        world = aw.AgentWorld(specs=specs, cxl=small_cxl(), memory_mib=4000, **options)
        made.append(world)
        for window, serial in zip(small_cxl().windows[:2], (0x100, 0x102), strict=True):
            world.host.memory.make_region(window.base, (Serial(serial),), GIB, 256)
        for node in (0, 1, 2):
            world.host.pages.set_pool(PoolKey(node, PAGE), 0)
        return world.start()

    yield start
    for world in made:
        world.close()


def tiered(number, name, *, page=0, growth=Growth.VIRTIO_MEM, **options):
    spec = aw.make_spec(number, name, number, tiers=BOTH, memory_mib=(256, 8192), **options)
    memory = replace(spec.policy.memory, growth=growth)
    return replace(spec, page=Bytes(page), policy=replace(spec.policy, memory=memory))


def grow(world, name, mib, **options):
    job = world.allocate(name, memory=f"+{mib}M", tier="cxl", **options)
    assert job["state"] == "done", job
    world.settle()
    return job["result"]["grant"]


def poison(world, name="mem0"):
    world.host.memory.conditions[name] = POISON
    world.agent._memory._due = 0.0
    world.agent._lifecycle.enqueue(world.agent._rounds.look_at_memory)
    aw.eventually(lambda: world.agent.memory(aw.ROOT)["quarantine"], "nobody asked the memdevs")
    world.settle()


def call(world, node, **wants):
    job = world.finish(world.agent.reclaim(aw.ROOT, {"node": str(node)} | wants)["job"])
    assert job["state"] == "done", job
    world.settle()
    return job["result"]


def withheld(world):
    return world.agent.host(aw.ROOT)["withheld"]


def far(world, name):
    """MiB that are requested, by node."""
    devices = world.live(name).virtio_mem
    return {min(d.host_nodes): d.requested // MIB for d in devices if d.host_nodes}


def pool(world, node):
    """(total, free, made by the agent), by what the kernel shows."""
    found = world.host.pages.read_pools().pools[PoolKey(node, PAGE)]
    assert found.pages.free >= 0, "a guest touched a page that was not there"
    return found.pages.total, found.pages.free, sum(found.made.values())


# -- quarantine, and memory called home --------------------------------------------------------


def test_a_node_in_quarantine_is_called_home_and_stays_in_quarantine(build):
    world = build(tiered(90, "db"), tiered(70, "cache"))
    grow(world, "db", 512)
    grow(world, "cache", 256)
    before = far(world, "cache")
    poison(world)
    text = world.agent.memory(aw.ROOT)["quarantine"][0]["remedy"]
    assert text.startswith(
        "take the memory away from them: virtfabric memory reclaim 1 --detach, then virtfabric "
        "memory region destroy region0, then mend"
    ), text
    result = call(world, 1, detach="yes")
    assert (result["freed"] // MIB, result["out"]) == (512 + before.get(1, 0), 0)
    assert (far(world, "db"), far(world, "cache")) == (
        {},
        {n: s for n, s in before.items() if n > 1},
    )
    assert "in quarantine" in withheld(world)["1"]
    assert world.agent.drift(aw.ROOT) == []
    assert world.finish(world.agent.region_destroy(aw.ROOT, "region0")["job"])["state"] == "done"
    with pytest.raises(RefusedError, match="memdev 0x100 is in quarantine"):
        world.agent.region_create(aw.ROOT, {"window": "decoder0.0", "memdevs": "0x100"})


def test_of_two_nodes_the_one_that_is_called_gives_not_the_one_in_quarantine(build):
    world = build(tiered(90, "db"))
    grow(world, "db", 1024 + 512)
    spread = far(world, "db")
    poison(world)
    result = call(world, 2, size="256M")
    assert result["freed"] == 256 * MIB
    assert far(world, "db") == spread | {2: spread[2] - 256}


def test_what_comes_home_to_a_victim_goes_to_neither(build):
    """cache lent of node 2; node 1 is poisoned, node 2 called home from db, who has it now."""
    world = build(tiered(90, "db"), tiered(70, "cache"))
    poison(world)
    grow(world, "cache", 1024)
    grow(world, "db", 768)
    assert (far(world, "db"), far(world, "cache")) == ({2: 768}, {2: 256})
    result = call(world, 2)
    assert (result["freed"] // MIB, result["out"]) == (1024, 0)
    assert far(world, "db") == far(world, "cache") == {2: 0}
    assert world.agent.drift(aw.ROOT) == []
    assert world.agent._ledger.view().books.loans == {}
    # the call is over, the quarantine is not
    assert set(withheld(world)) == {"1"}
    grow(world, "cache", 1024)
    assert far(world, "cache") == {2: 1024}


# -- huge pages, and memory called home --------------------------------------------------------


@pytest.fixture
def paged(build):
    """db runs on huge pages, with 256 MiB of node 1 in pages that were made for it."""
    world = build(tiered(90, "db", page=PAGE, running=False), tiered(70, "cache"))
    assert world.virsh_start("db") == ""
    world.settle()
    grow(world, "db", 256)
    assert pool(world, 1) == (128, 0, 128)
    return world


def test_huge_pages_of_a_node_go_back_with_the_memory_and_the_device_leaves(paged):
    plan = paged.agent.reclaim_plan(aw.ROOT, {"node": "1", "detach": "yes"})
    assert plan["planned"] == 256 * MIB
    result = call(paged, 1, detach="yes")
    assert (result["freed"], result["out"]) == (256 * MIB, 0)
    assert result["detached"] == [{"name": "db", "alias": "ua-virtfabric-cxl1"}]
    assert (far(paged, "db"), pool(paged, 1)) == ({}, (0, 0, 0))
    assert pool(paged, 0) == (BOOT, 0, BOOT)
    assert paged.finish(paged.agent.region_destroy(aw.ROOT, "region0")["job"])["state"] == "done"


def test_a_guest_that_keeps_some_keeps_its_pages_and_no_more(paged):
    paged.host.faults.gives[DB] = 100 * MIB
    result = call(paged, 1)
    assert (result["freed"] // MIB, result["out"] // MIB) == (100, 156)
    assert pool(paged, 1) == (78, 0, 78)
    paged.host.faults.clear()
    paged.host.stop_guest(DB)
    paged.settle()
    assert pool(paged, 1) == pool(paged, 0) == (0, 0, 0)


def test_a_lease_that_takes_a_part_gives_back_the_pages_of_that_part(build):
    world = build(tiered(90, "db", page=PAGE, running=False))
    assert world.virsh_start("db") == ""
    world.settle()
    grant = grow(world, "db", 256, **{"for": "1h"})
    world.host.faults.gives[DB] = 64 * MIB
    world.clock.leap(3700)
    world.agent._rounds.look_over()
    aw.eventually(lambda: far(world, "db") == {1: 192}, "the lease takes what comes")
    world.settle()
    assert pool(world, 1) == (96, 0, 96)
    assert world.agent.grants(aw.ROOT)[0]["id"] == grant


def test_a_device_on_huge_pages_that_must_come_back_is_on_huge_pages_again(paged):
    found = replace(paged.agent._observatory.snapshot(), recall=Recall(frozenset({1}), detach=True))
    want = Want(Mode.BY, -256 * MIB)
    request = Request(RequestId("r"), DB, AGENT, Origin.AGENT, memory=want, tier=Tier.CXL)
    plan = plan_decision(found, choose_allocation(found, request))
    (step,) = (s for s in plan.steps if isinstance(s, DetachMemory))
    assert (step.page, parse_step(step.to_json())) == (PAGE, step)


# -- DIMMs: they stay, whatever is asked ---------------------------------------------------------


@pytest.fixture
def plugged(build):
    world = build(tiered(90, "db", growth=Growth.DIMM), tiered(70, "cache"))
    grow(world, "db", 256)
    return world


def on_dimm(world):
    return [(int(p.size) // MIB, *p.host_nodes) for p in world.live("db").fixed_memory[1:]]


def test_a_dimm_on_a_node_that_is_called_home_stays_and_says_why(plugged):
    grow(plugged, "cache", 1024 + 512)
    result = call(plugged, 1)
    assert result["others"] == [
        "db: 256MiB stay (dimm ua-virtfabric-cxl1-dimm0): the guest may have pages on the DIMM "
        "that cannot move"
    ]
    assert (result["out"], on_dimm(plugged)) == (256 * MIB, [(256, 1)])
    assert far(plugged, "cache")[1] == 0


def test_the_way_out_of_poison_under_a_dimm_is_the_end_of_its_guest(plugged):
    grow(plugged, "cache", 1024 + 512)
    poison(plugged)
    text = plugged.agent.memory(aw.ROOT)["quarantine"][0]["remedy"]
    assert text.startswith(
        "take the memory away from them: virtfabric memory reclaim 1 --detach, shut down db, then "
    ), text
    # what it has counts, of the node that is good nothing is missing, and nothing is free
    assert plugged.agent.host(aw.ROOT)["free"]["cxl"] == 0
    assert plugged.agent.drift(aw.ROOT) == []
    refused = plugged.allocate("db", memory="+128M", tier="cxl")
    assert refused["state"] == "refused"
    plugged.host.stop_guest(DB)
    plugged.settle()
    assert plugged.agent.host(aw.ROOT)["free"]["cxl"] == 0


def test_a_dimm_whose_lease_is_over_is_asked_for_once(build):
    world = build(tiered(90, "db", growth=Growth.DIMM))
    grow(world, "db", 256, **{"for": "1h"})
    world.clock.leap(3700)
    world.agent._rounds.look_over()
    aw.eventually(lambda: not world.agent.grants(aw.ROOT), "the lease is over")
    world.settle()
    assert on_dimm(world) == [(256, 1)]
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 2 * GIB - 256 * MIB


# -- huge pages, and quarantine ------------------------------------------------------------------


def test_no_pages_are_made_on_a_node_in_quarantine(paged):
    poison(paged)
    job = paged.allocate("db", memory="+128M", tier="cxl")
    assert job["state"] == "done", job
    assert far(paged, "db") == {1: 256, 2: 128}
    assert (pool(paged, 1), pool(paged, 2)) == ((128, 0, 128), (64, 0, 64))
    paged.host.stop_guest(DB)
    paged.settle()
    assert pool(paged, 1) == pool(paged, 2) == (0, 0, 0)
