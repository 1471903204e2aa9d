"""A lease ends on time, whatever libvirt's listing calls wait for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault
from virtfabric.model.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.ids import GuestId

ROOT = aw.ROOT


class BlockingStats:
    """As libvirt's listing calls while some guest's hook runs: no answer until it ends."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.hook_ended = threading.Event()

    def sample(self) -> dict[Any, Any]:
        self.asked.set()
        self.hook_ended.wait(60)
        return {}

    def read_report(self, guest: GuestId) -> None:
        return None


@pytest.fixture
def held_up() -> Iterator[tuple[aw.AgentWorld, BlockingStats]]:
    """An agent whose sample libvirt does not answer."""
    world = aw.AgentWorld(sample_interval_s=0.02)
    stats = BlockingStats()
    world.agent.close()
    world.host.stats = stats  # type: ignore[assignment]
    world.agent = world.make_agent()
    try:
        world.start()
        assert stats.asked.wait(aw.DEADLINE_S)
        yield world, stats
    finally:
        stats.hook_ended.set()
        world.close()


def test_a_lease_ends_while_a_sample_is_held_up(held_up: Any) -> None:
    world, stats = held_up
    job = world.allocate("database", **{"memory": "+64M", "for": "1s"})
    assert job["state"] == "done", job
    (grant,) = world.agent.grants(ROOT)
    aw.eventually(lambda: not world.agent.grants(ROOT), "the lease ends")
    assert grant["expires"] <= time.time() < grant["expires"] + 2
    assert not stats.hook_ended.is_set()


def test_the_agent_stops_while_a_sample_is_held_up(held_up: Any) -> None:
    world, stats = held_up
    stopping = threading.Thread(target=world.close)
    stopping.start()
    stopping.join(aw.DEADLINE_S)
    assert not stopping.is_alive()
    assert not stats.hook_ended.is_set()
    assert world.audit.read()[-1].kind == "agent.stopped"


def test_an_expired_lease_is_ended_once() -> None:
    world = aw.AgentWorld().start()
    try:
        assert world.allocate("database", **{"memory": "+64M", "for": "1s"})["state"] == "done"
        aw.eventually(lambda: not world.agent.grants(ROOT), "the lease ends")
        titles = [j["title"] for j in world.agent.jobs(ROOT)]
        assert len([t for t in titles if t.startswith("release of")]) == 1
    finally:
        world.close()


def test_a_grant_that_is_released_twice_at_once_ends_once() -> None:
    world = aw.AgentWorld().start()
    try:
        world.settle()
        for more in ("+256M", "+128M"):
            assert world.allocate("database", memory=more)["state"] == "done"
        before = world.guest("database")["memory"]["grant"]
        grant = next(
            g["id"] for g in world.agent.grants(ROOT) if g["amounts"]["memory"] == 256 * MIB
        )
        hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
        first = world.agent.release(ROOT, grant)["job"]
        assert hold.reached.wait(aw.DEADLINE_S)
        second = world.agent.release(ROOT, grant)["job"]
        aw.eventually(
            lambda: world.agent.job(ROOT, second)["text"].startswith("waiting"),
            "the second waits for the first",
        )
        hold.gate.set()
        assert world.finish(first)["state"] == "done"
        done = world.finish(second)
        assert done["state"] == "refused"
        assert done["error"]["reason"] == "unknown-id"
        assert world.guest("database")["memory"]["grant"] == before - 256 * MIB
        (left,) = world.agent.grants(ROOT)
        assert left["amounts"]["memory"] == 128 * MIB
    finally:
        world.close()
