"""Plans side by side: they agree on which pCPU is whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.policy import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = aw.ROOT
FIRST, SECOND = "first", "second"


def _spec(number: int, name: str) -> Any:
    return aw.make_spec(number, name, 50, cpu=(1000, 3000), placement=Placement.DEDICATED)


@pytest.fixture
def world() -> Iterator[Any]:
    specs = (_spec(1, FIRST), _spec(2, SECOND))
    for each in aw.world_fixture(specs=specs, cores=6, memory_mib=3000):
        each.settle()
        yield each


def own_cpus(world: aw.AgentWorld, name: str) -> list[int]:
    return sorted(c for cpus in world.live(name).vcpu_affinity.values() for c in cpus)


def ask(world: aw.AgentWorld, name: str, **wants: str) -> str:
    return str(world.agent.allocate(ROOT, name, wants)["job"])


@pytest.mark.parametrize("kind", ["set-vcpu-count", "pin-vcpu"])
def test_dedicated_guests_that_grow_at_once_get_different_cpus(world: Any, kind: str) -> None:
    hold = world.host.faults.add(Fault(Effect.HOLD, Phase.APPLIED, kind=kind, guest=aw.uuid_of(1)))
    first = ask(world, FIRST, cpu="+1")
    assert hold.reached.wait(aw.DEADLINE_S)
    second = ask(world, SECOND, cpu="+1")
    aw.eventually(
        lambda: world.agent.job(ROOT, second)["text"].startswith("waiting:"),
        "the second plan sees the first",
    )
    assert len(own_cpus(world, SECOND)) == 1
    hold.gate.set()
    assert world.finish(first)["state"] == world.finish(second)["state"] == "done"
    mine, its = own_cpus(world, FIRST), own_cpus(world, SECOND)
    assert (len(mine), len(its)) == (2, 2)
    assert not set(mine) & set(its)
    assert world.agent.drift(ROOT) == []


def test_a_plan_that_moves_no_cpu_runs_beside_one_that_does_and_forgets_nothing(world: Any) -> None:
    hold = world.host.faults.add(Fault(Effect.HOLD, kind="resize-virtio-mem"))
    first = ask(world, FIRST, memory="+64M")
    assert hold.reached.wait(aw.DEADLINE_S)
    second = world.finish(ask(world, SECOND, cpu="+1"))
    assert second["state"] == "done", second
    hold.gate.set()
    assert world.finish(first)["state"] == "done"
    holdings = world.agent._ledger.view().books.holdings
    assert sorted(holdings[aw.uuid_of(2)].order) == own_cpus(world, SECOND)
    assert len(own_cpus(world, SECOND)) == 2
    assert world.agent.drift(ROOT) == []
