"""A function that a guest's XML names with managed='no': bound at `prepare`, back at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.devices import SimulatedFunction
from virtfabric.model.device import HostUse, PciAddress, PciFunction, UseKind

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
    idle = replace(aw.make_spec(90, "database", 90), running=False)
    specs = (*(s for s in aw.default_specs() if s.uuid != DATABASE), idle)
    nic = SimulatedFunction(PciFunction(NIC, driver="ixgbe", group=7))
    yield from aw.world_fixture(specs=specs, functions=(nic,))


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


def test_what_the_host_uses_is_refused_and_left_alone(world: aw.AgentWorld) -> None:
    world.host.devices.change(NIC, uses=(HostUse(UseKind.NETWORK, "eth0 is up"),))
    assert "device-in-use: the host uses 0000:3b:00.0" in prepare(world)
    assert driver(world) == "ixgbe"
