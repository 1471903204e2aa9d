"""Memory that fails while guests have it: told, kept from everybody, let out by command only."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.machines import small_cxl
from virtfabric.model.cxl import Condition, PoisonRecord, Serial
from virtfabric.model.errors import Reason, RefusedError
from virtfabric.model.units import GIB, MIB

BOTH = ("dram", "cxl")
POISON = Condition("ok", (PoisonRecord(0, 64, "Injected"),))
FIRST, SECOND = Serial(0x100), Serial(0x102)
LOWER, UPPER = (window.base for window in small_cxl().windows[:2])


@pytest.fixture
def world():
    """Node 1 is of memdev 0x100, node 2 of 0x102; db has 512 MiB of the first."""
    made = aw.AgentWorld(
        specs=(
            aw.make_spec(90, "db", 90, tiers=BOTH, memory_mib=(256, 8192)),
            aw.make_spec(70, "cache", 70, tiers=BOTH, memory_mib=(256, 8192)),
            aw.make_spec(50, "plain", 50),
        ),
        cxl=small_cxl(),
        memory_mib=4000,
    )
    made.host.memory.make_region(LOWER, (FIRST,), GIB, 256)
    made.host.memory.make_region(UPPER, (SECOND,), GIB, 256)
    made.start()
    job = made.allocate("db", memory="+512M", tier="cxl")
    assert job["state"] == "done", job
    made.settle()
    yield made
    made.close()


def look(world):
    """As the periodic round does."""
    world.agent._lifecycle.enqueue(world.agent._rounds.look_at_memory)
    world.settle()


def poison(world, name="mem0", condition=POISON):
    """A memdev tells so when it is asked again; nothing else announces it."""
    world.host.memory.conditions[name] = condition
    world.agent._memory._due = 0.0
    look(world)
    desk = world.agent._memory
    aw.eventually(lambda: desk._conditions.get(name) == condition, "nobody asked the memdevs")
    if condition.poison:
        aw.eventually(lambda: quarantined(world), "nobody judged what they told")
    world.settle()


def quarantined(world):
    return {q["subject"]: q for q in world.agent.memory(aw.ROOT)["quarantine"]}


def alert(world, words):
    (text,) = [a for a in world.agent.status(aw.ROOT)["alerts"] if words in a]
    return text


def withheld(world):
    return set(world.agent.host(aw.ROOT)["withheld"])


def release(world, subject):
    return world.finish(world.agent.memory_release(aw.ROOT, subject)["job"])


def held(world, name):
    return world.guest(name)["memory"]["cxl"]["grant"]


def test_poison_is_told_with_region_serial_guests_and_the_way_out(world):
    poison(world)
    text = alert(world, "0x100 is poisoned")
    assert text == (
        "memdev 0x100 is poisoned: 64B at 0x0 (injected); it is part of the CXL region of 0x100 in "
        "window 0x1000000000, node 1; guests with memory there: db 512MiB; done: nothing more of "
        "node 1 is granted, no region is made of 0x100; they were not moved; to do: take the "
        "memory away from them: virtfabric memory reclaim 1 --detach, then virtfabric memory "
        "region destroy region0, then mend or replace the memdev, then when it is sane: virtfabric "
        "memory release 0x100"
    )
    assert quarantined(world)["0x100"]["nodes"] == [1]
    lines = "\n".join(world.agent.explain(aw.ROOT, aw.uuid_of(90))["lines"])
    assert "0x100 went to quarantine: memdev 0x100 is poisoned" in lines


def test_nothing_more_of_the_node_is_granted_and_all_of_the_other(world):
    poison(world)
    assert withheld(world) == {"1"}
    assert held(world, "db") == 512 * MIB  # what it has is not taken from it
    job = world.allocate("cache", memory="+1G", tier="cxl")
    assert job["state"] == "done", job
    assert [str(d.host_nodes) for d in world.live("cache").virtio_mem if d.host_nodes] == ["2"]
    # db has the higher priority: more of node 2 for it, from cache; nothing of node 1
    job = world.allocate("db", memory="+64M", tier="cxl")
    assert job["state"] == "done", job
    requested = {str(d.host_nodes): d.requested for d in world.live("db").virtio_mem}
    assert requested == {"": 0, "1": 512 * MIB, "2": 64 * MIB}
    assert world.agent.drift(aw.ROOT) == []
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 0


def test_what_goes_back_is_of_the_poisoned_node_first(world):
    assert world.allocate("cache", memory="+512M", tier="cxl")["state"] == "done"
    job = world.allocate("db", memory="+512M", tier="cxl")
    assert job["state"] == "done", job
    spread = {str(d.host_nodes): d.requested // MIB for d in world.live("db").virtio_mem}
    poison(world)
    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] == "done", released
    world.settle()
    left = {str(d.host_nodes): d.requested // MIB for d in world.live("db").virtio_mem}
    assert left == spread | {"1": spread["1"] - 512}


def test_what_comes_home_waits_rather_than_go_to_it(world):
    """cache lent of node 2, which db has now; the only free memory is poisoned."""
    world.allocate("cache", memory="+1G", tier="cxl")
    job = world.allocate("db", memory="+768M", tier="cxl")
    poison(world)
    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] == "done", released
    assert held(world, "cache") == GIB
    requested = {str(d.host_nodes): d.requested // MIB for d in world.live("cache").virtio_mem}
    assert requested == {"": 0, "2": 768}
    (found,) = world.agent.drift(aw.ROOT)
    assert (found["what"], found["found"]) == ("CXL memory", "768MiB")


def test_the_way_out_of_poison(world):
    (grant,) = world.agent.grants(aw.ROOT)
    poison(world)
    with pytest.raises(RefusedError, match="guests use it: db has 512MiB"):
        world.agent.region_destroy(aw.ROOT, "region0")
    released = world.finish(world.agent.release(aw.ROOT, grant["id"])["job"])
    assert released["state"] == "done", released
    gone = world.finish(world.agent.region_destroy(aw.ROOT, "region0")["job"])
    assert gone["state"] == "done", gone
    wants = {"window": "decoder0.0", "memdevs": "0x100"}
    with pytest.raises(RefusedError, match="memdev 0x100 is in quarantine") as caught:
        world.agent.region_create(aw.ROOT, wants)
    assert caught.value.refusal.reason is Reason.DEVICE_IN_USE
    no = release(world, "0x100")
    assert no["state"] == "refused"
    assert "lists poison still (64B at 0x0 (injected))" in no["error"]["detail"]
    assert "echo 0x0 > /sys/kernel/debug/cxl/mem0/clear_poison" in no["error"]["detail"]
    poison(world, condition=Condition("ok"))
    assert list(quarantined(world)) == ["0x100"]  # nobody has said that it is sane
    assert release(world, "0x100")["state"] == "done"
    assert quarantined(world) == {}
    aw.eventually(lambda: not world.agent.status(aw.ROOT)["alerts"], "an alert stays")
    made = world.finish(world.agent.region_create(aw.ROOT, wants)["job"])
    assert made["state"] == "done", made
    assert withheld(world) == set()


def test_quarantine_outlives_the_agent(world):
    poison(world)
    before = quarantined(world)
    world.kill_agent()
    world.host.memory.conditions.clear()
    world.restart_agent()
    world.settle()
    assert (quarantined(world), withheld(world)) == (before, {"1"})
    assert "db 512MiB" in alert(world, "0x100 is poisoned")
    assert [r.kind for r in world.audit.read(subject="0x100")] == ["memory.quarantined"]


def test_a_memdev_without_a_region(world):
    poison(world, "mem3")
    text = alert(world, "memdev 0x103 is poisoned")
    assert "guests with memory there: none; done: no region is made of 0x103" in text
    assert withheld(world) == set()


def test_a_memdev_that_is_pulled_while_in_use(world):
    world.host.memory.pull(FIRST)
    world.settle()
    text = alert(world, "0x100 was taken out while it was in use")
    assert "node 1; guests with memory there: db 512MiB" in text
    assert "virtfabric memory reclaim 1 --detach" in text
    assert "reboot the host" in text
    # it shows as a node like any other now, and must not pass for DRAM
    memory = {m["node"]: m for m in world.agent.host(aw.ROOT)["memory"]}
    assert (memory[1]["tier"], memory[1]["grantable"], memory[1]["offlinable"]) == ("cxl", 0, False)
    assert held(world, "db") == 512 * MIB
    assert world.agent.drift(aw.ROOT) == []
    job = world.allocate("cache", memory="+1G", tier="cxl")
    assert job["state"] == "done", job
    no = release(world, "0x100")
    assert no["state"] == "refused"
    assert "only a reboot of the host takes it away" in no["error"]["detail"]


def test_a_pulled_memdev_after_a_restart_of_the_agent_and_of_the_host(world):
    world.host.memory.pull(FIRST)
    world.settle()
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert (set(quarantined(world)), withheld(world)) == ({"0x100"}, {"1"})
    world.host.stop_guest(aw.uuid_of(90))
    world.host.memory.reboot()
    world.settle()
    assert release(world, "0x100")["state"] == "done"
    assert (quarantined(world), withheld(world)) == ({}, set())


def test_a_region_that_is_taken_apart_piece_by_piece(world):
    """Looks come in between: the position is empty first, then the memdev is gone."""
    (region,) = [r for r in world.host.memory.cxl.regions if FIRST in r.members]
    world.host.memory.put_region(replace(region, members=(None,), committed=False))
    world.settle()
    assert quarantined(world) == {}
    world.host.memory.put_region(replace(region, members=(None,), committed=False, dax=()))
    world.settle()
    world.host.memory.remove(FIRST)
    world.settle()
    assert quarantined(world)["0x100"]["fault"] == "removed"
    assert quarantined(world)["0x100"]["nodes"] == [1]
    assert release(world, "0x100")["state"] == "done"  # no memory is left that nothing answers for
    look(world)
    assert quarantined(world) == {}


def test_a_memdev_that_leaves_in_good_order_is_none(world):
    (grant,) = world.agent.grants(aw.ROOT)
    world.finish(world.agent.release(aw.ROOT, grant["id"])["job"])
    world.finish(world.agent.region_destroy(aw.ROOT, "region0")["job"])
    world.host.memory.remove(FIRST)
    world.settle()
    assert quarantined(world) == {}


def test_broken_pages_of_a_cxl_node(world):
    world.host.memory.broken = {1: 3}
    look(world)
    assert "the kernel has taken 3 broken pages of node 1" in alert(world, "broken pages")
    assert withheld(world) == {"1"}
    assert release(world, "node1")["state"] == "done"
    look(world)
    assert (quarantined(world), withheld(world)) == ({}, set())
    world.kill_agent()  # the kernel goes on counting: these are known
    world.restart_agent()
    look(world)
    assert quarantined(world) == {}
    world.host.memory.broken = {1: 4}
    look(world)
    assert list(quarantined(world)) == ["node1"]


def test_known_pages_of_a_former_boot_are_forgotten(world):
    world.host.memory.broken = {1: 3}
    look(world)
    release(world, "node1")
    world.host.memory.broken = {}
    look(world)
    assert world.journal.load_books().memory_quarantine == {}
    world.host.memory.broken = {1: 1}
    look(world)
    assert list(quarantined(world)) == ["node1"]


def test_broken_pages_of_dram_are_told_and_withhold_nothing(world):
    world.host.memory.broken = {0: 1}
    look(world)
    text = alert(world, "1 broken pages of node 0 (DRAM)")
    assert "cache 256MiB, db 256MiB" in text  # plain is bound to no node
    assert (quarantined(world), withheld(world)) == ({}, set())


def test_what_is_not_in_quarantine_is_refused(world):
    for subject in ("0x100", "node1", "nonsense"):
        with pytest.raises(RefusedError, match="is not in quarantine") as caught:
            world.agent.memory_release(aw.ROOT, subject)
        assert caught.value.refusal.reason is Reason.UNKNOWN_ID
    with pytest.raises(RefusedError, match="polkit"):
        world.agent.memory_release(aw.NOBODY, "0x100")


def test_a_memdev_that_does_not_answer_stays(world):
    poison(world)
    world.host.memory.conditions.clear()
    assert "does not tell how it does" in release(world, "0x100")["error"]["detail"]


def test_a_guest_that_starts_on_the_node_is_refused(world):
    poison(world)
    world.host.stop_guest(aw.uuid_of(50))
    world.settle()
    spec = replace(aw.make_spec(30, "late", 30, tiers=BOTH, cxl_mib=64), running=False)
    world.host.define_guest(spec)
    assert "node 1" in world.virsh_start("late")
