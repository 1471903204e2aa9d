"""`policy clear` while the guest is settled in: it ends without a hand of ours on the guest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault
from virtfabric.model.mark import PinMark
from virtfabric.ports import EventKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId

ROOT = aw.ROOT
UUID = aw.uuid_of(90)


@pytest.fixture
def world() -> Iterator[Any]:
    yield from aw.world_fixture()


class SlowAnswer:
    """One answer of libvirt that was true when it was given, and arrives late."""

    def __init__(self, world: aw.AgentWorld) -> None:
        self._read = world.host.read_guest
        self._first = threading.Semaphore(1)
        self.given = threading.Event()
        self.arrives = threading.Event()
        world.host.read_guest = self  # type: ignore[method-assign]

    def __call__(self, guest: GuestId) -> GuestState | None:
        answer = self._read(guest)
        if guest == UUID and self._first.acquire(blocking=False):
            self.given.set()
            assert self.arrives.wait(aw.DEADLINE_S)
        return answer


def assert_untouched(world: aw.AgentWorld) -> None:
    live, kernel = world.live("database"), world.host.kernel(UUID)
    assert kernel is not None
    assert live.policy is None
    assert (kernel.quota_us, kernel.mark) == (-1, PinMark())
    assert set(kernel.affinity.values()) == {world.topology.cpus}
    assert world.guest("database")["cpu"]["grant"] is None
    assert UUID not in world.agent._ledger.view().books.holdings


def test_an_old_look_at_the_guest_does_not_adopt_it_again(world: Any) -> None:
    world.settle()
    answer = SlowAnswer(world)
    world.host.tell(EventKind.RESUMED, UUID)
    assert answer.given.wait(aw.DEADLINE_S)
    job = world.finish(world.agent.policy_clear(ROOT, "database")["job"])
    assert job["state"] == "done", job
    answer.arrives.set()
    world.settle()
    assert_untouched(world)
    titles = [r.body["title"] for r in world.audit.read() if r.kind == "plan.committed"]
    lifted = titles.index("lift of database")
    assert not [t for t in titles[lifted:] if t.endswith("of database") and "lift" not in t]


def test_a_guest_that_is_being_adopted_is_lifted_afterwards() -> None:
    world = aw.AgentWorld(specs=(aw.make_spec(90, "database", 90, running=False),)).start()
    try:
        world.settle()
        hold = world.host.faults.add(Fault(Effect.HOLD, kind="set-quota"))
        world.host.start_guest(UUID)  # nobody asked the hook
        assert hold.reached.wait(aw.DEADLINE_S)
        job = world.agent.policy_clear(ROOT, "database")["job"]
        hold.gate.set()
        assert job is not None
        assert world.finish(job)["state"] == "done"
        world.settle()
        assert_untouched(world)
    finally:
        world.close()


def test_a_guest_cleared_before_its_adoption_is_not_adopted() -> None:
    world = aw.AgentWorld(specs=(aw.make_spec(90, "database", 90, running=False),)).start()
    try:
        world.settle()
        answer = SlowAnswer(world)
        world.host.start_guest(UUID)
        assert answer.given.wait(aw.DEADLINE_S)
        job = world.finish(world.agent.policy_clear(ROOT, "database")["job"])
        assert job["state"] == "done", job
        answer.arrives.set()
        world.settle()
        assert_untouched(world)
        assert world.agent.health(ROOT)["alerts"] == []
    finally:
        world.close()
