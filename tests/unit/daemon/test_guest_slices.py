"""Guests ask for functions that cards first have to make: all of it happens, or nothing."""

import threading

import agent_world as aw
import pytest
from card_agent import CardWorld, slice_file

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase, SimulatedCrash
from virtfabric.daemon import sliceprelude
from virtfabric.model.adapter import SliceSpec
from virtfabric.model.device import VFIO_PCI, HostUse, UseKind
from virtfabric.model.errors import RefusedError
from virtfabric.model.policy import DevicePolicy
from virtfabric.protocol import messages as m

AES = "crypto.aes"


SPECS = (
    aw.make_spec(10, "batch", 10, initial_mib=256),
    aw.make_spec(50, "web", 50),
    aw.make_spec(90, "database", 90),
)


@pytest.fixture
def world(tmp_path):
    world = CardWorld(tmp_path, functions=True, specs=SPECS)
    yield world
    world.close()


def ask(world, guest, count=1, **more):
    return world.agent.allocate(guest, **{f"device:{AES}": str(count)}, **more)


def functions_of(world, name):
    """What the guest really has."""
    return {device.address for device in world.agent.live(name).devices}


def held_by(world, name):
    guest = next(s.uuid for s in world.agent.specs if s.name == name)
    holding = world.books.holdings.get(guest)
    return {f.address for f in holding.functions} if holding else set()


def check(world):
    """Nothing is lost and nothing is shared: books, cards, host and guests say the same."""
    world.check()
    devices = world.agent.host.devices.read_functions()
    badges = {str(one.badge): address for address, one in devices.items() if one.badge}
    slices = {f"{one.slice} of card {one.card}": one for one in world.books.slices.values()}
    assert badges.keys() == slices.keys()
    owners = {}
    for spec in world.agent.specs:
        assert functions_of(world, spec.name) == held_by(world, spec.name)
        for address in held_by(world, spec.name):
            assert address not in owners
            owners[address] = spec.uuid
            assert devices[address].driver == VFIO_PCI
    for name, address in badges.items():
        assert slices[name].holder == owners.get(address, ""), name
        if slices[name].transient:
            assert address in owners, f"{name} was made for nobody"


def test_a_slice_is_made_attached_and_given_back(world):
    job = ask(world, "web")
    assert job["state"] == "done", str(job)
    (held,) = world.books.slices.values()
    assert (held.transient, held.holder) == (True, aw.uuid_of(50))
    assert (held.part.units, held.part.priority, held.part.reclaimable) == (1, 50, False)
    (address,) = functions_of(world, "web")
    check(world)
    (shown,) = [d for d in world.agent.agent.devices(aw.ROOT) if d["address"] == address]
    assert (shown["capability"], shown["holder"]) == (AES, "web")
    assert shown["slice"]["card"] == held.card
    released = world.agent.finish(
        world.agent.agent.release(aw.ROOT, job["result"]["grant"])["job"]
    )  # fmt: skip
    assert released["state"] == "done", released
    assert world.books.slices == {}
    assert functions_of(world, "web") == set()
    check(world)


def test_several_functions_come_from_several_cards(world):
    world.create(slice_file("rest", cores=1, units=3), slice_file("more", cores=1, units=3))
    job = ask(world, "web", 2)
    assert job["state"] == "done", str(job)
    # what was made by a file has functions as well, and nobody had them: they come first
    assert {one.part.name for one in world.books.slices.values() if one.holder} == {"rest", "more"}
    again = ask(world, "database", 2)
    assert again["state"] == "done", again
    made = [one for one in world.books.slices.values() if one.transient]
    assert {one.card for one in made} == {"C-1", "C-2"}
    check(world)


def test_a_slice_of_a_file_is_nobodys_again_after_the_release(world):
    world.create(slice_file("mine", units=1))
    job = ask(world, "web")
    world.agent.finish(world.agent.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    (one,) = world.books.slices.values()
    assert (one.part.name, one.holder) == ("mine", "")
    check(world)


def test_what_was_made_for_a_guest_is_given_to_no_other(world):
    world.create(slice_file("webs", units=4), slice_file("rest", units=4), guest="web")
    with pytest.raises(RefusedError, match="no-capacity") as refused:
        world.agent.agent.plan(aw.ROOT, "database", {f"device:{AES}": "1"})
    assert any("it is a slice for web" in line for line in refused.value.refusal.considered)
    assert any(line.startswith("cards: ") for line in refused.value.refusal.considered)
    assert ask(world, "web", 2)["state"] == "done"
    check(world)


def test_more_than_cards_have_is_refused_and_nothing_is_begun(world):
    with pytest.raises(RefusedError):
        world.agent.agent.plan(aw.ROOT, "web", {f"device:{AES}": "9"})
    job = ask(world, "web", 9)
    assert job["state"] == "refused", job
    assert world.on_cards() == {"C-1": [], "C-2": []}
    assert world.promises() == 0


def test_what_cannot_be_for_another_reason_makes_no_slice(world):
    job = ask(world, "web", 1, memory="64GiB")
    assert job["state"] == "refused", job
    assert job["error"]["reason"] == "above-limit"
    assert all(b.firmware.books.serials == 0 for b in world.brains.values())


def test_a_dry_run_shows_the_steps_of_cards_first(world):
    plan = world.agent.agent.plan(aw.ROOT, "web", {f"device:{AES}": "1"})
    kinds = [step["data"]["kind"] for step in plan["steps"]]
    assert kinds[:2] == ["bring-slice", "bring-slice"]
    assert "attach-function" in kinds
    assert world.on_cards() == {"C-1": [], "C-2": []}
    assert world.promises() == 0


def test_a_function_that_does_not_appear_undoes_all(world, monkeypatch):
    monkeypatch.setattr(sliceprelude, "APPEAR_S", 0.2)
    for plugged in world.plugged.values():
        plugged.is_plugging = False
    job = ask(world, "web", 2)
    assert job["state"] == "failed", job
    assert "2 functions of card C-1 did not appear within 0.2 s" in job["error"]["detail"]
    assert world.books.slices == {}
    check(world)


def test_a_function_that_its_card_does_not_confirm_is_not_taken(world, monkeypatch):
    """A stranger shows another badge under the slice's name."""
    monkeypatch.setattr(sliceprelude, "APPEAR_S", 0.2)
    for plugged in world.plugged.values():
        plugged.card.badge = lambda _name: "f" * 32
    job = ask(world, "web")
    assert job["state"] == "failed", job
    assert (
        "says that it is slice-1 of card C-1, which that card does not confirm"
        in (job["error"]["detail"])
    )
    assert functions_of(world, "web") == set()
    world.settle()
    assert world.on_cards() == {"C-1": [], "C-2": []}


def world_with_batch(tmp_path, *, reclaimable):
    """Cards have 8 units; batch has 3 of the functions, everything else is taken."""
    wish = DevicePolicy(AES, 3, reclaimable=reclaimable)
    batch = aw.make_spec(10, "batch", 10, devices=(wish,))
    world = CardWorld(tmp_path, functions=True, specs=(batch, *SPECS[1:]))
    world.create(slice_file("a", units=4), slice_file("b", units=3))
    # its policy takes what is free; for what is not there it has to ask
    aw.eventually(lambda: len(held_by(world, "batch")) == 2, "batch never got what is free")
    job = ask(world, "batch", 3)
    assert job["state"] == "done", str(job)
    world.agent.settle()
    return world


def test_a_higher_priority_takes_a_function_and_its_slice_and_gives_both_back(tmp_path):
    world = world_with_batch(tmp_path, reclaimable=True)
    try:
        before = held_by(world, "batch")
        job = ask(world, "database")
        assert job["state"] == "done", str(job)
        (taken,) = held_by(world, "database")
        assert taken in before
        steps = job["result"]["steps"]
        detached = steps.index(f"batch: detach {taken}")
        passed = next(n for n, line in enumerate(steps) if "from 0000" in line)
        attached = steps.index(f"database: attach {taken}")
        assert detached < passed < attached
        check(world)
        world.agent.finish(world.agent.agent.release(aw.ROOT, job["result"]["grant"])["job"])
        assert held_by(world, "batch") == before
        world.agent.settle()
        check(world)
    finally:
        world.close()


def test_a_guest_whose_policy_keeps_its_functions_loses_none(tmp_path):
    world = world_with_batch(tmp_path, reclaimable=False)
    try:
        job = ask(world, "database")
        assert job["state"] == "refused", job
        assert len(held_by(world, "batch")) == 3
        check(world)
    finally:
        world.close()


def test_a_guest_that_stops_gives_all_back(world):
    assert ask(world, "web", 2)["state"] == "done"
    world.agent.host.stop_guest(aw.uuid_of(50))
    world.agent.settle()
    world.settle()
    assert world.books.slices == {}
    assert world.on_cards() == {"C-1": [], "C-2": []}


def test_a_card_that_starts_anew_takes_its_functions_out_of_guests(world):
    """What was made for a guest goes with its function; the guest may ask again."""
    assert ask(world, "web")["state"] == "done"
    world.cut_power("C-1")
    world.power_on("C-1")
    aw.eventually(lambda: not world.books.slices, "the slice stayed")
    world.agent.settle()
    world.settle()
    check(world)
    assert any("lost" in text and AES in text for text in world.alerts())
    assert ask(world, "web")["state"] == "done"
    check(world)


# -- crashes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("work", "kind"),
    [("allocate", m.AllocationRequest), ("allocate", m.Commit), ("release", m.Assign),
     ("release", m.Release)],
)  # fmt: skip
def test_a_kill_at_any_word_to_a_card(world, work, kind, when):
    """An allocation that is cut off has not happened; a release neither."""
    grant = ask(world, "web")["result"]["grant"] if work == "release" else ""

    def crash(message):
        if isinstance(message, kind):
            raise SimulatedCrash

    for wire in world.wires.values():
        setattr(wire, when, crash)
    begin(world, grant)
    restart(world)
    assert len(held_by(world, "web")) == (1 if grant else 0)
    assert ask(world, "database")["state"] == "done"
    check(world)


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFIED])
@pytest.mark.parametrize(
    ("work", "kind"),
    [("allocate", "bind-driver"), ("allocate", "attach-function"), ("release", "attach-function"),
     ("release", "reset-function")],
)  # fmt: skip
def test_a_kill_at_any_step_of_the_host(world, work, kind, phase):
    grant = ask(world, "web")["result"]["grant"] if work == "release" else ""
    world.agent.host.faults.add(Fault(Effect.CRASH, phase, kind=kind))
    begin(world, grant)
    restart(world)
    assert len(held_by(world, "web")) == (1 if grant else 0)
    assert ask(world, "database")["state"] == "done"
    check(world)


@pytest.mark.parametrize("kind", ["bind-driver", "attach-function"])
def test_a_step_that_fails_undoes_the_slices_too(world, kind):
    world.agent.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind=kind, skip=1))
    job = ask(world, "web", 2)
    assert job["state"] == "failed", job
    assert world.books.slices == {}
    check(world)
    assert ask(world, "web", 2)["state"] == "done"
    check(world)


def test_a_card_that_is_lost_at_the_release_is_told_when_it_is_back(world):
    job = ask(world, "web")
    (held,) = world.books.slices.values()
    world.wires[held.card].lose("somebody pulled the cable")
    world.settle()
    released = world.agent.finish(
        world.agent.agent.release(aw.ROOT, job["result"]["grant"])["job"]
    )  # fmt: skip
    assert released["state"] == "done", released
    assert world.books.slices == {}
    assert functions_of(world, "web") == set()
    world.wires[held.card].return_()
    world.settle()
    assert world.on_cards() == {"C-1": [], "C-2": []}
    check(world)


def begin(world, grant):
    agent = world.agent.agent
    if grant:
        agent.release(aw.ROOT, grant)
    else:
        agent.allocate(aw.ROOT, "web", {f"device:{AES}": "2"})


def restart(world):
    aw.eventually(lambda: world.agent._process._killed, "nobody crashed")
    world.restart_agent()
    world.pass_time(31)
    world.settle()
    world.agent.settle()
    assert world.promises() == 0
    check(world)


def test_a_slice_that_a_guest_is_just_getting_is_not_ended(world):
    """Nobody had it when its end was asked for; that waits for the guest's plan, and is refused."""
    world.create(slice_file("mine", units=1))
    jobs = []

    def end_it():
        jobs.append(world.agent.agent.slice_destroy(aw.ROOT, "mine")["job"])

    def meanwhile(message):
        if isinstance(message, m.Assign) and not jobs:
            other = threading.Thread(target=end_it)
            other.start()
            other.join(aw.DEADLINE_S)

    for wire in world.wires.values():
        wire.before = meanwhile
    assert ask(world, "web")["state"] == "done"
    ended = world.agent.finish(jobs[0])
    assert ended["state"] == "refused", ended
    assert ended["error"]["reason"] == "device-in-use"
    assert len(functions_of(world, "web")) == 1
    check(world)


def test_a_slice_whose_function_somebody_else_uses_is_neither_idle_nor_ended(tmp_path):
    world = CardWorld(tmp_path, functions=True, specs=SPECS, settings={"idle_after_s": 600.0})
    try:
        watch = world.agent.agent._cards.idle
        world.create(slice_file("mine", units=4, cores=8), slice_file("more", units=4, cores=8))
        watch.look()
        watch._after_s = 1e-9
        assert len(watch.takeable()) == 2
        devices = world.agent.host.devices
        for address in devices.read_functions():
            if devices.read_functions()[address].badge:
                devices.change(address, uses=(HostUse(UseKind.NETWORK, "eth0 is up"),))
        world.agent.settle()
        with pytest.raises(RefusedError, match="eth0 is up"):
            world.agent.agent.slice_destroy(aw.ROOT, "mine")
        with pytest.raises(RefusedError, match="no-capacity"):
            world.create(slice_file("new", cores=4, priority=1))
        assert len(world.books.slices) == 2
    finally:
        world.close()


def test_a_slice_that_no_books_know_is_not_ended_under_who_uses_it(world):
    """The agent's state was lost: its guests and the host keep what they have."""
    firmware = world.brains["C-1"].firmware
    spec = SliceSpec(capability=AES, units=1).check()
    wire = world.wires["C-1"]
    promise = wire.ask(m.AllocationRequest("host-a/req-old/0", spec))
    wire.ask(m.Commit(promise.reservation))
    devices = world.agent.host.devices
    (address,) = (a for a, one in devices.read_functions().items() if one.badge)
    devices.change(address, uses=(HostUse(UseKind.NETWORK, "eth0 is up"),))
    world.agent.settle()
    world.agent.agent._world.cards.reach("C-1").refresh()
    world.agent.agent._cards.watch.settle()
    assert len(firmware.books.slices) == 1
    assert any("no books know" in text and "eth0 is up" in text for text in world.alerts())
    devices.change(address, uses=())
    world.agent.settle()
    world.agent.agent._cards.watch.settle()
    assert firmware.books.slices == {}
    assert not any("no books know" in text for text in world.alerts())
    check(world)
