"""Huge pages in the life of an agent: made before a guest starts or grows, given back, told of."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.errors import HypervisorError
from virtfabric.model.hugepages import MakeHugePages, PoolKey
from virtfabric.model.units import GIB, MIB, Bytes

SMALL = PoolKey(0, 2 * MIB)
LARGE = PoolKey(0, GIB)
BOOT = 128
"""Pages of 2 MiB that `make_spec`'s boot memory takes."""
ADMIN = 20
"""Pages that the administrator's own pool has."""


def huge(number, name, priority, *, page=2 * MIB, running=False, **options):
    return replace(
        aw.make_spec(number, name, priority, running=running, **options), page=Bytes(page)
    )


@pytest.fixture
def build():
    made = []

    def start(*specs, large=False, **options):
        world = aw.AgentWorld(specs=specs, **options)
        made.append(world)
        world.host.pages.set_pool(SMALL, ADMIN)
        if large:
            world.host.pages.set_pool(LARGE, 0)
        return world.start()

    yield start
    for world in made:
        world.close()


@pytest.fixture
def world(build):
    return build(huge(90, "db", 90), huge(50, "web", 50), aw.make_spec(10, "plain", 10))


def pool(world, key=SMALL):
    """(total, free, made by the agent), by what the kernel shows."""
    found = world.host.pages.read_pools().pools[key]
    assert found.pages.free >= 0, "a guest touched a page that was not there"
    return found.pages.total, found.pages.free, sum(found.made.values())


def stop(world, name):
    world.host.stop_guest(world.spec(name).uuid)
    world.settle()


def test_pages_come_before_a_start_and_go_after_the_end(world):
    assert world.virsh_start("db") == ""
    world.settle()
    # the administrator's pool is used first
    assert pool(world) == (BOOT, 0, BOOT - ADMIN)
    stop(world, "db")
    assert pool(world) == (ADMIN, ADMIN, 0)
    told = " ".join(map(str, world.agent.explain(aw.ROOT, "db")["lines"]))
    assert "huge pages of 2MiB on node 0 made for it 0 -> 108" in told


def test_a_guest_on_small_pages_takes_none(world):
    assert pool(world) == (ADMIN, ADMIN, 0)


def test_growth_and_shrinking(world):
    world.virsh_start("db")
    world.settle()
    job = world.allocate("db", memory="+256M")
    assert job["state"] == "done", job
    assert pool(world) == (BOOT + 128, 0, BOOT - ADMIN + 128)
    assert any("huge pages" in step for step in job["result"]["steps"])
    job = world.allocate("db", memory="-128M")
    assert job["state"] == "done", job
    assert pool(world) == (BOOT + 64, 0, BOOT - ADMIN + 64)
    stop(world, "db")
    assert pool(world) == (ADMIN, ADMIN, 0)


def test_a_grant_that_ends_gives_its_pages_back(world):
    world.virsh_start("db")
    world.settle()
    before = pool(world)
    grant = world.allocate("db", memory="+64M")["result"]["grant"]
    assert world.finish(world.agent.release(aw.ROOT, grant)["job"])["state"] == "done"
    assert pool(world) == before


def test_what_one_counts_on_another_is_not_given(world):
    """Both are admitted before either runs: the first one's pages are free until then."""
    hook = world.agent.hook_prepare
    for name in ("db", "web"):
        assert hook(aw.ROOT, aw.format_prepare(world.spec(name)), wait_s=aw.DEADLINE_S) == ""
    assert pool(world) == (2 * BOOT, 2 * BOOT, 2 * BOOT - ADMIN)
    for name in ("db", "web"):
        world.host.start_guest(world.spec(name).uuid)
    world.settle()
    assert pool(world) == (2 * BOOT, 0, 2 * BOOT - ADMIN)
    stop(world, "db")
    stop(world, "web")
    assert pool(world) == (ADMIN, ADMIN, 0)


def test_a_start_that_cannot_have_its_pages_is_refused_and_leaves_nothing(world):
    world.host.pages.scattered[SMALL] = 50
    line = world.virsh_start("db")
    assert "50 of 108 more huge pages of 2MiB on node 0 could be made" in line
    assert pool(world) == (ADMIN, ADMIN, 0)
    assert world.spec("db").uuid not in world.agent._ledger.view().books.holdings
    world.host.pages.scattered.clear()
    assert world.virsh_start("db") == ""


def test_growth_that_cannot_have_its_pages_is_refused_and_leaves_nothing(world):
    world.virsh_start("db")
    world.settle()
    world.host.pages.scattered[SMALL] = 10
    before, live = pool(world), world.frozen()
    job = world.allocate("db", memory="+256M")
    assert (job["state"], job["error"]["reason"]) == ("refused", "no-huge-pages")
    assert pool(world) == before
    assert world.frozen() == live


def test_a_size_that_the_host_has_not(build):
    world = build(huge(90, "db", 90, page=GIB))
    line = world.virsh_start("db")
    assert "needs 1 huge pages of 1GiB, which this host does not offer (it offers 2MiB)" in line


def test_more_than_the_node_can_ever_have_is_refused_before_anything_is_done(build):
    spec = replace(huge(90, "db", 90, page=GIB), boot_memory=Bytes(16 * GIB))
    world = build(spec, large=True, memory_mib=64 * 1024)
    line = world.virsh_start("db")
    assert "needs 16 huge pages of 1GiB, 7 are to be had (node 0: 0 in the pool, 0 free" in line
    assert pool(world, LARGE) == (0, 0, 0)
    assert not any("plan.begun" in r["kind"] for r in world.agent.audit(aw.ROOT, 0.0, "db"))


def test_a_start_that_fails_after_the_hook(world):
    spec = world.spec("db")
    world.agent.hook_prepare(aw.ROOT, aw.format_prepare(spec), wait_s=aw.DEADLINE_S)
    assert pool(world)[2] == BOOT - ADMIN
    world.agent.hook_notify(aw.ROOT, "db", "release", aw.format_prepare(spec))
    world.settle()
    assert pool(world) == (ADMIN, ADMIN, 0)


def test_pages_that_others_use_go_back_when_they_are_free(world):
    world.virsh_start("db")
    world.settle()
    spec = world.spec("db")
    with world.host.lock:  # somebody else takes what it had before the agent comes to it
        world.host.stop_guest(spec.uuid)
        world.host.pages.use(SMALL, 100)
    world.settle()
    assert pool(world) == (100, 0, 80)
    (alert,) = [a for a in world.agent.health(aw.ROOT)["alerts"] if "huge pages" in str(a)]
    assert "80 huge pages of 2MiB on node 0, made for db" in str(alert)
    world.host.pages.use(SMALL, 0)
    world.agent._rounds.look_over()
    assert pool(world) == (ADMIN, ADMIN, 0)
    assert not [a for a in world.agent.health(aw.ROOT)["alerts"] if "huge pages" in str(a)]


def test_a_pool_that_somebody_sets_is_never_touched(world):
    world.virsh_start("db")
    world.settle()
    world.host.pages.set_pool(SMALL, 500)
    stop(world, "db")
    assert pool(world) == (500, 500, 0)


def test_a_guest_that_becomes_unmanaged_keeps_its_pages_until_it_ends(world):
    world.virsh_start("db")
    world.settle()
    job = world.finish(world.agent.policy_clear(aw.ROOT, "db")["job"])
    assert job["state"] == "done", job
    world.agent._rounds.look_over()
    assert pool(world) == (BOOT, 0, BOOT - ADMIN)
    stop(world, "db")
    world.agent._rounds.look_over()
    assert pool(world) == (ADMIN, ADMIN, 0)


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])
def test_a_kill_while_pages_are_made_leaves_none(world, phase):
    world.virsh_start("db")
    world.settle()
    before = pool(world)
    world.host.faults.add(Fault(Effect.CRASH, phase, kind=MakeHugePages.kind))
    world.agent.allocate(aw.ROOT, "db", {"memory": "+64M"})
    aw.eventually(lambda: world._process._killed, "the agent dies")
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert pool(world) == before


def test_a_kill_before_pages_go_back(world):
    world.virsh_start("db")
    world.settle()
    world.kill_agent()
    world.host.stop_guest(world.spec("db").uuid)
    world.restart_agent()
    world.settle()
    assert pool(world) == (ADMIN, ADMIN, 0)


def test_memory_on_huge_pages_is_not_lent(build):
    """`batch` could give, but what it gives goes to the pool."""
    world = build(
        huge(10, "batch", 10, initial_mib=512), aw.make_spec(90, "db", 90), memory_mib=1200
    )
    assert world.virsh_start("batch") == ""
    world.settle()
    job = world.allocate("db", memory="+512M")
    assert (job["state"], job["error"]["reason"]) == ("refused", "no-capacity"), job
    parts = {p["what"]: p for p in world.guest("batch")["memory"]["parts"]}
    device = parts["virtio-mem ua-mem0"]
    assert not device["reclaimable"]
    assert "good for their pool only" in device["why_not_reclaimable"]


def test_memory_view_says_what_is_ours(world):
    world.virsh_start("db")
    world.settle()
    (node,) = world.agent.memory(aw.ROOT)["nodes"]
    assert node["huge_pages"] == [
        {"size": 2 * MIB, "total": BOOT, "free": 0, "reserved": 0, "made": {"db": BOOT - ADMIN}}
    ]


def test_without_pages_qemu_would_not_start(world):
    """What all of this is for: the simulated QEMU is as strict as the real one."""
    with pytest.raises(HypervisorError, match="Insufficient free host memory pages"):
        world.host.start_guest(world.spec("db").uuid)
