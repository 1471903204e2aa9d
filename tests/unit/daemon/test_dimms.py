"""DIMMs in the life of an agent: plugged for a guest that asks for them, and there to stay."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.memorysteps import AttachDimm
from virtfabric.model.policy import Growth
from virtfabric.model.units import GIB, MIB

CXL = "memory@tier:cxl"


@pytest.fixture
def world():
    spec = aw.make_spec(90, "db", 90, tiers=("dram", "cxl"), ports=0)
    memory = replace(spec.policy.memory, growth=Growth.DIMM)
    spec = replace(spec, policy=replace(spec.policy, memory=memory))
    made = aw.AgentWorld(specs=(spec,), cxl_mib=1024).start()
    yield made
    made.close()


def dimms(world):
    found = world.live("db").fixed_memory
    return [(p.what, p.size // MIB, list(p.host_nodes)) for p in found if p.what != "cell 0"]


def free_cxl(world):
    return world.agent.host(aw.ROOT)["free"]["cxl"] // MIB


ONE = [("dimm ua-virtfabric-cxl1-dimm0", 256, [1])]


def test_it_comes_and_stays_when_the_grant_ends(world):
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "done", job
    assert dimms(world) == ONE
    (part,) = (p for p in world.guest("db")["memory"]["parts"] if p["tier"] == "cxl")
    assert not part["reclaimable"]
    assert "cannot move" in part["why_not_reclaimable"]
    assert free_cxl(world) == 768
    done = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert done["state"] == "done", done
    world.settle()
    assert (dimms(world), free_cxl(world)) == (ONE, 768)
    assert world.agent.grants(aw.ROOT) == []
    world.host.stop_guest(world.spec("db").uuid)
    world.settle()
    assert free_cxl(world) == 1024


def test_what_fails_is_undone(world):
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind=AttachDimm.kind))
    assert world.allocate("db", memory="+256M", tier="cxl")["state"] == "failed"
    world.settle()
    assert (dimms(world), free_cxl(world)) == ([], 1024)


def test_what_the_guest_keeps_of_an_undo_is_counted(world):
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind=AttachDimm.kind))
    world.host.faults.gives[world.spec("db").uuid] = 0
    assert world.allocate("db", memory="+256M", tier="cxl")["state"] == "failed"
    (residue,) = world.agent.health(aw.ROOT)["residues"]
    assert (residue["what"], residue["amount"]) == (CXL, 256 * MIB)
    assert dimms(world) == ONE
    assert free_cxl(world) == 768
    refused = world.allocate("db", memory="+1G", tier="cxl")
    assert refused["state"] == "refused"
    assert world.live("db").memory_room.size < 4 * GIB


def test_the_policy_is_set_by_its_field(world):
    answer = world.agent.policy_set(aw.ROOT, "db", {"growth": "virtio-mem"})
    if answer.get("job"):
        assert world.finish(answer["job"])["state"] == "done"
    assert world.live("db").policy.memory.growth is Growth.VIRTIO_MEM
