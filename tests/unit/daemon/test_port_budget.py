"""A policy that asks for more functions than the guest has ports: told before it is too late."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import agent_world as aw
import pytest

from virtfabric.model.policy import Admission, DevicePolicy
from virtfabric.policy.portbudget import missing_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.adapters.simulated.guest import GuestSpec

DATABASE = aw.uuid_of(90)


def with_devices(
    spec: GuestSpec, count: int, admission: Admission = Admission.LAX, *, running: bool = True
) -> GuestSpec:
    assert spec.policy is not None
    devices = (DevicePolicy("net.vf", count - 1), DevicePolicy("crypto.aes", 1))
    policy = replace(spec.policy, devices=devices, admission=admission)
    return replace(spec, policy=policy, running=running)


@pytest.fixture
def world() -> Iterator[aw.AgentWorld]:
    specs = [s for s in aw.default_specs() if s.uuid != DATABASE]
    stopped = with_devices(aw.make_spec(90, "database", 90), 3, running=False)
    yield from aw.world_fixture(specs=(*specs, stopped))


def prepare(world: aw.AgentWorld, admission: Admission, *, ports: int) -> str:
    spec = replace(with_devices(world.spec("database"), 3, admission), ports=ports)
    return world.agent.hook_prepare(aw.ROOT, aw.format_prepare(spec), wait_s=5.0)


def alerts(world: aw.AgentWorld) -> list[str]:
    return [a for a in world.agent.health(aw.ROOT)["alerts"] if "root port" in a]


@pytest.mark.parametrize(
    ("free", "plugged", "missing"), [(0, 0, 3), (2, 0, 1), (3, 0, 0), (9, 0, 0), (0, 3, 0)]
)
def test_each_function_takes_a_port(free: int, plugged: int, missing: int) -> None:
    policy = with_devices(aw.make_spec(1, "x", 1), 3).policy
    assert policy is not None
    assert missing_ports(policy, free, plugged=plugged) == missing


def test_a_strict_guest_without_enough_ports_does_not_start(world: aw.AgentWorld) -> None:
    line = prepare(world, Admission.STRICT, ports=1)
    assert line.startswith("virtfabric: no-free-port: database lacks 2 PCIe root ports")
    assert "virtfabric ports add database --count 2" in line
    assert "admission.no-ports" in [r.kind for r in world.audit.read(subject=DATABASE)]
    assert alerts(world) == []


def test_a_lax_one_starts_with_an_alert_until_it_has_them(world: aw.AgentWorld) -> None:
    assert prepare(world, Admission.LAX, ports=2) == ""
    assert [a.partition(":")[0] for a in alerts(world)] == [
        "database lacks 1 PCIe root port for the functions that its policy asks for"
    ]
    assert prepare(world, Admission.LAX, ports=3) == ""
    assert alerts(world) == []


def test_enough_is_enough_for_a_strict_one(world: aw.AgentWorld) -> None:
    assert prepare(world, Admission.STRICT, ports=3) == ""


def test_policy_set_says_what_lacks_and_what_to_do(world: aw.AgentWorld) -> None:
    notes = world.agent.policy_set(aw.ROOT, "database", {"priority": "80"})["notes"]
    assert notes == [
        "database lacks 1 PCIe root port for the functions that its policy asks for: "
        "run `virtfabric ports add database --count 1` and start it anew"
    ]
    world.agent.ports_add(aw.ROOT, "database", 1)
    assert world.agent.policy_set(aw.ROOT, "database", {"priority": "81"})["notes"] == []
    assert world.agent.policy_set(aw.ROOT, "web", {"priority": "52"})["notes"] == []


def test_ports_that_come_with_the_next_boot_are_told_apart(world: aw.AgentWorld) -> None:
    world.host.start_guest(DATABASE)
    world.settle()
    world.agent.ports_add(aw.ROOT, "database", 1)
    notes = world.agent.policy_set(aw.ROOT, "database", {"priority": "80"})["notes"]
    assert notes == ["database has too few PCIe root ports now (1); its next start brings them"]
