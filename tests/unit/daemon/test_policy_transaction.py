"""A change of policy is one transaction: metadata, bounds and placement all happen or none does."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.errors import JournalError
from virtfabric.model.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = aw.ROOT
CHANGES = {"placement": "dedicated", "cpu": "1:1", "priority": "95"}
STEPS = (("set-policy", 0), ("set-policy", 1), ("pin-vcpu", 0), ("set-quota", 0))
"""Kind, and how many of it go well before."""


@pytest.fixture
def world() -> Iterator[Any]:
    yield from aw.world_fixture()


def policies(world: Any) -> dict[str, Any]:
    found = world.host.read_guests().values()
    return {g.name: (g.policy, g.policy_text, g.config_policy_text) for g in found}


def everything(world: Any) -> Any:
    return world.frozen(), policies(world)


def change(world: Any, verb: str) -> dict[str, Any]:
    if verb == "set":
        return dict(world.agent.policy_set(ROOT, "database", CHANGES))
    return dict(world.agent.policy_clear(ROOT, "database"))


def test_a_new_policy_is_a_step_of_its_plan(world: Any) -> None:
    answer = change(world, "set")
    assert answer["policy"]["priority"] == 95
    job = world.finish(answer["job"])
    assert job["state"] == "done", job
    steps = world.journal.transaction(job["result"]["txn"]).steps
    assert [s.step.kind for s in steps][-2:] == ["set-policy"] * 2
    assert [s.step.definition for s in steps[-2:]] == ["live", "config"]
    policy, live, config = policies(world)["database"]
    assert policy.priority == 95
    assert live == config != ""
    assert world.agent.drift(ROOT) == []


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY])
@pytest.mark.parametrize("verb", ["set", "clear"])
def test_a_plan_that_fails_takes_the_policy_back(world: Any, verb: str, phase: Phase) -> None:
    for skip in range(2):
        before = everything(world)
        world.host.faults.add(Fault(Effect.FAIL, phase, kind="set-policy", skip=skip))
        job = world.finish(change(world, verb)["job"])
        assert job["state"] == "failed", job
        assert everything(world) == before
        assert world.journal.open_transactions() == ()
        assert world.guest("database")["managed"]


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFIED])
@pytest.mark.parametrize(("kind", "skip"), STEPS)
@pytest.mark.parametrize("verb", ["set", "clear"])
def test_a_crash_takes_the_policy_back_at_the_next_start(
    verb: str, kind: str, skip: int, phase: Phase
) -> None:
    world = aw.AgentWorld().start()
    before = everything(world)
    fault = world.host.faults.add(Fault(Effect.CRASH, phase, kind=kind, skip=skip))
    hook, threading.excepthook = threading.excepthook, lambda _: None
    job = None
    try:
        with contextlib.suppress(JournalError):  # it may be dead before it answers
            job = JobId(change(world, verb)["job"])
        aw.eventually(
            lambda: (
                fault.reached.is_set()
                or (job is not None and world.agent.job(ROOT, job)["state"] != "running")
            ),
            "the crash, or the end of a plan without such a step",
        )
        assert fault.reached.is_set() or (verb, kind) == ("clear", "pin-vcpu")
        if not fault.reached.is_set():
            return
    finally:
        threading.excepthook = hook
    world.kill_agent()
    world.restart_agent()
    try:
        assert world.journal.open_transactions() == ()
        assert everything(world) == before
    finally:
        world.close()


def test_a_policy_that_does_not_fit_is_refused_and_not_written(world: Any) -> None:
    before = everything(world)
    job = world.finish(world.agent.policy_set(ROOT, "batch", {"memory": "4G:8G"})["job"])
    assert job["state"] == "refused", job
    assert everything(world) == before


def test_an_edit_of_the_definition_alone_survives_an_undo(world: Any) -> None:
    """`virsh edit` changes the next start; an undo must not take that back to the live text."""
    uuid = aw.uuid_of(90)
    guest = world.host.guests()[uuid]
    guest.spec = replace(guest.spec, policy=replace(guest.spec.policy, priority=42))
    world.agent.drift(ROOT)
    before = policies(world)["database"]
    assert before[1] != before[2]
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="set-policy", skip=1))
    assert world.finish(change(world, "set")["job"])["state"] == "failed"
    assert policies(world)["database"] == before


def test_an_unmanaged_guest_becomes_managed_in_one_transaction(world: Any) -> None:
    assert world.finish(change(world, "clear")["job"])["state"] == "done"
    assert not world.guest("database")["managed"]
    before = everything(world)
    world.host.faults.add(Fault(Effect.FAIL, Phase.APPLIED, kind="set-policy"))
    assert world.finish(change(world, "set")["job"])["state"] == "failed"
    assert everything(world) == before
    assert world.guest("database")["cpu"]["grant"] is None
    assert world.finish(change(world, "set")["job"])["state"] == "done"
    assert world.guest("database")["cpu"]["grant"] == 1000


def test_a_guest_that_does_not_run_needs_no_plan(world: Any) -> None:
    world.host.stop_guest(aw.uuid_of(90))
    aw.eventually(lambda: world.guest("database")["cpu"]["grant"] is None, "database left")
    answer = change(world, "set")
    assert answer["job"] is None
    assert answer["policy"]["priority"] == 95
    assert policies(world)["database"][0].priority == 95


def test_of_two_changes_at_once_none_is_lost(world: Any) -> None:
    """The second was made from a policy that the first has replaced meanwhile."""
    hold = world.host.faults.add(Fault(Effect.HOLD, Phase.APPLY, kind="set-policy"))
    first = world.agent.policy_set(ROOT, "web", {"priority": "60"})["job"]
    assert hold.reached.wait(aw.DEADLINE_S)
    second = world.agent.policy_set(ROOT, "web", {"shares": "200"})["job"]
    hold.gate.set()
    assert world.finish(first)["state"] == "done"
    late = world.finish(second)
    assert (late["state"], late["error"]["reason"]) == ("refused", "stale")
    policy = policies(world)["web"][0]
    assert (policy.priority, policy.cpu.shares) == (60, 100)
