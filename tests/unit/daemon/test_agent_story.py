"""The facade end to end on a simulated host: allocate, refuse, release, recover, hooks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase, SimulatedCrash
from virtfabric.model.errors import InvalidValueError, RefusedError
from virtfabric.model.ids import JobId
from virtfabric.model.mark import MARK_NAMESPACE
from virtfabric.model.plan import PinVcpu
from virtfabric.model.units import MIB, CpuSet
from virtfabric.ports import EventKind

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = aw.ROOT


@pytest.fixture
def world() -> Iterator[Any]:
    yield from aw.world_fixture()


def test_running_guests_are_found_capped_and_pinned(world: Any) -> None:
    batch = world.guest("batch")
    assert batch["managed"]
    assert batch["cpu"]["grant"] == 1000 or batch["cpu"]["grant"] > 500
    total = sum(g["cpu"]["grant"] for g in world.agent.guests(ROOT))
    assert total <= 2000
    for name in ("batch", "web", "database"):
        assert world.live(name).scheduler.global_quota > 0
    assert world.agent.drift(ROOT) == []


def test_the_lowest_priority_pays_and_the_loan_goes_home(world: Any) -> None:
    before = world.frozen()
    job = world.allocate("database", cpu="+500m", memory="+512M")
    assert job["state"] == "done", job
    result = job["result"]
    assert {p["name"] for p in result["paid"]} <= {"batch"}
    assert world.guest("database")["memory"]["current"] >= 768 * MIB
    assert world.agent.loans(ROOT)
    done = world.finish(world.agent.release(ROOT, result["grant"])["job"])
    assert done["state"] == "done", done
    assert world.agent.loans(ROOT) == []
    assert world.agent.grants(ROOT) == []
    after = world.frozen()
    assert {n: s[4:6] for n, s in after.items()} == {n: s[4:6] for n, s in before.items()}


def test_a_refusal_names_reason_and_changes_nothing(world: Any) -> None:
    before = world.frozen()
    job = world.allocate("batch", memory="+512M")
    assert job["state"] == "refused"
    assert job["error"]["reason"] == "no-capacity"
    assert job["error"]["detail"]
    assert world.frozen() == before


def test_dry_run_equals_the_journalled_plan(world: Any) -> None:
    plan = world.agent.plan(ROOT, "database", {"cpu": "+500m", "memory": "+256M"})
    job = world.allocate("database", cpu="+500m", memory="+256M")
    txn = world.journal.transaction(job["result"]["txn"])
    assert [s.step.to_json() for s in txn.steps] == [s["data"] for s in plan["steps"]]


def test_a_victim_that_stops_short_is_topped_up_or_all_is_undone(world: Any) -> None:
    before = world.frozen()
    world.host.faults.gives[aw.uuid_of(10)] = 64 * MIB
    job = world.allocate("database", memory="+768M", deadline="2")
    if job["state"] == "done":
        assert {p["name"] for p in job["result"]["paid"]} == {"batch", "web"}
    else:
        assert job["error"]["reason"] == "guest-uncooperative"
        world.host.faults.clear()
        assert world.frozen() == before


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY])
@pytest.mark.parametrize("skip", range(8))
def test_a_failing_step_undoes_everything(world: Any, phase: Phase, skip: int) -> None:
    before = world.frozen()
    world.host.faults.add(Fault(Effect.FAIL, phase, skip=skip))
    job = world.allocate("database", cpu="+500m", memory="+512M")
    if job["state"] == "failed":
        assert world.frozen() == before
        assert world.journal.open_transactions() == ()
    else:
        assert job["state"] == "done"  # the plan had fewer steps than that


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFIED])
@pytest.mark.parametrize("skip", range(6))
def test_a_crash_in_mid_plan_is_undone_at_the_next_start(phase: Phase, skip: int) -> None:
    world = aw.AgentWorld().start()
    before = world.frozen()
    fault = world.host.faults.add(Fault(Effect.CRASH, phase, skip=skip))
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        wants = {"cpu": "+500m", "memory": "+512M"}
        job = JobId(world.agent.allocate(ROOT, "database", wants)["job"])
        aw.eventually(
            lambda: fault.reached.is_set() or world.agent.job(ROOT, job)["state"] != "running",
            "the crash, or the end of a plan with fewer steps",
        )
        if not fault.reached.is_set():
            return
    finally:
        threading.excepthook = hook
    aw.eventually(lambda: world.journal.open_transactions(), "the journal shows the cut-off plan")
    world.kill_agent()
    world.restart_agent()
    assert world.journal.open_transactions() == ()
    assert world.frozen() == before
    assert any(r.kind == "plan.recovered" for r in world.audit.read())
    world.close()


def test_a_crash_is_not_an_error() -> None:
    assert not issubclass(SimulatedCrash, Exception)


def test_cancel_undoes(world: Any) -> None:
    before = world.frozen()
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
    job = world.agent.allocate(ROOT, "database", {"memory": "+512M"})["job"]
    assert hold.reached.wait(5)
    world.agent.job_cancel(ROOT, JobId(job))
    done = world.finish(job)
    assert done["state"] == "cancelled"
    assert world.frozen() == before


def test_a_hook_is_answered_while_a_memory_move_runs(world: Any) -> None:
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
    job = world.agent.allocate(ROOT, "database", {"memory": "+64M"})["job"]
    assert hold.reached.wait(5)
    assert world.agent.hook_prepare(ROOT, "<domain><name>x</name></domain>", wait_s=1) != "boom"
    assert world.agent.status(ROOT)["guests"]
    hold.gate.set()
    assert world.finish(job)["state"] == "done"


def test_two_racing_for_the_last_capacity(world: Any) -> None:
    jobs = [world.agent.allocate(ROOT, n, {"memory": "+256M"}) for n in ("database", "database")]
    states = sorted(world.finish(j["job"])["state"] for j in jobs)
    assert set(states) <= {"done", "refused"}
    held = sum(g["memory"]["grant"] for g in world.agent.guests(ROOT))
    assert held <= world.memory_mib * MIB


def test_who_may(world: Any) -> None:
    with pytest.raises(RefusedError, match="not-allowed"):
        world.agent.allocate(aw.NOBODY, "database", {"cpu": "+1"})
    with pytest.raises(RefusedError, match="above-ceiling"):
        world.agent.policy_set(aw.ALICE, "web", {"priority": "51"})
    with pytest.raises(RefusedError, match="above-ceiling"):
        world.agent.allocate(aw.ALICE, "web", {"cpu": "2"})
    with pytest.raises(RefusedError, match="not-allowed"):
        world.agent.hook_prepare(aw.ALICE, "<domain/>", wait_s=1)
    assert len([r for r in world.audit.read() if r.kind == "access.denied"]) == 4


@pytest.mark.parametrize(
    ("wants", "field"),
    [
        ({"cpu": "x"}, "cpu"),
        ({"cpu": "-"}, "cpu"),
        ({"memory": "1Q"}, "memory"),
        ({"memory": "99999999999999999G"}, "memory"),
        ({"colour": "red"}, "request"),
        ({}, "request"),
        ({"cpu": "+1", "for": "soon"}, "for"),
        ({"cpu": "+1", "partial": "maybe"}, "partial"),
        ({"cpu": "+0"}, "cpu"),
    ],
)
def test_bad_words_name_the_field(world: Any, wants: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        world.agent.allocate(ROOT, "database", wants)
    assert caught.value.field == field


def test_unknown_and_unmanaged_guests(world: Any) -> None:
    with pytest.raises(RefusedError, match="unknown-guest"):
        world.agent.allocate(ROOT, "nobody", {"cpu": "+1"})
    done = world.agent.policy_clear(ROOT, "web")
    assert world.finish(done["job"])["state"] == "done"
    assert world.allocate("web", cpu="+1")["error"]["reason"] == "unmanaged-guest"
    assert world.live("web").scheduler.global_quota < 0


def test_a_guest_that_stops_sends_loans_home(world: Any) -> None:
    before = world.frozen()["batch"]
    assert world.allocate("database", memory="+512M")["state"] == "done"
    world.host.stop_guest(aw.uuid_of(90))
    aw.eventually(lambda: not world.agent.loans(ROOT), "loans go home")
    aw.eventually(lambda: world.frozen()["batch"][5] == before[5], "batch has its memory again")


def test_drift_is_reported_and_repaired(world: Any) -> None:
    state = world.live("web")
    pin = PinVcpu(guest=state.uuid, vcpu=0, before=state.vcpu_affinity[0], after=CpuSet([1]))
    world.host.change_beside(pin)
    aw.eventually(lambda: world.agent.drift(ROOT), "the drift shows")
    assert world.finish(world.agent.drift_repair(ROOT)["job"])["state"] == "done"
    assert world.agent.drift(ROOT) == []


def test_the_agents_mark_brings_no_second_plan(world: Any) -> None:
    marked = [str(world.live(name).marked_pins) for name in ("batch", "web", "database")]
    assert all("emulator=" in mark for mark in marked)
    again = world.finish(world.agent.drift_repair(ROOT)["job"])
    assert (again["state"], again["result"]["steps"]) == ("done", [])


def test_the_event_of_the_agents_own_mark_is_not_followed(world: Any) -> None:
    """Else each mark would have its guest read again, and a bad one would never end."""

    def work_off() -> None:
        world.host.events.drain()
        assert world.agent._lifecycle._errands.drain(aw.DEADLINE_S)

    def known_shares() -> int | None:
        return world.agent._observatory.guest(database).scheduler.shares

    database = aw.uuid_of(90)
    work_off()
    before = known_shares()
    found = world.host.running(database)
    found.said.shares = found.real.shares = 7  # beside the agent, and nobody tells it
    world.host.tell(EventKind.METADATA, database, MARK_NAMESPACE)
    work_off()
    assert known_shares() == before != 7
    world.host.tell(EventKind.METADATA, database, "urn:somebody:else")
    work_off()
    assert known_shares() == 7


def test_explain_tells_the_story(world: Any) -> None:
    job = world.allocate("database", cpu="+500m", memory="+512M")
    story = world.agent.explain(ROOT, job["result"]["grant"])
    text = "\n".join(story["lines"])
    assert "batch pays" in text
    assert "done and verified" in text


def test_policy_moves_a_guest_to_dedicated(world: Any) -> None:
    answer = world.agent.policy_set(ROOT, "database", {"placement": "dedicated", "cpu": "1:1"})
    assert world.finish(answer["job"])["state"] == "done"
    database, web = world.live("database"), world.live("web")
    own = database.vcpu_affinity[0]
    assert len(own) == 1
    assert not own & web.vcpu_affinity[0]


def test_audit_is_whole(world: Any) -> None:
    world.allocate("database", cpu="+100m")
    assert world.agent.audit_verify(ROOT, "")["whole"]
