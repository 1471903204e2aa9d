"""Regions come and go while guests are given CXL memory and give it back, all at once."""

from __future__ import annotations

import random
import threading
from collections import Counter

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.machines import small_cxl
from virtfabric.model.errors import RefusedError

BOTH = ("dram", "cxl")
GUESTS = {"db": 90, "cache": 70, "batch": 10}
REGIONS = (("decoder0.0", "0x100"), ("decoder0.1", "0x102"), ("decoder0.2", "0x101,0x103"))


class Crowd:
    """Callers side by side, and somebody who looks at the kernel's side all the while.

    Attributes:
        ends: how often what ended how.
        lost: memory of guests on nodes that are not there, as it was seen.
    """

    def __init__(self, seed: int) -> None:
        specs = [aw.make_spec(p, name, p, tiers=BOTH) for name, p in GUESTS.items()]
        self.world = aw.AgentWorld(specs=tuple(specs), cxl=small_cxl(), memory_mib=4000).start()
        self.seed = seed
        self.ends: Counter[tuple[str, str]] = Counter()
        self.lost: list[tuple[str, str]] = []
        self._over = threading.Event()

    def run(self) -> None:
        callers = [threading.Thread(target=self._call, args=(n,)) for n in range(3)]
        watcher = threading.Thread(target=self._watch)
        for thread in (watcher, *callers):
            thread.start()
        for thread in callers:
            thread.join()
        self._over.set()
        watcher.join()

    def _call(self, number: int) -> None:
        draw = random.Random(f"{self.seed}-{number}")
        for _ in range(60):
            what = draw.choice(["make", "end", "end", "give", "give", "release", "release"])
            try:
                job = self._ask(what, draw)
            except RefusedError as error:
                self.ends[what, error.refusal.reason] += 1
                continue
            if job is not None:
                self.ends[what, self.world.finish(job)["state"]] += 1

    def _ask(self, what: str, draw: random.Random) -> str | None:
        agent = self.world.agent
        if what == "make":
            window, memdevs = draw.choice(REGIONS)
            return agent.region_create(aw.ROOT, {"window": window, "memdevs": memdevs})["job"]
        if what == "end":
            return agent.region_destroy(aw.ROOT, f"region{draw.randrange(3)}")["job"]
        if what == "give":
            wants = {"memory": draw.choice(["+256M", "+64M"]), "tier": "cxl", "deadline": "2"}
            return agent.allocate(aw.ROOT, draw.choice(list(GUESTS)), wants)["job"]
        grants = agent.grants(aw.ROOT)
        return agent.release(aw.ROOT, draw.choice(grants)["id"])["job"] if grants else None

    def _watch(self) -> None:
        host = self.world.host
        while not self._over.wait(0.001):
            with host.lock:
                nodes = host.memory.nodes().keys()
                self.lost += [
                    (guest.name, device.alias)
                    for guest in host.read_guests().values()
                    for device in guest.virtio_mem
                    if device.requested and not device.host_nodes <= nodes | {0}
                ]


@pytest.mark.parametrize("seed", range(3))
def test_no_guest_has_memory_on_a_node_that_is_gone(seed):
    crowd = Crowd(seed)
    try:
        crowd.run()
        crowd.world.settle()
        assert crowd.lost == []
        assert not [end for end in crowd.ends if end[1] in ("failed", "cancelled")], crowd.ends
        assert crowd.ends["make", "done"], crowd.ends
        assert crowd.ends["give", "done"], crowd.ends
        assert crowd.world.journal.open_transactions() == ()
        assert crowd.world.agent.host(aw.ROOT)["withheld"] == {}
    finally:
        crowd.world.close()
