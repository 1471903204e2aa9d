"""The invariants of architecture.md, over random lives of a whole agent on a simulated host."""

from __future__ import annotations

import random

import agent_world as aw
import pytest

from virtfabric.model.policy import Placement
from virtfabric.model.units import MIB

NAMES = {"batch": 10, "web": 50, "database": 90, "pinned": 70}


def _specs() -> tuple[object, ...]:
    return (
        aw.make_spec(10, "batch", 10, vcpus=2, initial_mib=512),
        aw.make_spec(50, "web", 50, initial_mib=256),
        aw.make_spec(90, "database", 90),
        aw.make_spec(70, "pinned", 70, cpu=(1000, 3000), placement=Placement.DEDICATED),
    )


class Life:
    """Allocate, release, stop, start, stop short, crash: what may never happen, never does."""

    def __init__(self) -> None:
        self.world = aw.AgentWorld(specs=_specs(), cores=6, memory_mib=2600).start()

    def teardown(self) -> None:
        self.world.close()

    def _running(self, name: str) -> bool:
        return bool(self.world.live(name).active)

    def allocate(self, name: str, cpu: str, memory: str, partial: str) -> None:
        wants = {k: v for k, v in (("cpu", cpu), ("memory", memory)) if v}
        if not wants:
            return
        before = self.world.frozen()
        job = self.world.allocate(name, partial=partial, deadline="2", **wants)
        assert job["state"] in ("done", "refused"), job
        if job["state"] == "refused":
            assert self.world.frozen() == before

    def release(self, choice: int) -> None:
        grants = [g["id"] for g in self.world.agent.grants(aw.ROOT)]
        if grants:
            grant = grants[choice % len(grants)]
            job = self.world.finish(self.world.agent.release(aw.ROOT, grant)["job"])
            assert job["state"] == "done", job

    def stop_or_start(self, name: str) -> None:
        uuid = aw.uuid_of(NAMES[name])
        if self._running(name):
            self.world.host.stop_guest(uuid)
            self._until(lambda: self.world.guest(name)["cpu"]["grant"] is None, f"{name} left")
        else:
            # as libvirt does: the hook first, and a refusal keeps the guest down
            state = self.world.live(name)
            if self.world.agent._lifecycle.admission._admit_managed(state, 10.0):
                return
            self.world.host.start_guest(uuid)
            self._until(lambda: self.world.guest(name)["cpu"]["grant"], f"{name} is in")

    def stop_short(self, name: str, mib: int) -> None:
        uuid = aw.uuid_of(NAMES[name])
        self.world.host.faults.gives[uuid] = mib * MIB
        before = self.world.frozen()
        job = self.world.allocate("database", memory="+256M", deadline="1")
        self.world.host.faults.gives.clear()
        if job["state"] != "done":
            assert self.world.frozen() == before

    def _until(self, condition: object, what: str) -> None:
        aw.eventually(condition, what)  # type: ignore[arg-type]
        self._idle()

    def _idle(self) -> None:
        running = lambda: any(j["state"] == "running" for j in self.world.agent.jobs(aw.ROOT))  # noqa: E731
        aw.eventually(lambda: not running() and not self.world.agent.drift(aw.ROOT), "all settles")

    def nobody_is_wronged(self) -> None:
        self._idle()
        guests = [g for g in self.world.agent.guests(aw.ROOT) if g["cpu"]["grant"] is not None]
        for guest in guests:
            for resource in ("cpu", "memory"):
                held = guest[resource]
                assert held["floor"] <= held["grant"] <= held["limit"], guest
        assert sum(g["cpu"]["grant"] for g in guests) <= 6000
        overhead = self.world.overhead_mib * MIB
        assert sum(g["memory"]["grant"] + overhead for g in guests) <= 2600 * MIB

    def no_pcpu_in_two_dedicated_sets(self) -> None:
        states = [g for g in self.world.host.read_guests().values() if g.active]
        own = [g for g in states if g.policy.cpu.placement is Placement.DEDICATED]
        taken = [c for g in own for c in frozenset().union(*g.vcpu_affinity.values())]
        assert len(taken) == len(set(taken))
        for guest in states:
            if guest not in own:
                for cpus in guest.vcpu_affinity.values():
                    assert not cpus & set(taken)

    def journal_and_audit_are_whole(self) -> None:
        aw.eventually(lambda: self.world.journal.open_transactions() == (), "all is ended")
        assert self.world.agent.audit_verify(aw.ROOT, "")["whole"]
        loans = self.world.agent.loans(aw.ROOT)
        # what an admission borrowed has no grant of its own and names its request
        lent = {loan["grant"] for loan in loans if not loan["grant"].startswith("req-")}
        assert lent <= {g["id"] for g in self.world.agent.grants(aw.ROOT)}

    def check(self) -> None:
        self.nobody_is_wronged()
        self.no_pcpu_in_two_dedicated_sets()
        self.journal_and_audit_are_whole()

    def step(self, chance: random.Random) -> object:
        """One thing that may happen to a host; returns what it was."""
        name = chance.choice(sorted(NAMES))
        match chance.choice(("allocate", "allocate", "release", "life", "short")):
            case "allocate":
                cpu = chance.choice(("", "+1", "-1", "+500m", "2", "4"))
                memory = chance.choice(("", "+128M", "-64M", "+512M", "+2M"))
                partial = chance.choice(("yes", "no"))
                self.allocate(name, cpu, memory, partial)
                return name, cpu, memory, partial
            case "release":
                self.release(chance.randrange(1000))
                return "release"
            case "life":
                self.stop_or_start(name)
                return name, "stopped or started"
            case _:
                self.stop_short(name, chance.randrange(64))
                return name, "stops short"


@pytest.mark.parametrize("seed", range(20))
def test_invariants_hold_through_a_random_life(seed: int) -> None:
    """Seeded, so that a failure repeats; the story so far is in the assertion."""
    chance, life, story = random.Random(seed), Life(), []
    try:
        for _ in range(8):
            story.append(life.step(chance))
            life.check()
    except AssertionError as error:
        pytest.fail(f"after {story}: {error}")
    finally:
        life.teardown()


def test_a_victim_of_an_admission_is_capped_at_what_it_still_holds() -> None:
    """A random life found it: the books took CPU from batch at `prepare`, its cap stayed."""
    life = Life()
    try:
        life.stop_or_start("pinned")
        life.allocate("web", "4", "", "no")
        life.allocate("web", "-1", "+2M", "no")
        for name in ("database", "pinned", "database"):
            life.stop_or_start(name)
        life.check()
    finally:
        life.teardown()
