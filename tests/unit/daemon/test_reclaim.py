"""Memory called home: what guests can spare, the next device, the next guest, and what is out."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.adapters.simulated.guest import MemoryDevice
from virtfabric.model.errors import HypervisorError, InvalidValueError, Reason, RefusedError
from virtfabric.model.policy import Escalation
from virtfabric.model.reclaim import MemoryReport
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet

BOTH = ("dram", "cxl")
BATCH, WEB, DB = (aw.uuid_of(n) for n in (10, 50, 90))
MARGIN = 32
"""MiB that are left to a guest of what it tells."""


@pytest.fixture
def build():
    made = []

    def start(*specs, **options):
        made.append(aw.AgentWorld(specs=specs, **options).start())
        return made[-1]

    yield start
    for world in made:
        world.close()


def spec(number, name, priority, *, escalate=Escalation.PRESS, **options):
    made = aw.make_spec(number, name, priority, **options)
    memory = replace(made.policy.memory, escalate=escalate)
    return replace(made, policy=replace(made.policy, memory=memory))


def near(build, *, batch=Escalation.PRESS, **options):
    """`batch` and `web` hold 512 MiB above their floors; 256 MiB are free."""
    return build(
        spec(10, "batch", 10, initial_mib=512, escalate=batch),
        spec(50, "web", 50, initial_mib=512),
        spec(90, "db", 90),
        memory_mib=256 * 3 + 3 * 16 + 1024 + 256,
        **options,
    )


def tell(world, guest, usable_mib):
    """The guest tells that it can spare so much."""
    world.host.stats.reports[guest] = MemoryReport((usable_mib + MARGIN) * MIB)


def paid(job):
    return {p["name"]: p["amounts"]["memory"] // MIB for p in job["result"]["paid"]}


def story(world, job):
    return "\n".join(world.agent.explain(aw.ROOT, job["result"]["request"])["lines"])


def sizes(world, name):
    return {d.alias: d.requested // MIB for d in world.live(name).virtio_mem}


# -- what guests tell ----------------------------------------------------------------------------


def test_who_tells_nothing_is_asked_for_all_above_its_floor(build):
    world = near(build)
    job = world.allocate("db", memory="+640M")
    assert paid(job) == {"batch": 384}


def test_nobody_is_asked_for_more_than_it_can_spare_while_another_can(build):
    world = near(build)
    tell(world, BATCH, 100)
    plan = world.agent.plan(aw.ROOT, "db", {"memory": "+640M"})
    assert [part["text"] for part in plan["decision"]["reclaim"][0]["parts"]] == [
        "batch: 100MiB by virtio-mem ua-mem0 within 5 s",
        "web: 284MiB by virtio-mem ua-mem0 within 5 s",
    ]
    job = world.allocate("db", memory="+640M")
    assert paid(job) == {"batch": 100, "web": 284}
    text = story(world, job)
    assert "calling home 384MiB of memory" in text
    assert "asks batch: 100MiB by virtio-mem ua-mem0 within 5 s" in text
    assert "batch: memory: keeps 412MiB above its floor: tells that 132MiB are usable" in text
    assert "batch: 100MiB of 100MiB came home" in text


def test_explain_tells_who_had_nothing_to_spare_and_who_was_not_needed(build):
    world = near(build)
    tell(world, BATCH, 0)
    text = story(world, world.allocate("db", memory="+512M"))
    assert "considered batch for memory: gives-no-more" in text
    assert "considered web for memory: pays" in text
    world.host.stats.reports.clear()
    text = story(world, world.allocate("db", memory="+64M"))
    assert "considered batch for memory: pays" in text
    assert "considered web for memory: not-needed" in text


def test_who_allows_it_is_pressed_when_nobody_has_enough_to_spare(build):
    world = near(build)
    tell(world, BATCH, 100)
    tell(world, WEB, 200)
    job = world.allocate("db", memory="+640M")
    assert paid(job) == {"batch": 184, "web": 200}
    assert "asks batch: 84MiB by virtio-mem ua-mem0 within 5 s, more than it says it can spare" in (
        story(world, job)
    )


def test_who_does_not_allow_it_is_never_pressed(build):
    world = near(build, batch=Escalation.NO)
    tell(world, BATCH, 100)
    tell(world, WEB, 200)
    job = world.allocate("db", memory="+640M")
    assert paid(job) == {"batch": 100, "web": 284}
    tell(world, BATCH, 0)
    more = world.allocate("db", memory="+300M")
    assert more["state"] == "refused"
    assert more["error"]["reason"] == "no-capacity"
    assert any("its policy says escalate='no'" in line for line in more["error"]["considered"])


def test_who_tells_nothing_and_does_not_allow_it_gives_nothing(build):
    world = near(build, batch=Escalation.NO)
    assert paid(world.allocate("db", memory="+640M")) == {"web": 384}


def test_policy_of_a_guest_is_set_by_word(build):
    world = near(build)
    shown = world.agent.policy_set(aw.ROOT, "batch", {"escalate": "no"})
    assert shown["policy"]["memory"]["escalate"] == "no"
    with pytest.raises(InvalidValueError) as caught:
        world.agent.policy_set(aw.ROOT, "batch", {"escalate": "kill"})
    assert caught.value.field == "escalate"


def test_balloon_gives_what_can_be_spared_before_it_is_pressed(build):
    world = build(
        spec(10, "batch", 10, balloon=True), spec(50, "web", 50, initial_mib=512),
        spec(90, "db", 90), memory_mib=1024 + 256 * 2 + 512 + 3 * 16,
        settings={"lend_ballooned": True},
    )  # fmt: skip
    tell(world, BATCH, 200)
    job = world.allocate("db", memory="+256M")
    assert paid(job) == {"batch": 200, "web": 56}
    assert "asks batch: 200MiB by balloon within 5 s" in story(world, job)
    tell(world, BATCH, 0)
    tell(world, WEB, 0)
    assert paid(world.allocate("db", memory="+100M")) == {"batch": 100}


def test_guest_that_cannot_be_asked_tells_nothing(build):
    world = near(build)

    def broken(guest):
        raise HypervisorError("internal error: no reply")

    world.host.stats.read_report = broken
    assert paid(world.allocate("db", memory="+640M")) == {"batch": 384}


# -- who stops short -----------------------------------------------------------------------------


def test_next_guest_makes_up_for_one_that_stops_short(build):
    world = near(build)
    world.host.faults.gives[BATCH] = 100 * MIB
    job = world.allocate("db", memory="+640M")
    assert paid(job) == {"batch": 100, "web": 284}
    (short,) = [one for one in job["result"]["reclaimed"] if one["out"]]
    assert (short["name"], short["asked"] // MIB, short["freed"] // MIB, short["out"] // MIB) == (
        "batch", 384, 100, 284,
    )  # fmt: skip
    assert sum(one["freed"] for one in job["result"]["reclaimed"]) == 384 * MIB
    text = story(world, job)
    assert "batch: 100MiB of 384MiB came home, 284MiB still out: " in text
    assert "decided anew with what was given" in text
    world.host.faults.clear()
    world.settle()


def test_next_device_of_the_same_guest_makes_up_for_one_that_sticks(build):
    two = (
        MemoryDevice("ua-mem0", 0, Bytes(GIB), Bytes(256 * MIB)),
        MemoryDevice("ua-mem1", 0, Bytes(GIB), Bytes(256 * MIB)),
    )
    world = build(
        replace(spec(10, "batch", 10), devices=two),
        spec(50, "web", 50, initial_mib=512),
        spec(90, "db", 90),
        memory_mib=256 * 3 + 3 * 16 + 1024,
    )
    world.host.faults.sticks[BATCH, "ua-mem1"] = 200 * MIB
    job = world.allocate("db", memory="+256M")
    assert job["state"] == "done", job
    assert paid(job) == {"batch": 256}
    assert sizes(world, "batch") == {"ua-mem0": 56, "ua-mem1": 200}
    assert "plan.replanned" in [r.kind for r in world.audit.read()]


def test_both_devices_stick_and_the_next_guest_pays_the_rest(build):
    two = (
        MemoryDevice("ua-mem0", 0, Bytes(GIB), Bytes(256 * MIB)),
        MemoryDevice("ua-mem1", 0, Bytes(GIB), Bytes(256 * MIB)),
    )
    world = build(
        replace(spec(10, "batch", 10), devices=two),
        spec(50, "web", 50, initial_mib=512),
        spec(90, "db", 90),
        memory_mib=256 * 3 + 3 * 16 + 1024,
    )
    world.host.faults.sticks[BATCH, "ua-mem0"] = 250 * MIB
    world.host.faults.sticks[BATCH, "ua-mem1"] = 200 * MIB
    job = world.allocate("db", memory="+256M")
    assert job["state"] == "done", job
    assert paid(job) == {"batch": 62, "web": 194}
    assert sum(one["freed"] for one in job["result"]["reclaimed"]) == 256 * MIB


def test_lease_that_is_over_takes_what_comes_and_goes_on_for_the_rest(build):
    world = near(build)
    job = world.allocate("db", **{"memory": "+640M", "for": "1h"})
    assert paid(job) == {"batch": 384}
    world.host.faults.gives[DB] = 400 * MIB
    world.clock.leap(3601)
    aw.eventually(
        lambda: [g["amounts"] for g in world.agent.grants(aw.ROOT)] == [{"memory": 240 * MIB}],
        "some came home",
    )
    assert sizes(world, "db") == {"ua-mem0": 240}
    # the victim first: 384 MiB are its own
    assert (sizes(world, "batch"), world.agent.loans(aw.ROOT)) == ({"ua-mem0": 512}, [])
    (record,) = [r for r in world.audit.read() if r.body.get("reclaimed") and not r.body["grant"]]
    assert [
        (one["name"], one["asked"] // MIB, one["freed"] // MIB, one["out"] // MIB)
        for one in record.body["reclaimed"]
    ] == [("db", 640, 400, 240)]
    world.host.faults.clear()
    aw.eventually(lambda: not world.agent.grants(aw.ROOT), "the rest came home")
    world.settle()
    assert sizes(world, "db") == {"ua-mem0": 0}


def test_release_by_a_person_is_all_or_nothing(build):
    world = near(build)
    grant = world.allocate("db", memory="+640M")["result"]["grant"]
    world.host.faults.gives[DB] = 400 * MIB
    job = world.finish(world.agent.release(aw.ROOT, grant)["job"])
    assert (job["state"], job["error"]["reason"]) == ("refused", "guest-uncooperative")
    assert [g["amounts"] for g in world.agent.grants(aw.ROOT)] == [{"memory": 640 * MIB}]
    world.host.faults.clear()
    world.settle()
    assert sizes(world, "db") == {"ua-mem0": 640}


# -- a node called home --------------------------------------------------------------------------


@pytest.fixture
def world(build):
    """`db` and `batch` have memory of CXL node 1; `stray` has too, and no policy."""
    stray = replace(
        spec(30, "stray", 30, tiers=BOTH, cxl_mib=64), policy=None,
        devices=(MemoryDevice("ua-far0", 0, Bytes(64 * MIB), Bytes(64 * MIB),
                              host_nodes=CpuSet([1])),),
    )  # fmt: skip
    made = build(
        spec(90, "db", 90, tiers=BOTH),
        spec(10, "batch", 10, tiers=BOTH, cxl_mib=512),
        stray,
        cxl_mib=1024,
        memory_mib=2000,
    )
    assert made.allocate("db", memory="+256M", tier="cxl")["state"] == "done"
    return made


def call(world, **wants):
    return world.finish(world.agent.reclaim(aw.ROOT, {"node": "1"} | wants)["job"])


def far(world, name):
    return {d.alias: d.requested // MIB for d in world.live(name).virtio_mem if d.host_nodes}


def figures(job):
    return [job["result"][name] // MIB for name in ("asked", "freed", "out")]


def test_whole_node_comes_home_and_its_devices_leave(world):
    plan = world.agent.reclaim_plan(aw.ROOT, {"node": "1", "detach": "yes"})
    assert [part["text"] for part in plan["parts"]] == [
        "batch: 512MiB by virtio-mem ua-far0 (node 1) within 5 s, then the device is detached",
        "db: 256MiB by virtio-mem ua-virtfabric-cxl1 (node 1) within 5 s, then the device is "
        "detached",
    ]
    assert far(world, "batch") == {"ua-far0": 512}
    job = call(world, detach="yes")
    assert job["state"] == "done", job
    assert figures(job) == [832, 768, 64]
    assert (far(world, "batch"), far(world, "db")) == ({}, {})
    assert world.live("db").free_ports == 4
    assert job["result"]["detached"] == [
        {"name": "batch", "alias": "ua-far0"}, {"name": "db", "alias": "ua-virtfabric-cxl1"},
    ]  # fmt: skip
    assert job["result"]["others"] == ["stray: 64MiB stay: it is unmanaged, and never touched"]
    text = story(world, job)
    assert "768MiB of 832MiB came, 64MiB still out" in text
    assert "step: batch: detach empty virtio-mem ua-far0 (CXL node 1)" in text
    world.settle()
    assert world.agent.grants(aw.ROOT) == []


def test_device_of_the_definition_is_back_at_the_next_start(world):
    call(world, detach="yes")
    assert far(world, "batch") == {}
    world.host.stop_guest(BATCH)
    assert world.virsh_start("batch") == ""
    assert far(world, "batch") == {"ua-far0": 512}


def test_part_of_it_comes_from_the_lowest_priority_first(world):
    job = call(world, size="300M")
    assert figures(job) == [300, 300, 0]
    assert (far(world, "batch"), far(world, "db")) == (
        {"ua-far0": 212}, {"ua-virtfabric-cxl1": 256},
    )  # fmt: skip


def test_sizes_are_rounded_up_to_blocks(world):
    job = call(world, size="3M")
    assert figures(job) == [3, 4, 0]
    assert far(world, "batch") == {"ua-far0": 508}


def test_what_one_gave_stays_given_and_the_rest_is_told(world):
    world.host.faults.gives[BATCH] = 100 * MIB
    job = call(world, detach="yes")
    assert job["state"] == "done", job
    assert figures(job) == [832, 356, 476]
    batch, db = job["result"]["guests"]
    assert (batch["asked"] // MIB, batch["freed"] // MIB, batch["out"] // MIB) == (512, 100, 412)
    assert "the guest stopped at 412MiB" in batch["why"]
    assert (db["freed"] // MIB, db["out"]) == (256, 0)
    assert (far(world, "batch"), far(world, "db")) == ({"ua-far0": 412}, {})
    assert world.guest("batch")["memory"]["cxl"]["grant"] == 412 * MIB
    world.host.faults.clear()
    world.settle()
    assert figures(call(world, detach="yes"))[1:] == [412, 64]


def test_guest_that_keeps_an_empty_device_keeps_nothing_else(world):
    world.host.faults.keeps_memory_devices.add(DB)
    job = call(world, detach="yes")
    assert figures(job) == [832, 768, 64]
    (kept,) = job["result"]["kept"]
    assert kept.startswith("db: detach empty virtio-mem ua-virtfabric-cxl1 (CXL node 1): ")
    assert far(world, "db") == {"ua-virtfabric-cxl1": 0}
    world.host.faults.clear()
    again = call(world, detach="yes")
    assert again["result"]["detached"] == [{"name": "db", "alias": "ua-virtfabric-cxl1"}]
    assert far(world, "db") == {}


def test_guest_is_asked_for_what_it_can_spare_only(build):
    made = build(
        spec(10, "batch", 10, tiers=BOTH, cxl_mib=512, escalate=Escalation.NO), cxl_mib=1024
    )
    tell(made, BATCH, 100)
    job = call(made)
    assert figures(job) == [512, 100, 412]
    assert job["result"]["others"] == [
        "batch: CXL memory: keeps 412MiB above its floor: tells that 132MiB are usable, and its "
        "policy says escalate='no'"
    ]


def test_failed_step_undoes_that_guest_alone(world):
    world.host.faults.add(
        Fault(Effect.FAIL, kind="resize-virtio-mem", guest=BATCH, phase=Phase.VERIFY)
    )
    job = call(world)
    assert job["state"] == "done", job
    assert figures(job) == [832, 256, 576]
    assert job["result"]["guests"][0]["why"]
    assert (far(world, "batch"), far(world, "db")) == (
        {"ua-far0": 512}, {"ua-virtfabric-cxl1": 0},
    )  # fmt: skip


def test_nothing_is_granted_of_a_node_that_is_being_called_home(world):
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
    job = world.agent.reclaim(aw.ROOT, {"node": "1"})["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    with pytest.raises(RefusedError) as caught:
        world.agent.plan(aw.ROOT, "db", {"memory": "+64M", "tier": "cxl"})
    assert "it is being called home" in caught.value.refusal.detail
    hold.gate.set()
    assert world.finish(job)["state"] == "done"


def test_cancelled_call_keeps_what_came_home(world):
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem", guest=DB))
    job = world.agent.reclaim(aw.ROOT, {"node": "1"})["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    world.agent.job_cancel(aw.ROOT, job)
    assert world.finish(job)["state"] == "cancelled"
    assert (far(world, "batch"), far(world, "db")) == (
        {"ua-far0": 0}, {"ua-virtfabric-cxl1": 256},
    )  # fmt: skip
    (record,) = [r for r in world.audit.read() if r.kind == "memory.called-home"]
    assert record.body["freed"] == 512 * MIB


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY])
def test_crash_in_the_middle_of_a_detach_is_undone(world, phase):
    crash = world.host.faults.add(Fault(Effect.CRASH, kind="detach-memory", phase=phase))
    world.agent.reclaim(aw.ROOT, {"node": "1", "detach": "yes"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert (far(world, "batch"), far(world, "db")) == (
        {"ua-far0": 512}, {"ua-virtfabric-cxl1": 256},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wants", "field"),
    [
        ({}, "node"),
        ({"node": "one"}, "node"),
        ({"node": "-1"}, "node"),
        ({"node": "1", "size": "0"}, "size"),
        ({"node": "1", "size": "much"}, "size"),
        ({"node": "1", "detach": "perhaps"}, "detach"),
        ({"node": "1", "deadline": "11m"}, "deadline"),
        ({"node": "1", "colour": "red"}, "colour"),
    ],
)
def test_words_that_make_no_sense(world, wants, field):
    with pytest.raises(InvalidValueError) as caught:
        world.agent.reclaim(aw.ROOT, wants)
    assert caught.value.field == field


@pytest.mark.parametrize(("node", "what"), [("0", "is of DRAM"), ("7", "is not there")])
def test_node_that_is_not_one_of_cxl(world, node, what):
    with pytest.raises(RefusedError) as caught:
        world.agent.reclaim(aw.ROOT, {"node": node})
    assert caught.value.refusal.reason is Reason.UNKNOWN_TIER
    assert what in caught.value.refusal.detail


def test_not_everybody_may(world):
    for method in (world.agent.reclaim, world.agent.reclaim_plan):
        with pytest.raises(RefusedError) as caught:
            method(aw.NOBODY, {"node": "1"})
        assert caught.value.refusal.reason is Reason.NOT_ALLOWED
