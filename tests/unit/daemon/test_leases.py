"""A lease ends on time, whatever libvirt's listing calls wait for."""

from __future__ import annotations

import threading
import time
from typing import Any

import agent_world as aw

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


def test_a_lease_ends_while_a_sample_is_held_up() -> None:
    world = aw.AgentWorld(sample_interval_s=0.02)
    stats = BlockingStats()
    world.agent.close()
    world.host.stats = stats  # type: ignore[assignment]
    world.agent = world.make_agent()
    try:
        world.start()
        assert stats.asked.wait(aw.DEADLINE_S)
        job = world.allocate("database", **{"memory": "+64M", "for": "1s"})
        assert job["state"] == "done", job
        (grant,) = world.agent.grants(ROOT)
        aw.eventually(lambda: not world.agent.grants(ROOT), "the lease ends")
        assert grant["expires"] <= time.time() < grant["expires"] + 2
        assert not stats.hook_ended.is_set()
    finally:
        stats.hook_ended.set()
        world.close()


def test_an_expired_lease_is_ended_once() -> None:
    world = aw.AgentWorld().start()
    try:
        assert world.allocate("database", **{"memory": "+64M", "for": "1s"})["state"] == "done"
        aw.eventually(lambda: not world.agent.grants(ROOT), "the lease ends")
        titles = [j["title"] for j in world.agent.jobs(ROOT)]
        assert len([t for t in titles if t.startswith("release of")]) == 1
    finally:
        world.close()
