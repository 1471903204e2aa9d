"""What `virsh start` shows when the answer takes too long; and an agent with no thread to spare."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.daemon.jobs import WORKERS
from virtfabric.model.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT_S = 0.05
RETURNING = "memory is returning, retry"


@pytest.fixture
def world() -> Iterator[Any]:
    """Batch has all that is free; the database is off, and so is one that can never fit."""
    specs = (
        aw.make_spec(10, "batch", 10, vcpus=2, initial_mib=1024),
        replace(aw.make_spec(90, "database", 90, initial_mib=512), running=False),
        replace(aw.make_spec(99, "huge", 99, memory_mib=(8192, 8192)), running=False),
    )
    yield from aw.world_fixture(specs=specs)


def hold(world: Any, **what: Any) -> Fault:
    return world.host.faults.add(Fault(Effect.HOLD, **what))  # type: ignore[no-any-return]


def jobs_of(world: Any, title: str) -> list[dict[str, Any]]:
    return [j for j in world.agent.jobs(aw.ROOT) if j["title"] == title]


def test_memory_that_is_called_home_is_named(world: Any) -> None:
    slow = hold(world, kind="resize-virtio-mem", guest=aw.uuid_of(10))
    assert world.virsh_start("database", wait_s=SHORT_S)
    assert slow.reached.wait(5)
    assert world.virsh_start("database", wait_s=SHORT_S) == f"virtfabric: database: {RETURNING}"
    assert len(jobs_of(world, "admission of database")) == 1, "the second try goes on with it"
    slow.gate.set()
    world.settle()
    assert world.virsh_start("database") == ""


def test_another_plan_is_named_and_what_is_lacking(world: Any) -> None:
    slow = hold(world, kind="set-quota", guest=aw.uuid_of(10))
    job = world.agent.allocate(aw.ROOT, "batch", {"cpu": "-100m"})["job"]
    assert slow.reached.wait(5)
    assert world.virsh_start("huge", wait_s=SHORT_S)
    aw.eventually(lambda: any(j["text"] for j in jobs_of(world, "admission of huge")), "it waits")
    line = world.virsh_start("huge", wait_s=SHORT_S)
    assert line.startswith("virtfabric: huge: waiting for another plan (")
    assert "huge: cpu: needs 0.5" in line
    assert RETURNING not in line
    slow.gate.set()
    assert world.finish(job)["state"] == "done"


@contextlib.contextmanager
def every_thread_taken(world: Any) -> Iterator[None]:
    gate = threading.Event()
    for _ in range(WORKERS):
        world.agent._jobs.start("long", lambda _, __: {"open": gate.wait(aw.DEADLINE_S)})
    try:
        yield
    finally:
        gate.set()


def test_a_full_agent_says_so(world: Any) -> None:
    with every_thread_taken(world):
        line = world.virsh_start("database", wait_s=SHORT_S)
    assert line == "virtfabric: database: the agent is busy with other jobs, retry"
    world.settle()
    assert world.virsh_start("database") == ""


def test_a_memory_move_that_is_being_undone_does_not_return(world: Any) -> None:
    stuck = hold(world, kind="set-quota", guest=aw.uuid_of(10))
    undo = hold(world, phase=Phase.UNDO, kind="resize-virtio-mem")
    assert world.virsh_start("database", wait_s=SHORT_S)
    assert stuck.reached.wait(5), "memory is home, the cap is next"
    (job,) = jobs_of(world, "admission of database")
    world.agent.job_cancel(aw.ROOT, JobId(job["id"]))
    assert undo.reached.wait(5)
    line = world.virsh_start("database", wait_s=SHORT_S)
    assert "undoing" in line
    assert RETURNING not in line
    undo.gate.set()
    assert world.finish(job["id"])["state"] == "cancelled"


def test_more_policies_at_once_than_threads_do_not_stop_the_agent(world: Any) -> None:
    """Each may follow its policy with a second job, and wait for it."""
    with every_thread_taken(world):
        jobs = [
            world.agent.policy_set(aw.ROOT, "batch", {"shares": str(200 + n)})["job"]
            for n in range(2 * WORKERS)
        ]
    ended = [world.finish(job) for job in jobs]
    # all were made from the same policy, which is another one once the first is done
    assert [job["state"] for job in ended].count("done") == 1
    assert {job["error"]["reason"] for job in ended if job["error"]} == {"stale"}
