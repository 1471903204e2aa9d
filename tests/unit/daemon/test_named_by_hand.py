"""A function that a guest's XML names with managed='no': bound at `prepare`, back at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.devices import SimulatedFunction
from virtfabric.adapters.simulated.faults import Effect, Fault
from virtfabric.model.device import (
    DevicePool,
    GuestDevice,
    HostUse,
    Match,
    PciAddress,
    PciFunction,
    UseKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE = aw.uuid_of(90)
NIC = PciAddress("0000:3b:00.0")
HOSTDEV = (
    "<hostdev mode='subsystem' type='pci' managed='no'><source>"
    "<address domain='0x0000' bus='0x3b' slot='0x00' function='0x0'/></source></hostdev>"
)


@pytest.fixture
def world() -> Iterator[aw.AgentWorld]:
    idle = replace(
        aw.make_spec(90, "database", 90), running=False,
        functions=(GuestDevice(NIC),),
    )  # fmt: skip
    specs = (*(s for s in aw.default_specs() if s.uuid != DATABASE), idle)
    nic = SimulatedFunction(PciFunction(NIC, driver="ixgbe", group=7, resets=("flr",)))
    pool = DevicePool("net.vf", Match(ids=frozenset({nic.shown.ids})))
    yield from aw.world_fixture(specs=specs, functions=(nic,), settings={"pools": (pool,)})


def prepare(world: aw.AgentWorld) -> str:
    xml = aw.format_prepare(world.spec("database"))
    return world.agent.hook_prepare(
        aw.ROOT, xml.replace("<devices>", f"<devices>{HOSTDEV}"), wait_s=5.0
    )


def driver(world: aw.AgentWorld) -> str | None:
    return world.host.devices.read_functions()[NIC].driver


def test_bound_before_it_starts_and_given_back_when_it_ended(world: aw.AgentWorld) -> None:
    assert prepare(world) == ""
    assert driver(world) == "vfio-pci"
    world.host.start_guest(DATABASE)
    world.settle()
    assert driver(world) == "vfio-pci"
    world.host.stop_guest(DATABASE)
    world.settle()
    assert driver(world) == "ixgbe"


def test_it_is_reset_before_the_host_has_it_again(world: aw.AgentWorld) -> None:
    running(world)
    assert world.host.devices.find(NIC).dirty
    world.host.stop_guest(DATABASE)
    world.settle()
    assert not world.host.devices.find(NIC).dirty
    records = world.agent.audit(aw.ROOT, 0, "")
    title = "functions named by database go back"
    steps = [
        r["body"]["steps"] for r in records
        if r["kind"] == "plan.committed" and r["body"]["title"] == title
    ]  # fmt: skip
    assert steps == [[f"database: reset {NIC}", f"database: {NIC} driver vfio-pci -> ixgbe"]]


def test_a_reset_that_fails_is_quarantine(world: aw.AgentWorld) -> None:
    running(world)
    world.host.faults.add(Fault(Effect.FAIL, kind="reset-function"))
    world.host.stop_guest(DATABASE)
    world.settle()
    assert "failed: database: reset" in shown(world)["quarantine"]["why"]
    assert driver(world) == "ixgbe"
    assert "is in quarantine" in prepare(world)


def test_what_the_host_uses_is_refused_and_left_alone(world: aw.AgentWorld) -> None:
    world.host.devices.change(NIC, uses=(HostUse(UseKind.NETWORK, "eth0 is up"),))
    assert "device-in-use: the host uses 0000:3b:00.0" in prepare(world)
    assert driver(world) == "ixgbe"


def running(world: aw.AgentWorld) -> None:
    assert prepare(world) == ""
    world.host.start_guest(DATABASE)
    world.settle()


def shown(world: aw.AgentWorld) -> dict[str, Any]:
    return next(f for f in world.agent.devices(aw.ROOT) if f["address"] == NIC)


def test_who_has_it_is_shown_before_and_after_it_runs(world: aw.AgentWorld) -> None:
    assert prepare(world) == ""
    view = {"address": NIC, "capability": None, "attached": False, "ours": False}
    assert (shown(world)["holder"], world.guest("database")["devices"]) == ("database", [view])
    world.host.start_guest(DATABASE)
    world.settle()
    view["attached"] = True
    assert (shown(world)["holder"], world.guest("database")["devices"]) == ("database", [view])


def test_nobody_else_is_given_it(world: aw.AgentWorld) -> None:
    running(world)
    job = world.finish(world.agent.allocate(aw.ROOT, "web", {"device:net.vf": "1"})["job"])
    assert job["state"] == "refused"
    assert world.functions_of("web") == []


def test_a_guest_that_halts_with_one_is_told(world: aw.AgentWorld) -> None:
    running(world)
    world.host.halt_guest(DATABASE)
    world.settle()
    assert any("was stopped by an error while it had" in a for a in alerts(world))


@pytest.mark.parametrize("by", ["virsh", "clear"])
def test_one_that_becomes_unmanaged_keeps_it_and_the_way_back(
    world: aw.AgentWorld, by: str
) -> None:
    running(world)
    if by == "clear":
        job = world.finish(world.agent.policy_clear(aw.ROOT, "database")["job"])
        assert job["state"] == "done", job
    else:
        world.host.write_policy(DATABASE, None)
    world.settle()
    entry = shown(world)["quarantine"]
    assert entry["why"] == "database became unmanaged while it had it"
    assert driver(world) == "vfio-pci"
    world.host.stop_guest(DATABASE)
    world.agent._lifecycle.enqueue(world.agent._rounds.look_over)
    world.settle()
    assert driver(world) == "ixgbe"
    assert shown(world)["quarantine"] is None


def alerts(world: aw.AgentWorld) -> list[str]:
    return list(world.agent.status(aw.ROOT)["alerts"])
