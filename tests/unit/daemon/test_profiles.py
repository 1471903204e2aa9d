"""VFs that take a vendor's profile, in the life of an agent: set, passed on, taken back."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.devices import small_devices
from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.device import DevicePool, Match, PciAddress
from virtfabric.model.errors import RefusedError
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.profile import Profile, ProfileFile

PF = PciAddress("0000:01:00.0")
TYPE = ProfileFile("nvidia/current_vgpu_type")
POOL = DevicePool("gpu.vf", Match(pf=PF), vfio_driver="nvidia", profile=Profile(TYPE, "1155", "0"))
LENT = DevicePolicy("gpu.vf", 4, reclaimable=True)


def vendors_devices(driver="nvidia"):
    """The VFs are with the vendor's driver, which vfio can open."""
    devices = small_devices()
    for one in devices:
        if one.shown.pf:
            one.shown = replace(one.shown, driver=driver or None, settings=None)
            one.profiles = {TYPE: "0"}
            one.vfio_drivers = ("nvidia",)
    return devices


@pytest.fixture
def build():
    """Worlds that end with the test."""
    made = []

    def start(*specs, driver="nvidia"):
        world = aw.AgentWorld(
            specs=specs or aw.default_specs(), functions=vendors_devices(driver),
            settings={"pools": (POOL,)},
        )  # fmt: skip
        made.append(world.start())
        return world

    yield start
    for world in made:
        world.close()


@pytest.fixture
def world(build):
    return build()


def allocate(world, guest, want="+1"):
    return world.finish(world.agent.allocate(aw.ROOT, guest, {"device:gpu.vf": want})["job"])


def release(world, job):
    done = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    world.settle()
    return done


def state(world):
    """Driver and profile of each VF that are not as they were found."""
    there = world.host.devices.read_functions()
    shown = {
        address: (function.driver, world.host.devices.find(address).profiles[TYPE])
        for address, function in there.items()
        if function.pf
    }
    return {address: seen for address, seen in shown.items() if seen != ("nvidia", "0")}


def quarantine(world):
    return {
        f["address"]: f["quarantine"]["why"]
        for f in world.agent.devices(aw.ROOT)
        if f["quarantine"]
    }


@pytest.mark.parametrize("driver", ["nvidia", ""])
def test_a_guest_gets_a_function_with_its_profile_and_gives_it_back(build, driver):
    world = build(driver=driver)
    before = state(world)
    job = allocate(world, "web")
    assert job["state"] == "done", job["error"]
    [address] = world.functions_of("web")
    assert state(world)[address] == ("nvidia", "1155")
    assert release(world, job)["state"] == "done"
    assert (state(world), quarantine(world)) == (before, {})


def test_a_dry_run_shows_the_step(world):
    plan = world.agent.plan(aw.ROOT, "web", {"device:gpu.vf": "+1"})
    words = [step["text"] for step in plan["steps"]]
    assert any("profile nvidia/current_vgpu_type 0 -> 1155" in text for text in words), words
    assert state(world) == {}


def test_a_profile_that_somebody_else_set_undoes_the_request(world):
    before = world.frozen()
    for one in world.host.devices.read_functions().values():
        if one.pf:
            world.host.devices.find(one.address).profiles = {TYPE: "42"}
    job = allocate(world, "web")
    assert job["state"] == "failed", job
    assert "42" in job["error"]["detail"]
    world.settle()
    assert world.functions_of("web") == []
    assert set(state(world).values()) == {("nvidia", "42")}
    assert quarantine(world) == {}
    assert world.frozen() == before


def test_a_function_that_is_reclaimed_keeps_its_profile_and_comes_home_with_it(build):
    world = build(aw.make_spec(10, "batch", 10, devices=(LENT,)), aw.make_spec(90, "database", 90))
    world.settle()
    assert len(world.functions_of("batch")) == 4
    job = allocate(world, "database")
    assert job["state"] == "done", job["error"]
    [address] = world.functions_of("database")
    assert state(world)[address] == ("nvidia", "1155")
    assert release(world, job)["state"] == "done"
    assert len(world.functions_of("batch")) == 4
    assert set(state(world).values()) == {("nvidia", "1155")}
    world.host.stop_guest(aw.uuid_of(10))
    world.settle()
    assert (state(world), quarantine(world)) == ({}, {})


def test_another_configuration_takes_back_what_the_first_set(world):
    job = allocate(world, "web")
    other = replace(POOL, vfio_driver="vfio-pci", profile=None)
    settings = replace(world.agent._settings, pools=(other,))
    world.agent.reconfigure(settings, world.topology, world.capacity)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert release(world, job)["state"] == "done"
    assert (state(world), quarantine(world)) == ({}, {})


@pytest.mark.parametrize("how", ["crash", "unasked"])
def test_a_function_that_left_its_guest_has_no_profile_any_more(world, how):
    allocate(world, "web", "2")
    if how == "crash":
        world.host.stop_guest(aw.uuid_of(50), "crashed")
    else:
        for address in world.functions_of("web"):
            world.host.let_go(aw.uuid_of(50), PciAddress(address))
    world.settle()
    assert (world.functions_of("web"), state(world), quarantine(world)) == ([], {}, {})


def test_what_a_guest_kept_when_its_attach_was_undone_goes_home_later(world):
    """Nothing was bound: the profile alone tells that there is a way back."""
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="attach-function"))
    assert allocate(world, "web")["state"] == "failed"
    [address] = world.functions_of("web")
    assert state(world) == {address: ("nvidia", "1155")}, "QEMU has it open still"
    assert "did not let go" in quarantine(world)[address]
    world.host.faults.clear()
    world.host.let_go(aw.uuid_of(50), PciAddress(address))
    world.settle()
    assert (state(world), quarantine(world)) == ({}, {})


def test_a_profile_that_cannot_be_taken_back_is_quarantine_until_it_can(world):
    job = allocate(world, "web")
    [address] = world.functions_of("web")
    found = world.host.devices.find(PciAddress(address))
    found.profiles = {TYPE: "42"}  # by somebody, though a guest has it
    assert release(world, job)["state"] == "done"
    assert "profile nvidia/current_vgpu_type 1155 -> 0" in quarantine(world)[address]
    again = world.finish(world.agent.device_release(aw.ROOT, address)["job"])
    assert again["state"] == "failed", again
    assert address in quarantine(world)
    found.profiles = {TYPE: "0"}  # as its message says
    again = world.finish(world.agent.device_release(aw.ROOT, address)["job"])
    assert again["state"] == "done", again
    assert quarantine(world) == {}
    with pytest.raises(RefusedError):
        world.agent.device_release(aw.ROOT, address)


def test_a_way_home_that_failed_once_is_tried_again(world):
    job = allocate(world, "web")
    world.host.faults.add(Fault(Effect.FAIL, kind="set-profile"))
    assert release(world, job)["state"] == "done"
    assert (state(world), quarantine(world)) == ({}, {})


@pytest.mark.parametrize("driver", ["nvidia", ""])
@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])
def test_a_crash_at_the_step_leaves_nothing(build, phase, driver):
    world = build(driver=driver)
    before = state(world), world.frozen()
    crash = world.host.faults.add(Fault(Effect.CRASH, phase, kind="set-profile"))
    world.agent.allocate(aw.ROOT, "web", {"device:gpu.vf": "+1"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert (state(world), world.frozen()) == before
    assert quarantine(world) == {}
