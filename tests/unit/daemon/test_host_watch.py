"""NUMA nodes that come and go while the agent runs, and a libvirt that has not heard of them."""

from __future__ import annotations

import threading
from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault
from virtfabric.adapters.simulated.machines import small_cxl
from virtfabric.model.amounts import Tier
from virtfabric.model.cxl import MemoryState, Serial
from virtfabric.model.errors import ConfigError, HypervisorError
from virtfabric.model.host import NumaNode
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet

BOTH = ("dram", "cxl")
BASE = 0x1000000000


@pytest.fixture
def build():
    made = []

    def start(**options):
        specs = (aw.make_spec(90, "db", 90, tiers=BOTH), aw.make_spec(50, "plain", 50))
        made.append(aw.AgentWorld(specs=specs, cxl=small_cxl(), **options))
        made[-1].start()
        return made[-1]

    yield start
    for world in made:
        world.close()


@pytest.fixture
def world(build):
    return build()


class Restarter:
    """Restarts the simulated libvirtd, or says no."""

    def __init__(self):
        self.host = None
        self.count = 0
        self.fails = False

    def restart(self):
        self.count += 1
        if self.fails:
            raise HypervisorError("systemctl restart libvirtd: Job failed")
        self.host.restart()


def come(world):
    """The node of a region that somebody makes beside the agent."""
    world.host.memory.make_region(BASE, (Serial(0x100),), GIB, 256)
    world.settle()


def go(world):
    (region,) = world.host.memory.cxl.regions
    world.host.memory.drop_region(region)
    world.settle()


def granted(world):
    return {
        m["node"]: m["grantable"] for m in world.agent.host(aw.ROOT)["memory"] if m["tier"] == "cxl"
    }


def alerts(world, text):
    return [alert for alert in world.agent.status(aw.ROOT)["alerts"] if text in alert]


# -- nodes that come and go ---------------------------------------------------------------------


def test_a_node_counts_when_it_comes_and_no_longer_when_it_went(world):
    assert granted(world) == {}
    assert "unknown-tier" in str(world.allocate("db", memory="+256M", tier="cxl")["error"])
    come(world)
    assert granted(world) == {1: GIB}
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "done", job
    world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    go(world)
    assert granted(world) == {1: 0}  # the device that it was attached names the node still
    assert world.agent.host(aw.ROOT)["capacity"]["cxl"] == 0
    world.host.stop_guest(aw.uuid_of(90))
    world.settle()
    world.agent._rounds.look_at_memory()
    assert granted(world) == {}


def test_who_listens_is_told_and_the_audit_log_keeps_it(world):
    told = []
    world.agent.subscribe(lambda n: told.append(n.body) if n.kind == "host.changed" else None)
    come(world)
    assert [body["nodes"]["1"] for body in told] == [
        {"tier": "cxl", "total": GIB, "grantable": GIB}
    ]
    assert [r.body for r in world.audit.read() if r.kind == "host.changed"] == told


def test_a_look_that_finds_nothing_new_voids_no_offer(world):
    come(world)
    generation = world.agent.status(aw.ROOT)["generation"]
    world.host.start_guest(replace(aw.make_spec(77, "other", 5), policy=None, persistent=False))
    world.settle()
    after_start = world.agent.status(aw.ROOT)["generation"]
    assert after_start > generation
    world.agent._rounds.look_at_memory()  # less is free on node 0 than before
    assert world.agent.status(aw.ROOT)["generation"] == after_start


def test_a_capacity_that_makes_no_sense_any_more_stays_as_it_was(build):
    world = build(memory_mib=1600)
    limit = world.capacity_of

    def capacity_of(topology):
        if topology.cxl_nodes:
            raise ConfigError("capacity.memory.node0 = 9GiB is more than the node's 8GiB")
        return limit(topology)

    world.agent._hostwatch.configure(capacity_of, world.capacity)
    come(world)
    assert world.agent.host(aw.ROOT)["capacity"]["memory"] == 1600 * MIB
    assert granted(world) == {1: 0}
    assert alerts(world, "node0 = 9GiB is more than")
    go(world)
    assert not alerts(world, "node0 = 9GiB is more than")


def test_what_is_gone_is_not_granted_whatever_the_configuration_says(world):
    come(world)
    assert granted(world) == {1: GIB}

    def capacity_of(topology):
        raise ConfigError("capacity.memory.node0 = 9GiB is more than the node's 8GiB")

    world.agent._hostwatch.configure(capacity_of, world.agent._observatory.capacity)
    go(world)
    assert alerts(world, "stays as it was")
    assert world.agent.host(aw.ROOT)["capacity"]["cxl"] == 0


def test_pcpus_are_followed_by_a_reload_only(world):
    topology = world.host._topology
    left = {n: pcpu for n, pcpu in topology.pcpus.items() if n != 1}
    nodes = {0: replace(topology.nodes[0], cpus=CpuSet(left))}
    world.host._topology = replace(topology, pcpus=left, nodes=nodes)
    come(world)
    assert granted(world) == {1: GIB}
    assert [c["cpu"] for c in world.agent.host(aw.ROOT)["cpus"]] == [0, 1]
    assert world.agent._observatory.topology.nodes[0].cpus == CpuSet([0, 1])


def test_memory_that_goes_offline_by_hand_is_not_granted(world):
    come(world)
    (region,) = world.host.memory.cxl.regions
    world.host.memory.set_state(region, MemoryState.OFFLINE, movable=True)
    world.settle()
    assert granted(world) == {}


def test_a_restarted_agent_knows_the_node_from_the_start(world):
    come(world)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert granted(world) == {1: GIB}


# -- a libvirt that does not know the node -------------------------------------------------------


def test_a_node_that_libvirt_does_not_know_is_withheld_and_told(world):
    world.host.learn_no_nodes()
    come(world)
    assert granted(world) == {1: 0}
    (text,) = alerts(world, "does not know NUMA node 1")
    assert "restart libvirtd" in text
    assert world.agent.host(aw.ROOT)["withheld"] == {
        "1": "libvirt does not know it: restart libvirtd (guests run on)"
    }
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "refused"
    assert job["error"]["reason"] == "unknown-tier"
    assert "node 1: libvirt does not know it" in job["error"]["detail"]


def test_a_restart_by_hand_ends_it(world):
    world.host.learn_no_nodes()
    come(world)
    world.host.restart()
    world.settle()
    assert granted(world) == {1: GIB}
    assert not alerts(world, "does not know")
    assert world.allocate("db", memory="+256M", tier="cxl")["state"] == "done"


def test_a_node_that_comes_back_is_asked_for_again(world):
    come(world)
    assert granted(world) == {1: GIB}
    go(world)
    world.host.learn_no_nodes()
    come(world)
    assert granted(world) == {1: 0}


def test_a_node_without_memory_is_no_matter_for_libvirt(world):
    world.host.learn_no_nodes()
    topology = world.host._topology
    empty = NumaNode(1, CpuSet(), Bytes(0), Bytes(0), tier=Tier.CXL)
    world.host._topology = replace(topology, nodes={**topology.nodes, 1: empty})
    world.agent._rounds.look_at_memory()
    assert granted(world) == {1: 0}
    assert not alerts(world, "does not know")


def test_a_reload_does_not_let_it_slip(world):
    world.host.learn_no_nodes()
    come(world)
    topology = world.host.read_topology()
    gate = threading.Event()
    world.agent._lifecycle.enqueue(gate.wait)  # no look comes before we have seen it
    world.agent.reconfigure(world.agent._settings, topology, world.capacity_of(topology))
    assert granted(world) == {1: 0}
    gate.set()
    world.settle()
    assert granted(world) == {1: 0}


# -- a restart that is configured ----------------------------------------------------------------


@pytest.fixture
def restarting(build):
    restarter = Restarter()
    world = build(restarter=restarter)
    restarter.host = world.host
    world.host.learn_no_nodes()
    return world, restarter


def test_libvirtd_is_restarted_once_for_a_new_node(restarting):
    world, restarter = restarting
    come(world)
    assert restarter.count == 1
    assert granted(world) == {1: GIB}
    assert [r.body for r in world.audit.read() if r.kind == "libvirt.restarted"] == [
        {"for_nodes": [1]}
    ]
    world.agent._rounds.look_at_memory()
    assert restarter.count == 1


def test_no_restart_beneath_a_job_of_libvirt(restarting):
    world, restarter = restarting
    world.host.set_job(aw.uuid_of(50), "migration out", told=False)
    come(world)
    assert (restarter.count, granted(world)) == (0, {1: 0})
    world.host.set_job(aw.uuid_of(50), None, told=False)
    world.agent._rounds.look_at_memory()
    world.settle()
    assert (restarter.count, granted(world)) == (1, {1: GIB})


def test_no_restart_beneath_a_plan(restarting):
    world, restarter = restarting
    world.settle()  # an errand of the start that waits for the plan would keep us to its deadline
    hold = world.host.faults.add(Fault(Effect.HOLD, guest=aw.uuid_of(90)))
    job = world.agent.allocate(aw.ROOT, "db", {"memory": "+64M", "deadline": "60"})["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    world.host.memory.make_region(BASE, (Serial(0x100),), GIB, 256)
    assert world.agent._lifecycle._errands.drain(aw.DEADLINE_S)
    world.agent._rounds.look_at_memory()
    assert restarter.count == 0
    hold.gate.set()
    assert world.finish(job)["state"] == "done"
    world.agent._rounds.look_at_memory()
    world.settle()
    assert (restarter.count, granted(world)) == (1, {1: GIB})


def test_a_restart_that_fails_is_not_tried_again_and_again(restarting):
    world, restarter = restarting
    restarter.fails = True
    come(world)
    assert (restarter.count, granted(world)) == (1, {1: 0})
    world.agent._lifecycle.enqueue(world.agent._rounds.look_at_memory)
    world.settle()
    assert restarter.count == 1
    assert alerts(world, "does not know NUMA node 1")
    assert alerts(world, "could not be restarted: systemctl restart libvirtd: Job failed")
    world.host.restart()
    world.settle()
    assert not alerts(world, "libvirt")
    assert granted(world) == {1: GIB}


def test_without_one_configured_nobody_restarts_anything(world):
    world.host.learn_no_nodes()
    come(world)
    world.agent._rounds.look_at_memory()
    assert granted(world) == {1: 0}
    assert Bytes(world.agent.host(aw.ROOT)["capacity"]["cxl"]) == 0
