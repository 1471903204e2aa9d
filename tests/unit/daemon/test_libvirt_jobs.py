"""Guests on which libvirt has a job: busy for requests, spared by plans, placed when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.model.errors import Reason, RefusedError
from virtfabric.model.plan import PinVcpu
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = aw.ROOT
BATCH, WEB, DATABASE = aw.uuid_of(10), aw.uuid_of(50), aw.uuid_of(90)


@pytest.fixture
def world() -> Iterator[Any]:
    yield from aw.world_fixture(sample_interval_s=0.02)


@pytest.fixture
def wide() -> Iterator[Any]:
    yield from aw.world_fixture(cores=4)


def quota(world: Any, name: str) -> int:
    """Milli-CPU."""
    return int(world.live(name).scheduler.global_quota // 100)


@pytest.mark.parametrize("job", ["backup", "dump", "migration-out"])
def test_busy_meanwhile_and_served_at_once_when_it_has_ended(world: Any, job: str) -> None:
    """No event tells that a job begins, and none that a memory-only dump has ended."""
    world.host.set_job(DATABASE, job, told=False)
    before = world.frozen()
    done = world.allocate("database", cpu="+100m")
    assert done["error"]["reason"] == "busy"
    assert job in done["error"]["detail"]
    assert world.frozen() == before
    world.host.set_job(DATABASE, None, told=False)
    assert world.allocate("database", cpu="+100m")["state"] == "done"


def test_a_plan_waits_for_the_job_of_a_guest_that_it_must_move(wide: Any) -> None:
    """The pool shrinks, so web has to leave a pCPU: until it can, nobody else gets that."""
    answer = wide.agent.policy_set(ROOT, "database", {"placement": "dedicated", "cpu": "1:3"})
    assert wide.finish(answer["job"])["state"] == "done"
    wide.host.set_job(WEB, "migration-out", told=False)
    before = wide.frozen()
    refused = wide.allocate("database", cpu="+1", deadline="0.2")
    assert refused["error"]["reason"] == "busy"
    assert "web has a job running: migration-out" in refused["error"]["detail"]
    assert wide.frozen() == before
    wide.host.set_job(WEB, None, told=False)
    assert wide.allocate("database", cpu="+1")["state"] == "done"
    assert not wide.live("database").vcpu_affinity[0] & wide.live("web").vcpu_affinity[0]


def test_a_loan_comes_home_to_a_guest_with_a_job(world: Any) -> None:
    """In the books at once, and in its cap when the job has ended, although nobody tells."""
    own = quota(world, "batch")
    assert world.allocate("database", cpu="+500m")["state"] == "done"
    lent = quota(world, "batch")
    assert lent < own
    world.host.set_job(BATCH, "migration-out", told=False)
    world.host.stop_guest(DATABASE, "migrated")
    aw.eventually(lambda: not world.agent.loans(ROOT), "the loan has ended")
    assert world.guest("batch")["cpu"]["grant"] >= own
    assert quota(world, "batch") == lent
    world.host.set_job(BATCH, None, told=False)
    aw.eventually(lambda: quota(world, "batch") >= own, "the cap follows")


def test_a_guest_that_migrates_in_is_placed_when_it_is_here(world: Any) -> None:
    """Its `started` hook runs long before; it must neither be touched nor keep others waiting."""
    world.host.stop_guest(DATABASE)
    aw.eventually(lambda: not world.guest("database")["cpu"]["grant"], "it is gone")
    xml = f"<domain><name>database</name><uuid>{DATABASE}</uuid></domain>"
    with world.host.lock:  # nobody may see it run without a job
        world.host.start_guest(DATABASE)
        world.host.set_job(DATABASE, "migration-in", told=False)
        world.host.suspend_guest(DATABASE)
    world.agent.hook_notify(ROOT, "database", "started", xml)
    aw.eventually(lambda: world.guest("database")["job"] == "migration-in", "it is seen")
    assert quota(world, "database") < 0
    assert world.agent.drift(ROOT) == []
    assert world.allocate("batch", cpu="-100m")["state"] == "done", "others are served"
    with pytest.raises(RefusedError) as error:
        world.agent.policy_set(ROOT, "database", {"priority": "5"})
    assert error.value.refusal.reason is Reason.BUSY
    world.host.set_job(DATABASE, None, told=False)
    world.host.resume_guest(DATABASE)
    aw.eventually(lambda: quota(world, "database") > 0, "it is capped now")
    assert world.agent.status(ROOT)["alerts"] == []


def test_drift_of_a_guest_with_a_job_is_told_when_it_has_ended(world: Any) -> None:
    """Nothing could be repaired before, and a guest that arrives has not been placed yet."""
    pins = world.live("web").vcpu_affinity
    world.host.set_job(WEB, "migration-out", told=False)
    pin = PinVcpu(guest=WEB, vcpu=0, before=pins[0], after=CpuSet([1]))
    world.host.change_beside(pin)
    assert world.agent.drift(ROOT) == []
    world.host.set_job(WEB, None, told=False)
    assert [d["what"] for d in world.agent.drift(ROOT)] == ["vcpu 0 affinity"]
