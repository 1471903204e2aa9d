"""CXL regions as requests: made, taken down, refused, undone, recovered after a kill."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase, SimulatedCrash
from virtfabric.adapters.simulated.machines import small_cxl
from virtfabric.model.cxl import MemoryState, Serial
from virtfabric.model.errors import InvalidValueError, Reason, RefusedError
from virtfabric.model.units import GIB, MIB
from virtfabric.ports import TransactionState

BOTH = ("dram", "cxl")
WANTS = {"window": "decoder0.0", "memdevs": "0x100"}
LOWER, UPPER, INTERLEAVED = (window.base for window in small_cxl().windows)


@pytest.fixture
def world():
    made = aw.AgentWorld(
        specs=(
            aw.make_spec(90, "db", 90, tiers=BOTH),
            aw.make_spec(70, "cache", 70, tiers=BOTH),
            aw.make_spec(50, "plain", 50),
        ),
        cxl=small_cxl(),
        memory_mib=4000,
    ).start()
    yield made
    made.close()


def create(world, **wants):
    return world.finish(world.agent.region_create(aw.ROOT, WANTS | wants)["job"])


def destroy(world, name="region0"):
    return world.finish(world.agent.region_destroy(aw.ROOT, name)["job"])


def regions(world):
    return {
        r.name: ([str(s) for s in r.members], [(d.node, d.state, d.movable) for d in r.dax])
        for r in world.host.memory.cxl.regions
    }


def granted(world):
    host = world.agent.host(aw.ROOT)
    return {m["node"]: m["grantable"] for m in host["memory"] if m["tier"] == "cxl"}


def refusal(function, *args):
    with pytest.raises(RefusedError) as caught:
        function(aw.ROOT, *args)
    return caught.value.refusal


# -- the life of a region -----------------------------------------------------------------------


def test_a_region_is_made_used_and_taken_down(world):
    job = create(world)
    assert job["state"] == "done", job
    assert job["result"]["region"] == "region0"
    assert job["result"]["nodes"] == [{"node": 1, "grantable": GIB, "withheld": ""}]
    assert regions(world) == {"region0": (["0x100"], [(1, MemoryState.ONLINE, True)])}
    # at once: nobody waits for an event or a reload
    taken = world.allocate("db", memory="+512M", tier="cxl")
    assert taken["state"] == "done", taken
    world.finish(world.agent.release(aw.ROOT, taken["result"]["grant"])["job"])
    gone = destroy(world)
    assert gone["state"] == "done", gone
    assert gone["result"]["steps"] == [
        "db: detach empty virtio-mem ua-virtfabric-cxl1 (CXL node 1)",
        "host: memory of CXL region of 0x100 in window 0x1000000000 movable -> offline",
        "host: destroy CXL region of 0x100 in window 0x1000000000, 1GiB",
    ]
    assert (regions(world), granted(world)) == ({}, {})
    assert world.agent.host(aw.ROOT)["withheld"] == {}


def test_interleaved_members_are_put_in_the_order_of_the_bridges(world):
    job = create(world, window=hex(INTERLEAVED), memdevs="0x102,0x100", ways="2")
    assert job["state"] == "done", job
    (region,) = world.host.memory.cxl.regions
    assert (region.members, region.granularity, region.size) == (
        (Serial(0x100), Serial(0x102)), 256, 2 * GIB,
    )  # fmt: skip


def test_normal_memory_is_granted_and_never_comes_back(world):
    assert create(world, use="normal", size="512M")["state"] == "done"
    assert regions(world) == {"region0": (["0x100"], [(1, MemoryState.ONLINE, False)])}
    assert granted(world) == {1: 512 * MIB}
    no = refusal(world.agent.region_destroy, "region0")
    assert no.reason is Reason.NO_MECHANISM
    assert "ZONE_NORMAL" in no.detail


def test_dry_run_prints_exactly_the_steps_that_are_carried_out(world):
    plan = world.agent.region_plan(aw.ROOT, WANTS)
    assert regions(world) == {}
    texts = [step["text"] for step in plan["steps"]]
    assert create(world)["result"]["steps"] == texts
    end = world.agent.region_plan_end(aw.ROOT, "region0")
    assert list(regions(world)) == ["region0"]
    assert destroy(world)["result"]["steps"] == [step["text"] for step in end["steps"]]


def test_memory_that_is_offline_already_needs_no_step(world):
    create(world)
    (region,) = world.host.memory.cxl.regions
    world.host.memory.set_state(region, MemoryState.OFFLINE, movable=False)
    world.settle()
    assert len(destroy(world)["result"]["steps"]) == 1


def test_explain_tells_who_made_it(world):
    job = create(world)
    lines = "\n".join(world.agent.explain(aw.ROOT, job["result"]["request"])["lines"])
    assert "CXL region of 0x100" in lines
    assert "host: create CXL region of 0x100 in window 0x1000000000, 1GiB" in lines


@pytest.mark.parametrize("restarted", [False, True])
def test_a_device_whose_node_is_gone_is_never_filled_with_dram(world, restarted):
    create(world)
    job = world.allocate("db", memory="+512M", tier="cxl")
    world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    world.host.faults.keeps_memory_devices.add(world.live("db").uuid)
    destroy(world)
    assert granted(world) == {1: 0}  # the device names the node still
    assert [d.alias for d in world.live("db").virtio_mem] == ["ua-mem0", "ua-virtfabric-cxl1"]
    if restarted:
        world.kill_agent()
        world.restart_agent()
    world.settle()
    job = world.allocate("db", memory="1536M")  # its own device has 1 GiB
    assert job["state"] == "refused", job
    job = world.allocate("db", memory="1280M")
    assert job["state"] == "done", job
    assert {d.alias: d.requested // MIB for d in world.live("db").virtio_mem} == {
        "ua-mem0": 1024, "ua-virtfabric-cxl1": 0,
    }  # fmt: skip


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wants", "reason", "words"),
    [
        ({"window": "decoder9.9"}, Reason.UNKNOWN_ID, "there are: 0x1000000000 (decoder0.0)"),
        ({"memdevs": "0x999"}, Reason.UNKNOWN_ID, "no memdev with the serial 0x999"),
        ({"memdevs": "0x102"}, Reason.NO_PLACEMENT, "0x102 is not behind port1"),
        ({"size": "2G"}, Reason.NO_CAPACITY, "its share would be 2GiB"),
        ({"granularity": "300"}, Reason.INVALID_ARGUMENT, "granularity 300"),
    ],
)
def test_a_region_that_cannot_be(world, wants, reason, words):
    for call in (world.agent.region_create, world.agent.region_plan):
        no = refusal(call, WANTS | wants)
        assert (no.reason, words in no.detail) == (reason, True), no
    assert regions(world) == {}


@pytest.mark.parametrize(
    ("wants", "field"),
    [
        ({"memdevs": ""}, "memdevs"), ({"memdevs": "mem0"}, "memdevs"), ({"window": ""}, "window"),
        ({"ways": "2"}, "ways"), ({"granularity": "-1"}, "granularity"), ({"size": "x"}, "size"),
        ({"use": "offline"}, "use"), ({"deadline": "1"}, "deadline"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense(world, wants, field):
    with pytest.raises(InvalidValueError) as caught:
        world.agent.region_create(aw.ROOT, WANTS | wants)
    assert caught.value.field == field


def test_a_region_with_guests_stays_and_they_are_named(world):
    create(world)
    world.allocate("db", memory="+512M", tier="cxl")
    world.allocate("cache", memory="+256M", tier="cxl")
    before = regions(world)
    for call in (world.agent.region_destroy, world.agent.region_plan_end):
        no = refusal(call, "region0")
        assert no.reason is Reason.DEVICE_IN_USE
        assert "guests use it: cache has 256MiB, db has 512MiB" in no.detail
    assert (regions(world), granted(world)) == (before, {1: GIB})


def test_an_unmanaged_guest_counts_as_well(world):
    create(world)
    spec = aw.make_spec(30, "stranger", 5, tiers=BOTH, cxl_mib=64)
    world.host.start_guest(replace(spec, policy=None))
    assert "stranger has 64MiB" in refusal(world.agent.region_destroy, "region0").detail


def test_a_region_that_a_plan_is_filling_stays(world):
    create(world)
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="attach-memory"))
    job = world.agent.allocate(aw.ROOT, "db", {"memory": "+512M", "tier": "cxl"})["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    no = refusal(world.agent.region_destroy, "region0")
    assert no.reason is Reason.BUSY
    assert "a plan that runs gives a guest memory of node 1" in no.detail
    hold.gate.set()
    assert world.finish(job)["state"] == "done"
    assert "db has 512MiB" in refusal(world.agent.region_destroy, "region0").detail


def test_nothing_is_granted_of_a_region_that_is_being_taken_down(world):
    create(world)
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="online-memory"))
    job = world.agent.region_destroy(aw.ROOT, "region0")["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    assert world.agent.host(aw.ROOT)["withheld"] == {"1": "region0 is being taken down"}
    taken = world.allocate("db", memory="+512M", tier="cxl")
    assert taken["state"] == "refused"
    assert "region0 is being taken down" in taken["error"]["detail"]
    hold.gate.set()
    assert world.finish(job)["state"] == "done"
    assert regions(world) == {}


def test_a_region_made_by_hand_is_never_changed(world):
    create(world)
    (region,) = world.host.memory.cxl.regions
    world.host.memory.put_region(replace(region, ours=False))
    no = refusal(world.agent.region_destroy, "region0")
    assert "made by hand" in no.detail
    assert "there are: region0" in refusal(world.agent.region_destroy, "region7").detail


def test_who_may(world):
    for call, about in (
        (world.agent.region_create, WANTS), (world.agent.region_plan, WANTS),
        (world.agent.region_destroy, "region0"), (world.agent.region_plan_end, "region0"),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=r"polkit action org\.virtfabric1\.memory"):
            call(aw.NOBODY, about)
    denied = [r for r in world.audit.read() if r.kind == "access.denied"]
    assert len(denied) == 4
    assert world.finish(world.agent.region_create(aw.ALICE, WANTS)["job"])["state"] == "done"


# -- undone, recovered ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["create-region", "online-memory"])
@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])
def test_a_step_that_fails_leaves_no_region(world, kind, phase):
    world.host.faults.add(Fault(Effect.FAIL, phase, kind=kind))
    job = create(world)
    assert job["state"] == "failed", job
    world.settle()
    assert (regions(world), granted(world)) == ({}, {})


def test_memory_that_does_not_go_offline_leaves_the_region_as_it_was(world):
    create(world)
    before = regions(world)
    world.host.memory.stuck.add(1)
    job = destroy(world)
    assert job["state"] == "failed"
    assert "Device or resource busy" in job["error"]["detail"]
    world.settle()
    assert (regions(world), granted(world)) == (before, {1: GIB})
    world.host.memory.stuck.clear()
    assert destroy(world)["state"] == "done"


@pytest.mark.parametrize("kind", ["create-region", "online-memory"])
@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])
@pytest.mark.parametrize("making", [True, False])
def test_a_kill_at_any_boundary_is_undone_at_the_next_start(world, kind, phase, making):
    if not making:
        create(world)
        world.settle()
    before = regions(world), granted(world)
    crash = world.host.faults.add(Fault(Effect.CRASH, phase, kind=kind))
    if making:
        world.agent.region_create(aw.ROOT, WANTS)
    else:
        world.agent.region_destroy(aw.ROOT, "region0")
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    assert [t.state for t in world.journal.open_transactions()] == [TransactionState.OPEN]
    world.restart_agent()
    world.settle()
    assert (regions(world), granted(world)) == before
    assert world.journal.open_transactions() == ()
    assert (create if making else destroy)(world)["state"] == "done"


@pytest.mark.parametrize("kind", ["create-region", "online-memory"])
@pytest.mark.parametrize("phase", [Phase.UNDO, Phase.UNDONE])
@pytest.mark.parametrize("making", [True, False])
def test_a_kill_in_the_middle_of_an_undo(world, kind, phase, making):
    """The last step fails, and the agent dies while it undoes; so does the next one."""
    if not making:
        create(world)
        world.settle()
    before = regions(world), granted(world)
    last = "online-memory" if making else "create-region"
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFIED, kind=last))
    crash = world.host.faults.add(Fault(Effect.CRASH, phase, kind=kind))
    if making:
        world.agent.region_create(aw.ROOT, WANTS)
    else:
        world.agent.region_destroy(aw.ROOT, "region0")
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    again = world.host.faults.add(Fault(Effect.CRASH, phase, kind=kind))
    with pytest.raises(SimulatedCrash):
        world.make_agent()
    assert again.reached.is_set()
    assert [t.state for t in world.journal.open_transactions()] == [TransactionState.OPEN]
    world.restart_agent()
    world.settle()
    assert (regions(world), granted(world)) == before
    assert world.journal.open_transactions() == ()


@pytest.mark.parametrize("making", [True, False])
def test_a_kill_beside_any_write_of_the_journal(world, making):
    """All of it happened, where the last write came about, or nothing of it."""
    if not making:
        create(world)
        world.settle()
    before, number, closed = regions(world), 0, False
    while not closed:
        for late in (False, True):
            crash = DyingJournal(world.journal, number, late=late)
            call = world.agent.region_create if making else world.agent.region_destroy
            call(aw.ROOT, WANTS if making else "region0")
            assert crash.struck.wait(aw.DEADLINE_S), number
            world.kill_agent()
            crash.heal()
            world.restart_agent()
            world.settle()
            closed = crash.method == "close" and late
            if closed:
                assert list(regions(world)) == (["region0"] if making else [])
            else:
                assert regions(world) == before, (number, crash.method, late)
            assert world.journal.open_transactions() == ()
        number += 1
    assert number == 7  # begin, extend, two marks for each of two steps, close


class DyingJournal:
    """The agent dies before its `number`th write to the journal, or after it."""

    def __init__(self, journal, number, *, late):
        self.struck = threading.Event()
        self.method = ""
        self._left, self._late, self._journal = number, late, journal
        for name in ("begin", "extend", "mark", "close"):
            setattr(journal, name, partial(self._call, name, getattr(journal, name)))

    def _call(self, name, write, *args):
        here, self._left = self._left == 0, self._left - 1
        if not here:
            return write(*args)
        self.method = name
        if self._late:
            write(*args)
        self.struck.set()
        raise SimulatedCrash

    def heal(self):
        for name in ("begin", "extend", "mark", "close"):
            delattr(self._journal, name)


def test_a_cancelled_job_leaves_nothing(world):
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="online-memory"))
    job = world.agent.region_create(aw.ROOT, WANTS)["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    world.agent.job_cancel(aw.ROOT, job)
    assert world.finish(job)["state"] == "cancelled"
    world.settle()
    assert (regions(world), granted(world)) == ({}, {})
