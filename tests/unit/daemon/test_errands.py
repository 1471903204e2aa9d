"""One guest's errands keep their order; different guests do not wait for each other."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault
from virtfabric.daemon.errands import Errands
from virtfabric.model.errors import HypervisorGoneError
from virtfabric.model.plan import PinVcpu
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 10.0
ROOT = aw.ROOT


@pytest.fixture
def errands() -> Iterator[Errands]:
    found = Errands(workers=2)
    yield found
    found.close()


def test_order_is_kept_for_a_key(errands: Errands) -> None:
    seen: list[int] = []
    for number in range(200):
        errands.put("web", lambda n=number: seen.append(n))
    assert errands.flush("web", WAIT_S)
    assert seen == list(range(200))


def test_one_that_waits_holds_up_its_own_key_only(errands: Errands) -> None:
    gate = threading.Event()
    behind = [errands.put("web", lambda: gate.wait(WAIT_S)), errands.put("web", lambda: None)]
    assert errands.flush("database", WAIT_S)
    assert not errands.flush("web", 0.01)
    assert not any(done.is_set() for done in behind)
    gate.set()
    assert errands.flush("web", WAIT_S)


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (HypervisorGoneError("no libvirtd"), logging.WARNING),
        (KeyError("a defect"), logging.ERROR),
    ],
)
def test_one_that_fails_ends_nothing(
    errands: Errands, caplog: pytest.LogCaptureFixture, error: Exception, level: int
) -> None:
    def fail() -> None:
        raise error

    assert errands.put("web", fail).wait(WAIT_S)
    assert [r.levelno for r in caplog.records] == [level]
    assert errands.flush("web", WAIT_S)


def test_close_finishes_what_is_queued_also_what_that_queues() -> None:
    errands, seen = Errands(workers=2), []

    def more() -> None:
        errands.put("web", lambda: seen.append("late")).wait(WAIT_S)
        seen.append("host")

    gate = threading.Event()
    errands.put(None, lambda: gate.wait(WAIT_S))
    errands.put(None, more)
    closing = threading.Thread(target=errands.close)
    closing.start()
    gate.set()
    closing.join(WAIT_S)
    assert seen == ["late", "host"]
    assert errands.put("web", lambda: seen.append("never")).is_set()
    assert seen == ["late", "host"]


@pytest.fixture
def world() -> Iterator[Any]:
    yield from aw.world_fixture()


def make_busy(world: Any) -> tuple[Fault, str]:
    """A plan works on `database`, and there is something to place on it."""
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
    job = world.agent.allocate(ROOT, "database", {"memory": "+64M", "deadline": "60"})["job"]
    assert hold.reached.wait(WAIT_S)
    database = world.live("database")
    world.host.suspend_guest(database.uuid)
    pin = PinVcpu(guest=database.uuid, vcpu=0, before=database.vcpu_affinity[0], after=CpuSet([1]))
    world.host.change_beside(pin)
    world.host.resume_guest(database.uuid)
    return hold, job


@pytest.mark.parametrize("left_before", [True, False])
def test_a_guest_that_starts_does_not_wait_for_a_busy_one(world: Any, left_before: bool) -> None:
    """The settling of a busy guest waits up to 30 s for its plan; so does the pool for all."""
    back = world.live("database").vcpu_affinity
    if left_before:
        stop_web(world)
        world.settle()
    hold, job = make_busy(world)
    if not left_before:
        stop_web(world)
    world.host.start_guest(aw.uuid_of(50))
    aw.eventually(lambda: world.live("web").scheduler.global_quota > 0, "web is placed")
    assert world.agent.job(ROOT, job)["state"] == "running"
    hold.gate.set()
    assert world.finish(job)["state"] == "done"
    aw.eventually(lambda: world.live("database").vcpu_affinity == back, "database is placed")


def stop_web(world: Any) -> None:
    world.host.stop_guest(aw.uuid_of(50))
    aw.eventually(lambda: world.guest("web")["cpu"]["grant"] is None, "web left")
