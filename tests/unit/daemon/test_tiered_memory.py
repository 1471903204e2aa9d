"""CXL memory in the life of an agent: attached, lent, given back, told of, undone."""

from __future__ import annotations

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.errors import InvalidValueError, Reason, RefusedError
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.units import GIB, MIB

BOTH = ("dram", "cxl")
CXL = "memory@tier:cxl"


@pytest.fixture
def build():
    made = []

    def start(*specs, **options):
        made.append(aw.AgentWorld(specs=specs, **{"cxl_mib": 1024} | options).start())
        return made[-1]

    yield start
    for world in made:
        world.close()


@pytest.fixture
def world(build):
    """`db` may have CXL memory and has no device for it; `batch`, below it, has half of all."""
    return build(
        aw.make_spec(90, "db", 90, tiers=BOTH),
        aw.make_spec(10, "batch", 10, tiers=BOTH, cxl_mib=512),
        aw.make_spec(50, "plain", 50),
    )


def far(world, name):
    return {d.alias: d.current // MIB for d in world.live(name).virtio_mem if d.host_nodes}


def cxl(world, name):
    return world.guest(name)["memory"]["cxl"]


def test_host_shows_memory_by_tier(world):
    host = world.agent.host(aw.ROOT)
    assert [(m["node"], m["tier"], m["grantable"], m["offlinable"]) for m in host["memory"]] == [
        (0, "dram", 1600 * MIB, False), (1, "cxl", GIB, True),
    ]  # fmt: skip
    assert (host["capacity"]["cxl"], host["free"]["cxl"]) == (GIB, 512 * MIB)


def test_guest_grows_onto_cxl_memory_and_gives_it_back(world):
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "done", job
    assert job["result"]["delta"] == {CXL: 256 * MIB}
    assert far(world, "db") == {"ua-virtfabric-cxl1": 256}
    assert cxl(world, "db") == {
        "grant": 256 * MIB, "limit": GIB, "floor": 0, "current": 256 * MIB,
    }  # fmt: skip
    assert world.guest("db")["memory"]["grant"] == 256 * MIB
    grants = world.agent.grants(aw.ROOT)
    assert [g["amounts"] for g in grants] == [{CXL: 256 * MIB}]
    world.settle()
    released = world.finish(world.agent.release(aw.ROOT, grants[0]["id"])["job"])
    assert released["state"] == "done", released
    assert far(world, "db") == {"ua-virtfabric-cxl1": 0}
    again = world.allocate("db", memory="+64M", tier="cxl")
    assert [s for s in again["result"]["steps"] if "attach" in s] == []
    assert far(world, "db") == {"ua-virtfabric-cxl1": 64}


def test_lower_priority_lends_cxl_memory_and_gets_it_back(world):
    job = world.allocate("db", memory="+768M", tier="cxl")
    assert job["state"] == "done", job
    assert [(p["name"], p["amounts"]) for p in job["result"]["paid"]] == [
        ("batch", {CXL: 256 * MIB})
    ]
    assert (far(world, "db"), far(world, "batch")) == (
        {"ua-virtfabric-cxl1": 768}, {"ua-far0": 256},
    )  # fmt: skip
    assert world.agent.loans(aw.ROOT)[0]["amounts"] == {CXL: 256 * MIB}
    world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert far(world, "batch") == {"ua-far0": 512}
    assert world.agent.loans(aw.ROOT) == []


def test_dry_run_names_the_node_and_why(world):
    plan = world.agent.plan(aw.ROOT, "db", {"memory": "+256M", "tier": "cxl"})
    assert plan["steps"][0]["text"] == (
        "db: attach virtio-mem ua-virtfabric-cxl1 (1GiB, CXL node 1) with 256MiB"
    )
    assert plan["offers"][0]["text"] == (
        "CXL node 1: 512MiB free, 10 from its CPUs; a device is attached"
    )
    assert far(world, "db") == {}


def test_explain_tells_the_tier_the_node_and_what_can_be_taken_back(world):
    job = world.allocate("db", memory="+768M", tier="cxl")
    lines = "\n".join(world.agent.explain(aw.ROOT, job["result"]["request"])["lines"])
    assert "decided: CXL memory 768MiB; from free capacity CXL memory 512MiB" in lines
    assert "offer: CXL node 1:" in lines
    assert "considered batch for CXL memory: pays" in lines
    assert (
        "db has 768MiB of CXL (virtio-mem ua-virtfabric-cxl1, node 1); reclaimable; offlinable"
        in lines
    )
    assert "db has 256MiB of DRAM (boot memory, node 0); not reclaimable: the guest booted" in lines


def test_victim_that_gives_too_little_keeps_it_and_nothing_stays_behind(world):
    victim = aw.uuid_of(10)
    world.host.faults.gives[victim] = 100 * MIB
    job = world.allocate("db", memory="+768M", tier="cxl")
    assert job["state"] == "refused"
    assert job["error"]["reason"] == "guest-uncooperative"
    world.host.faults.clear()
    world.settle()
    assert (far(world, "db"), far(world, "batch")) == ({}, {"ua-far0": 512})


def test_borrower_that_takes_too_little_leaves_no_device(world):
    world.host.faults.takes[aw.uuid_of(90)] = 64 * MIB
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "refused"
    world.host.faults.clear()
    world.settle()
    assert far(world, "db") == {}
    assert world.live("db").memory_room.slots == 2
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 512 * MIB


def test_memory_that_sticks_to_an_undo_is_a_residue_of_its_tier(world):
    guest = aw.uuid_of(90)
    world.host.faults.add(Fault(Effect.FAIL, kind="attach-memory", phase=Phase.VERIFY))
    world.host.faults.gives[guest] = 0
    job = world.allocate("db", memory="+256M", tier="cxl")
    assert job["state"] == "failed"
    (residue,) = world.agent.health(aw.ROOT)["residues"]
    assert (residue["what"], residue["amount"]) == (CXL, 256 * MIB)
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 256 * MIB


@pytest.mark.parametrize("away", [False, True])
def test_memory_that_comes_back_late_is_no_residue_any_more(world, away):
    guest, before = aw.uuid_of(50), world.agent.host(aw.ROOT)["free"]["memory"]
    world.host.faults.add(Fault(Effect.FAIL, kind="resize-virtio-mem", phase=Phase.VERIFY))
    world.host.faults.gives[guest] = 0
    job = world.allocate("plain", memory="+128M")
    assert job["state"] == "failed"
    world.agent._lifecycle.converge([guest], "retry of a residue").ended.wait()
    assert [r["amount"] for r in world.guest("plain")["residues"]] == [128 * MIB], "still there"
    world.host.faults.clear()
    (device,) = world.live("plain").virtio_mem
    back = ResizeVirtioMem(
        guest=guest, alias=device.alias, before=device.current, after=device.current - 128 * MIB
    )
    if away:
        world.kill_agent()
    world.host.change_beside(back)
    if away:
        world.restart_agent()
    world.settle()
    assert world.guest("plain")["residues"] == []
    (told,) = (t for t in world.agent.explain(aw.ROOT, guest)["lines"] if "late" in t)
    assert told.endswith("plain let go late: memory 128MiB -> 0B")
    assert world.agent.host(aw.ROOT)["free"]["memory"] == before


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY])
def test_crash_in_the_middle_of_an_attach_is_undone(world, phase):
    crash = world.host.faults.add(Fault(Effect.CRASH, kind="attach-memory", phase=phase))
    world.agent.allocate(aw.ROOT, "db", {"memory": "+256M", "tier": "cxl"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert far(world, "db") == {}
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 512 * MIB


def test_guest_that_starts_brings_its_memory_along(build):
    world = build(
        aw.make_spec(10, "batch", 10, tiers=BOTH, cxl_mib=512),
        aw.make_spec(20, "late", 20, tiers=BOTH, cxl_mib=600, running=False),
    )
    assert cxl(world, "batch")["grant"] == 512 * MIB
    line = world.virsh_start("late")
    assert line == ""
    world.settle()
    # 88 MiB of it were lent by batch, which is lower
    assert (cxl(world, "late")["grant"], cxl(world, "batch")["grant"]) == (600 * MIB, 424 * MIB)
    assert world.agent.host(aw.ROOT)["free"]["cxl"] == 0


def test_hand_that_resizes_the_far_device_is_drift_of_its_tier(world):
    step = ResizeVirtioMem(
        guest=aw.uuid_of(10), alias="ua-far0", before=512 * MIB, after=128 * MIB
    )  # fmt: skip
    world.host.change_beside(step)
    aw.eventually(lambda: world.agent.drift(aw.ROOT), "the drift shows")
    (found,) = world.agent.drift(aw.ROOT)
    assert (found["what"], found["intended"], found["found"]) == ("CXL memory", "512MiB", "128MiB")
    assert world.finish(world.agent.drift_repair(aw.ROOT)["job"])["state"] == "done"
    assert far(world, "batch") == {"ua-far0": 512}


def test_ceiling_of_a_principal_is_of_both_tiers_together(world):
    with pytest.raises(RefusedError) as caught:
        world.agent.allocate(aw.ALICE, "db", {"memory": "+512M", "tier": "cxl"})
    assert caught.value.refusal.reason is Reason.ABOVE_CEILING


@pytest.mark.parametrize(
    ("wants", "field"),
    [
        ({"memory": "+1G", "tier": "hbm"}, "tier"),
        ({"cpu": "+1", "tier": "cxl"}, "tier"),
    ],
)
def test_words_that_make_no_sense(world, wants, field):
    with pytest.raises(InvalidValueError) as caught:
        world.agent.allocate(aw.ROOT, "db", wants)
    assert caught.value.field == field


def test_policy_forbids_until_it_is_changed(world):
    job = world.allocate("plain", memory="+64M", tier="cxl")
    assert job["error"]["reason"] == "not-allowed"
    with pytest.raises(InvalidValueError, match="tiers: 'hbm' must be one of dram, cxl"):
        world.agent.policy_set(aw.ROOT, "plain", {"tiers": "dram,hbm"})
    shown = world.agent.policy_set(aw.ROOT, "plain", {"tiers": "cxl, dram"})
    assert shown["policy"]["memory"]["tiers"] == BOTH
    world.finish(shown["job"])
    job = world.allocate("plain", memory="+64M", tier="cxl")
    assert job["error"]["reason"] == "no-mechanism"  # it is not tiered


def test_tiers_of_a_request_reach_the_audit_log(world):
    job = world.allocate("db", memory="+64M", tier="cxl")
    story = world.agent.explain(aw.ROOT, job["result"]["request"])
    (begun,) = [r for r in story["records"] if r["kind"] == "plan.begun"]
    assert begun["body"]["asked"]["tier"] == "cxl"
