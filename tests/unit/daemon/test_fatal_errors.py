"""Fatal PCIe errors of a function that a guest has: nobody else gets it unless somebody says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.devices import small_devices
from virtfabric.model.device import DevicePool, Match, PciAddress
from virtfabric.model.policy import DevicePolicy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

WEB = aw.uuid_of(50)
PF, PORT = PciAddress("0000:01:00.0"), PciAddress("0000:00:10.0")
CRYPTO, CRYPTO_PORT = PciAddress("0000:03:00.0"), PciAddress("0000:00:10.2")
POOLS = (
    DevicePool("net.vf", Match(pf=PF)),
    DevicePool("crypto.aes", Match(ids=frozenset({"1234:11e8"}))),
)


@pytest.fixture
def world() -> Iterator[aw.AgentWorld]:
    lender = aw.make_spec(50, "web", 50, devices=(DevicePolicy("crypto.aes", reclaimable=True),))
    specs = tuple(lender if spec.uuid == WEB else spec for spec in aw.default_specs())
    functions = small_devices()
    for one in functions:
        if one.shown.address in (PF, PORT, CRYPTO_PORT):
            one.shown = replace(one.shown, fatal_errors=1)  # of long ago
    yield from aw.world_fixture(specs=specs, functions=functions, settings={"pools": POOLS})


def count(world: aw.AgentWorld, address: PciAddress, errors: int = 2, *, tell: bool = True) -> None:
    """The kernel counts one more; with `tell` it sends a uevent."""
    world.settle()
    if tell:
        world.host.devices.change(address, fatal_errors=errors)
        world.settle()
    else:
        changed, world.host.devices._changed = world.host.devices._changed, None
        world.host.devices.change(address, fatal_errors=errors)
        world.host.devices._changed = changed


def allocate(world: aw.AgentWorld, guest: str, capability: str, want: str = "+1") -> dict[str, Any]:
    job = world.agent.allocate(aw.ROOT, guest, {f"device:{capability}": want})["job"]
    return world.finish(job)


def quarantine(world: aw.AgentWorld) -> dict[str, str]:
    functions = world.agent.devices(aw.ROOT)
    return {f["address"]: f["quarantine"]["why"] for f in functions if f["quarantine"]}


def drivers(world: aw.AgentWorld) -> dict[PciAddress, str | None]:
    return {a: f.driver for a, f in world.host.devices.read_functions().items()}


def test_old_errors_are_nobodys(world: aw.AgentWorld) -> None:
    world.settle()
    assert world.functions_of("web") == [CRYPTO]
    assert quarantine(world) == {}


def test_it_stays_with_its_guest_and_goes_to_nobody_else(world: aw.AgentWorld) -> None:
    count(world, CRYPTO_PORT)
    assert list(quarantine(world)) == [CRYPTO]
    assert "a fatal PCIe error was counted" in quarantine(world)[CRYPTO]
    assert world.functions_of("web") == [CRYPTO]
    alerts = world.agent.health(aw.ROOT)["alerts"]
    assert any(f"virtfabric devices release {CRYPTO}" in text for text in alerts)
    assert allocate(world, "database", "crypto.aes")["state"] == "refused"
    assert world.functions_of("web") == [CRYPTO]


def test_given_back_it_waits_for_an_operator(world: aw.AgentWorld) -> None:
    count(world, CRYPTO_PORT)
    world.host.stop_guest(WEB)
    world.settle()
    world.agent._lifecycle.enqueue(world.agent._rounds.look_over)
    world.settle()
    assert drivers(world)[CRYPTO] is None, "with the host again"
    assert list(quarantine(world)) == [CRYPTO]
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert list(quarantine(world)) == [CRYPTO]
    assert allocate(world, "database", "crypto.aes")["state"] == "refused"
    job = world.finish(world.agent.device_release(aw.ROOT, CRYPTO)["job"])
    assert job["state"] == "done", job["error"]
    assert quarantine(world) == {}
    assert allocate(world, "database", "crypto.aes")["state"] == "done"
    world.settle()
    assert quarantine(world) == {}, "what was counted before is of before"


def test_an_error_that_nobody_was_told_of_shows_when_it_is_given_back(
    world: aw.AgentWorld,
) -> None:
    count(world, CRYPTO_PORT, tell=False)
    assert quarantine(world) == {}
    world.host.stop_guest(WEB)
    world.settle()
    assert list(quarantine(world)) == [CRYPTO]


def test_an_error_that_nobody_was_told_of_keeps_it_from_being_lent(world: aw.AgentWorld) -> None:
    count(world, CRYPTO_PORT, tell=False)
    assert allocate(world, "database", "crypto.aes")["state"] == "refused"
    assert world.functions_of("web") == [CRYPTO]


def test_one_that_its_guest_let_go_of_does_not_come_out_by_itself(world: aw.AgentWorld) -> None:
    count(world, CRYPTO_PORT, tell=False)
    world.host.let_go(WEB, CRYPTO)
    world.settle()
    assert "fatal PCIe error" in quarantine(world)[CRYPTO]
    assert drivers(world)[CRYPTO] is None
    assert world.functions_of("web") == []


@pytest.mark.parametrize("where", [PF, PORT])
def test_what_hits_the_pf_or_the_port_hits_every_vf_with_a_guest(
    world: aw.AgentWorld, where: PciAddress
) -> None:
    allocate(world, "web", "net.vf")
    allocate(world, "database", "net.vf")
    hit = set(world.functions_of("web")) - {CRYPTO} | set(world.functions_of("database"))
    count(world, where, 4)
    assert set(quarantine(world)) == hit
    assert all("3 fatal PCIe errors were counted" in why for why in quarantine(world).values())
    assert allocate(world, "batch", "net.vf")["state"] == "done", "two are left"


def test_a_guest_that_qemu_stopped_makes_the_agent_look(world: aw.AgentWorld) -> None:
    count(world, CRYPTO_PORT, tell=False)
    world.host.halt_guest(WEB)
    world.settle()
    assert list(quarantine(world)) == [CRYPTO]
