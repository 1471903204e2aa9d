"""PCIe functions in the life of an agent: given, taken, lost, quarantined, wished for."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.devices import SimulatedFunction, small_devices
from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.adapters.simulated.records import MemoryJournal
from virtfabric.model.amounts import Amounts
from virtfabric.model.capability import device_key
from virtfabric.model.device import VFIO_PCI, DevicePool, Match, PciAddress, PciFunction, VfSettings
from virtfabric.model.errors import InvalidValueError, JournalError, Reason, RefusedError
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.request import Offerable

PF = PciAddress("0000:01:00.0")
VFS = [PciAddress(f"0000:01:10.{n}") for n in (0, 2, 4, 6)]
CRYPTO = PciAddress("0000:03:00.0")
NET = DevicePool("net.vf", Match(pf=PF), VfSettings(vlan=7, trust=True))
ACCELERATOR = DevicePool("crypto.aes", Match(ids=frozenset({"1234:11e8"})))
WISH = DevicePolicy("net.vf", 1)
LENT = DevicePolicy("net.vf", 2, reclaimable=True)


def make_world(*specs, pools=(NET, ACCELERATOR), functions=None):
    return aw.AgentWorld(
        specs=specs or aw.default_specs(),
        functions=small_devices() if functions is None else functions,
        settings={"pools": pools},
    )


@pytest.fixture
def world():
    made = make_world().start()
    yield made
    made.close()


@pytest.fixture
def build():
    """Worlds that end with the test."""
    made = []

    def start(*specs, **options):
        made.append(make_world(*specs, **options).start())
        return made[-1]

    yield start
    for world in made:
        world.close()


def allocate(world, guest, capability="net.vf", want="+1", **more):
    job = world.agent.allocate(aw.ROOT, guest, {f"device:{capability}": want} | more)
    return world.finish(job["job"])


def held(world, guest):
    return [d["address"] for d in world.guest(guest)["devices"] if d["ours"]]


def shown(world, address):
    return next(f for f in world.agent.devices(aw.ROOT) if f["address"] == address)


def quarantine(world):
    return {
        f["address"]: f["quarantine"]["why"]
        for f in world.agent.devices(aw.ROOT)
        if f["quarantine"]
    }


def drivers(world):
    return {a: f.driver for a, f in world.host.devices.read_functions().items()}


def kinds(world, subject):
    return [r["kind"] for r in world.agent.audit(aw.ROOT, 0, subject)]


# -- given and taken ----------------------------------------------------------------------------


def test_a_guest_gets_a_function_and_gives_it_back(world):
    before = world.frozen()
    job = allocate(world, "web")
    assert job["state"] == "done", job["error"]
    assert job["result"]["delta"] == {"device:net.vf": 1}
    [address] = world.functions_of("web")
    assert held(world, "web") == [address]
    view = world.guest("web")["devices"][0]
    assert view == {
        "address": address, "capability": "net.vf", "attached": True, "ours": True,
    }  # fmt: skip
    function = world.host.devices.read_functions()[address]
    assert function.driver == VFIO_PCI
    assert (function.settings.vlan, function.settings.trust) == (7, True)
    assert shown(world, address)["holder"] == "web"
    world.settle()

    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] == "done", released
    world.settle()
    assert world.frozen() == before
    assert held(world, "web") == []
    assert quarantine(world) == {}


def test_to_and_by_and_no_more_than_there_are(world):
    assert allocate(world, "web", want="2")["result"]["delta"] == {"device:net.vf": 2}
    assert allocate(world, "web", want="-1")["result"]["delta"] == {"device:net.vf": -1}
    with_rest = allocate(world, "database", want="4")
    assert with_rest["state"] == "refused"
    assert with_rest["error"]["reason"] == "no-capacity"
    some = allocate(world, "database", want="4", partial="yes")
    assert some["result"]["delta"] == {"device:net.vf": 3}
    assert len({*world.functions_of("web"), *world.functions_of("database")}) == 4


@pytest.mark.parametrize(
    ("key", "want", "words"),
    [
        ("device:Net", "1", "'Net' is not dotted like net.vf"),
        ("device:net.vf", "1.5", "'1.5' must be a whole number"),
        ("device:net.vf", "257", "'257' must be a whole number from 0 to 256"),
        ("device:net.vf", "+0", "'+0' changes nothing"),
        ("devices", "1", "'devices' is unknown"),
    ],
)
def test_wrong_words_name_the_field(world, key, want, words):
    with pytest.raises(InvalidValueError, match=r"device|request") as caught:
        world.agent.allocate(aw.ROOT, "web", {key: want})
    assert words in str(caught.value)


def test_unknown_capabilities_and_ports_that_are_lacking(build):
    world = build(aw.make_spec(50, "web", 50, ports=1))
    job = allocate(world, "web", "net.pf")
    assert job["error"]["reason"] == "unknown-capability"
    job = allocate(world, "web", want="2")
    assert job["error"]["reason"] == "no-free-port"
    assert "virtfabric ports add web" in job["error"]["detail"]


def test_dry_run_shows_the_steps_and_the_blast_radius(world):
    before = world.frozen()
    allocate(world, "batch")
    [taken] = world.functions_of("batch")
    plan = world.agent.plan(aw.ROOT, "web", {"device:net.vf": "+1"})
    [device] = plan["devices"]
    assert device["capability"] == "net.vf"
    assert device["name"] == "web"
    shares = {s["address"]: s for s in device["shares"]}
    assert shares[taken]["holder"] == "batch"
    assert shares[PF]["what"] == "PF"
    kinds_of = [step["data"]["kind"] for step in plan["steps"]]
    assert kinds_of.index("bind-driver") < kinds_of.index("attach-function")
    assert world.functions_of("web") == []
    assert before != world.frozen()  # batch has its own


def test_functions_that_the_host_uses_are_never_touched(build):
    disk = DevicePool("storage.nvme", Match(class_prefix="0108"))
    world = build(pools=(disk,))
    job = allocate(world, "web", "storage.nvme")
    assert job["state"] == "refused"
    assert job["error"]["reason"] == "device-in-use"
    assert drivers(world)["0000:02:00.0"] == "nvme"


def test_a_higher_priority_takes_what_may_be_taken_and_it_goes_home(build):
    world = build(
        aw.make_spec(10, "batch", 10, devices=(replace(LENT, count=4),)),
        aw.make_spec(90, "database", 90),
    )
    world.settle()
    assert len(world.functions_of("batch")) == 4
    job = allocate(world, "database")
    assert job["state"] == "done", job["error"]
    assert len(world.functions_of("batch")) == 3
    [address] = world.functions_of("database")
    assert address not in world.functions_of("batch")
    world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    world.settle()
    assert len(world.functions_of("batch")) == 4


def test_who_may_hold_how_many_is_bounded(build):
    world = build()
    bound = Offerable(100, Amounts({device_key("net.vf"): 1}))
    world.agent._authority.configure(aw.GROUP, lambda _: bound)
    with pytest.raises(RefusedError) as caught:
        world.agent.allocate(aw.ALICE, "web", {"device:net.vf": "2"})
    assert caught.value.refusal.reason is Reason.ABOVE_CEILING


# -- wishes -------------------------------------------------------------------------------------


def test_a_wish_is_reserved_at_prepare_and_attached_when_the_guest_runs(build):
    world = build(aw.make_spec(50, "web", 50, devices=(WISH,), running=False))
    line = world.agent.hook_prepare(aw.ROOT, aw.format_prepare(world.spec("web")), wait_s=5)
    assert line == ""
    [device] = world.guest("web")["devices"]
    assert (device["attached"], device["ours"]) == (False, True)
    assert drivers(world)[device["address"]] != VFIO_PCI  # nothing is bound for one that may fail
    world.host.start_guest(aw.uuid_of(50))
    world.settle()
    assert world.functions_of("web") == [device["address"]]
    world.host.stop_guest(aw.uuid_of(50))
    world.settle()
    assert drivers(world)[device["address"]] is None
    assert quarantine(world) == {}


def test_a_wish_that_cannot_be_met_waits_for_capacity(build):
    world = build(
        aw.make_spec(10, "batch", 10, devices=(DevicePolicy("net.vf", 4),)),
        aw.make_spec(90, "database", 90, devices=(WISH,), running=False),
    )
    assert len(world.functions_of("batch")) == 4
    assert world.virsh_start("database") == ""
    world.settle()
    assert world.functions_of("database") == []
    assert any("database has 0 of the 1 net.vf" in a for a in world.agent.health(aw.ROOT)["alerts"])
    world.host.stop_guest(aw.uuid_of(10))
    world.settle()
    assert len(world.functions_of("database")) == 1
    assert not world.agent.health(aw.ROOT)["alerts"]


def test_a_function_that_is_plugged_in_meets_a_wish(build):
    crypto = next(f for f in small_devices() if f.shown.address == CRYPTO)
    others = tuple(f for f in small_devices() if f is not crypto and f.shown.address != CRYPTO)
    wish = DevicePolicy("crypto.aes", 1)
    world = build(aw.make_spec(50, "web", 50, devices=(wish,)), functions=others)
    assert world.functions_of("web") == []
    world.host.devices.plug(SimulatedFunction(crypto.shown))
    world.settle()
    assert world.functions_of("web") == [CRYPTO]


def test_new_pools_meet_wishes_too(build):
    world = build(aw.make_spec(50, "web", 50, devices=(WISH,)), pools=())
    world.settle()
    assert world.functions_of("web") == []
    settings = replace(world.agent._settings, pools=(NET,))
    world.agent.reconfigure(settings, world.topology, world.capacity)
    world.settle()
    assert len(world.functions_of("web")) == 1


# -- lost ---------------------------------------------------------------------------------------


def test_a_function_that_the_guest_let_go_is_reset_and_free_again(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.let_go(aw.uuid_of(50), address)
    world.settle()
    assert held(world, "web") == []
    assert world.agent.grants(aw.ROOT) == []
    assert quarantine(world) == {}
    assert drivers(world)[address] is None
    assert "device.lost" in kinds(world, address)
    assert "device.freed" in kinds(world, address)
    lines = world.agent.explain(aw.ROOT, address)["lines"]
    assert any(f"web lost {address} (net.vf)" in line for line in lines)
    assert allocate(world, "database")["state"] == "done"


def test_it_stays_in_quarantine_where_it_cannot_be_reset(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.faults.add(Fault(Effect.FAIL, kind="reset-function"))
    world.host.let_go(aw.uuid_of(50), address)
    world.settle()
    assert "let go of it" in quarantine(world)[address]
    assert any(address in a and "devices release" in a for a in alerts(world))
    world.host.faults.clear()
    assert allocate(world, "database", want="4")["state"] == "refused"

    job = world.finish(world.agent.device_release(aw.ROOT, address)["job"])
    assert job["state"] == "done", job["error"]
    world.settle()
    assert quarantine(world) == {}
    assert drivers(world)[address] is None
    assert "device.released" in kinds(world, address)
    assert not any("quarantine" in a for a in alerts(world))
    assert allocate(world, "database", want="4")["state"] == "done"


def alerts(world):
    return world.agent.health(aw.ROOT)["alerts"]


def test_a_function_taken_out_of_the_host_is_out_of_the_books(world):
    allocate(world, "web", want="2")
    lost, kept = world.functions_of("web")
    world.host.remove_function(PciAddress(lost))
    world.settle()
    assert held(world, "web") == [kept]
    assert world.functions_of("web") == [kept]
    assert lost not in quarantine(world)
    [grant] = world.agent.grants(aw.ROOT)
    assert grant["amounts"] == {"device:net.vf": 1}
    assert any(f"web lost {lost}" in a for a in alerts(world))


@pytest.mark.parametrize("first", ["guest", "host", "host long before"])
def test_what_was_done_around_a_function_that_vanished_is_taken_back(build, first):
    """The limit of its link, and the drivers of its group."""
    port, mate = PciAddress("0000:00:10.2"), PciAddress("0000:03:00.1")
    sibling = SimulatedFunction(PciFunction(mate, driver="snd", group=11, parent=port))
    pools = replace(ACCELERATOR, link_speed=2500), DevicePool("audio.hda", Match(frozenset({mate})))
    world = build(pools=pools, functions=(*small_devices(), sibling))
    job = allocate(world, "web", "crypto.aes")
    assert job["state"] == "done", job["error"]
    ports = world.host.devices.read_functions
    assert (ports()[port].limit, drivers(world)[mate]) == (2500, VFIO_PCI)
    if first == "guest":
        world.host.remove_function(CRYPTO)
    elif first == "host":
        world.host.devices.remove(CRYPTO)
        world.host.let_go(aw.uuid_of(50), CRYPTO)
    else:
        world.host.devices.remove(CRYPTO)
        world.settle()
        assert any(f"{CRYPTO} is in quarantine: it is gone" in a for a in alerts(world))
        assert drivers(world)[mate] == VFIO_PCI, "QEMU has the group still"
        world.host.let_go(aw.uuid_of(50), CRYPTO)
    world.settle()
    assert held(world, "web") == []
    assert world.functions_of("web") == []
    assert (ports()[port].limit, drivers(world)[mate]) == (0, "snd")
    assert quarantine(world) == {}
    assert not any("quarantine" in a for a in alerts(world))


def test_a_function_that_vanished_while_the_agent_was_away(world):
    allocate(world, "web")
    [lost] = world.functions_of("web")
    world.kill_agent()
    world.host.remove_function(PciAddress(lost))
    world.restart_agent()
    world.settle()
    assert held(world, "web") == []


def test_a_wish_that_lost_its_function_gets_another(build):
    world = build(aw.make_spec(50, "web", 50, devices=(WISH,)))
    [lost] = world.functions_of("web")
    world.host.remove_function(PciAddress(lost))
    world.settle()
    [other] = world.functions_of("web")
    assert other != lost
    assert held(world, "web") == [other]


def test_a_guest_that_ignores_the_request_keeps_its_function(world):
    job = allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] in ("refused", "failed"), released
    assert world.functions_of("web") == [address]
    assert held(world, "web") == [address]
    # it follows the request long after: nobody asked for it any more
    world.host.faults.clear()
    world.host.let_go(aw.uuid_of(50), address)
    world.settle()
    assert held(world, "web") == []
    assert quarantine(world) == {}
    assert allocate(world, "database", want="4")["state"] == "done"


def test_a_victim_that_keeps_its_function_is_replaced_by_another(build):
    world = build(
        aw.make_spec(10, "batch", 10, devices=(replace(LENT, count=2),)),
        aw.make_spec(20, "web", 20, devices=(replace(LENT, count=2),)),
        aw.make_spec(90, "database", 90),
    )
    world.settle()
    world.host.faults.keeps_functions.add(aw.uuid_of(10))
    job = allocate(world, "database")
    assert job["state"] == "done", job["error"]
    assert [len(world.functions_of(n)) for n in ("batch", "web", "database")] == [2, 1, 1]


def test_an_attach_that_cannot_be_undone_is_a_residue_and_in_quarantine(world):
    before = world.frozen()
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="attach-function"))
    assert allocate(world, "web")["state"] == "failed"
    [address] = world.functions_of("web")
    assert held(world, "web") == []
    assert "did not let go" in quarantine(world)[address]
    [residue] = world.guest("web")["residues"]
    assert (residue["what"], residue["amount"]) == ("device", 1)
    assert address in residue["detail"]
    with pytest.raises(RefusedError, match="web has it still"):
        world.agent.device_release(aw.ROOT, address)

    world.host.faults.clear()
    world.agent._lifecycle.enqueue(world.agent._rounds.look_over)
    world.settle()
    assert world.functions_of("web") == []
    assert world.guest("web")["residues"] == []
    # it was reset, and is at home again with all that was prepared for it
    assert quarantine(world) == {}
    assert world.frozen() == before


def cut_undo_short(world, effect):
    """For when web gets memory and a function: it keeps the one, the undo of the other fails."""
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="attach-function"))
    return world.host.faults.add(Fault(effect, Phase.UNDO, kind="resize-virtio-mem"))


def test_what_a_guest_keeps_is_in_quarantine_also_when_its_undo_is_finished_later(world):
    before = world.frozen()
    cut_undo_short(world, Effect.FAIL)
    assert allocate(world, "web", memory="+64M")["state"] == "failed"
    [address] = world.functions_of("web")

    world.agent._conductor.unfinished.finish()
    world.settle()
    assert world.functions_of("web") == [address]
    assert any(address in alert for alert in world.agent.status(aw.ROOT)["alerts"])
    assert "did not let go" in quarantine(world)[address]
    assert [r["what"] for r in world.guest("web")["residues"]] == ["device"]

    world.host.faults.clear()
    world.agent._rounds.look_over()
    world.settle()
    assert quarantine(world) == {}
    assert world.frozen() == before


def test_what_a_guest_keeps_is_in_quarantine_also_after_sigkill_in_mid_undo(world):
    before = world.frozen()
    crash = cut_undo_short(world, Effect.CRASH)
    world.agent.allocate(aw.ROOT, "web", {"device:net.vf": "+1", "memory": "+64M"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    [address] = world.functions_of("web")

    world.restart_agent()
    assert "did not let go" in quarantine(world)[address]
    world.host.faults.clear()
    world.agent._rounds.look_over()
    world.settle()
    assert quarantine(world) == {}
    assert world.frozen() == before


def test_a_function_stays_set_up_for_a_guest_until_its_attach_is_undone(world):
    before = world.frozen()
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="attach-function"))
    world.host.faults.add(Fault(Effect.FAIL, Phase.UNDO, kind="attach-function", times=-1))
    assert allocate(world, "web")["state"] == "failed"
    [address] = world.functions_of("web")
    function = world.host.devices.read_functions()[PciAddress(address)]
    assert (function.driver, function.settings.vlan) == (VFIO_PCI, 7)

    world.host.faults.clear()
    world.agent._rounds.look_over()
    world.settle()
    assert quarantine(world) == {}
    assert world.frozen() == before


def test_a_way_home_that_failed_half_way_is_undone_with_its_plan(world):
    assert allocate(world, "web")["state"] == "done"
    before = world.frozen()
    # the driver is gone, and its check says that it is not; then the plan cannot be committed
    world.host.faults.add(Fault(Effect.DISCONNECT, Phase.APPLIED, kind="bind-driver"))
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="bind-driver"))
    assert allocate(world, "web", want="-1")["state"] == "failed"
    world.host.reconnect()
    world.settle()
    assert world.frozen() == before
    assert len(held(world, "web")) == 1
    assert world.journal.open_transactions() == ()


def test_a_way_home_that_failed_half_way_is_undone_after_sigkill(world):
    assert allocate(world, "web")["state"] == "done"
    before = world.frozen()
    world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="set-up-vf"))
    crash = world.host.faults.add(Fault(Effect.CRASH, Phase.APPLY, kind="bind-driver"))
    world.agent.allocate(aw.ROOT, "web", {"device:net.vf": "-1"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert world.frozen() == before


# -- asked for in a policy ----------------------------------------------------------------------


def set_policy(world, guest, **devices):
    changes = {f"device:{name.replace('_', '.')}": text for name, text in devices.items()}
    answer = world.agent.policy_set(aw.ROOT, guest, changes)
    job = world.finish(answer["job"])
    world.settle()
    return job


def wishes(world, guest):
    return list(world.spec(guest).policy.devices)


def test_policy_set_asks_for_functions_and_gives_back_what_is_above(world):
    assert set_policy(world, "web", net_vf="2:reclaimable", crypto_aes="1")["state"] == "done"
    assert wishes(world, "web") == [LENT, DevicePolicy("crypto.aes")]
    assert len(held(world, "web")) == 3
    set_policy(world, "web", net_vf="1")
    assert wishes(world, "web")[0] == DevicePolicy("net.vf", 1, reclaimable=True)
    assert len(world.functions_of("web")) == len(held(world, "web")) == 2
    set_policy(world, "web", net_vf="kept")
    assert wishes(world, "web")[0] == DevicePolicy("net.vf", 1)
    set_policy(world, "web", net_vf="0", crypto_aes="0")
    assert (wishes(world, "web"), world.functions_of("web")) == ([], [])
    assert set(drivers(world).values()).isdisjoint({VFIO_PCI})


def test_what_was_granted_outlives_the_wish(world):
    assert allocate(world, "web")["state"] == "done"
    set_policy(world, "web", net_vf="2")
    assert len(held(world, "web")) == 2
    set_policy(world, "web", net_vf="0")
    assert len(held(world, "web")) == 1


def test_a_dry_run_of_a_policy_changes_nothing(world):
    set_policy(world, "web", net_vf="1")
    [address] = held(world, "web")
    before, audited = world.frozen(), len(world.agent.audit(aw.ROOT, 0, ""))
    answer = world.agent.policy_plan(aw.ROOT, "web", {"device:net.vf": "0", "priority": "51"})
    assert (answer["policy"]["devices"], answer["policy"]["priority"]) == ((), 51)
    texts = [step["text"] for step in answer["plan"]["steps"]]
    assert f"web: detach {address}" in texts
    assert answer["plan"]["decision"]["delta"] == {"device:net.vf": -1}
    assert world.frozen() == before
    assert (held(world, "web"), len(world.agent.audit(aw.ROOT, 0, ""))) == ([address], audited)
    world.host.stop_guest(aw.uuid_of(50))
    world.settle()
    assert world.agent.policy_plan(aw.ROOT, "web", {"device:net.vf": "0"})["plan"] is None


def test_one_that_is_not_let_go_leaves_the_policy_as_it_was(world):
    set_policy(world, "web", net_vf="1")
    world.host.faults.keeps_functions.add(aw.uuid_of(50))
    job = set_policy(world, "web", net_vf="0")
    assert (job["state"], job["error"]["reason"]) == ("refused", "guest-uncooperative")
    assert wishes(world, "web") == [WISH]
    assert len(held(world, "web")) == 1


def test_a_reset_that_fails_after_a_release_is_quarantine(world):
    job = allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.faults.add(Fault(Effect.FAIL, kind="reset-function"))
    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] == "done", released
    assert "reset" in quarantine(world)[address]
    assert held(world, "web") == []
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert address in quarantine(world)
    assert any(address in a for a in alerts(world))


def test_a_function_for_one_use_needs_somebody_to_look_at_it(build):
    world = build(pools=(replace(NET, one_time_use=True),))
    job = allocate(world, "web")
    [address] = world.functions_of("web")
    world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    world.settle()
    assert "one_time_use" in quarantine(world)[address]
    assert drivers(world)[address] is None
    assert world.finish(world.agent.device_release(aw.ROOT, address)["job"])["state"] == "done"
    assert quarantine(world) == {}


def test_a_crashed_guest_gives_its_functions_back(world):
    allocate(world, "web", want="2")
    world.host.stop_guest(aw.uuid_of(50), "crashed")
    world.settle()
    assert {drivers(world)[a] for a in VFS} == {None}
    assert quarantine(world) == {}
    assert allocate(world, "database", want="4")["state"] == "done"


def test_policy_clear_takes_the_functions_home(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    answer = world.agent.policy_clear(aw.ROOT, "web")
    assert world.finish(answer["job"])["state"] == "done"
    world.settle()
    assert world.functions_of("web") == []
    assert drivers(world)[address] is None
    assert quarantine(world) == {}


def test_a_guest_halted_by_an_error_is_told_with_its_functions(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.halt_guest(aw.uuid_of(50))
    world.settle()
    assert any("web was stopped by an error" in a and address in a for a in alerts(world))
    assert "device.guest-halted" in kinds(world, address)
    world.host.resume_guest(aw.uuid_of(50))
    world.settle()
    assert not any("stopped by an error" in a for a in alerts(world))


def test_who_may_let_a_function_out(world):
    with pytest.raises(RefusedError) as caught:
        world.agent.device_release(aw.NOBODY, VFS[0])
    assert caught.value.refusal.reason is Reason.NOT_ALLOWED
    with pytest.raises(RefusedError, match="is not in quarantine"):
        world.agent.device_release(aw.ROOT, VFS[0])
    with pytest.raises(InvalidValueError, match="is not a PCI address"):
        world.agent.device_release(aw.ROOT, "3b")


def test_two_who_ask_at_once_never_get_the_same(world):
    jobs = [
        world.agent.allocate(aw.ROOT, name, {"device:net.vf": "+2"})["job"]
        for name in ("batch", "web")
    ]
    done = [world.finish(job) for job in jobs]
    assert [job["state"] for job in done] == ["done", "done"], [j["error"] for j in done]
    assert len({*world.functions_of("batch"), *world.functions_of("web")}) == 4


@pytest.mark.parametrize("phase", [Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])
@pytest.mark.parametrize("step", ["bind-driver", "set-up-vf", "attach-function"])
def test_a_crash_at_any_step_leaves_nothing(build, phase, step):
    world = build()
    before = world.frozen()
    crash = world.host.faults.add(Fault(Effect.CRASH, phase, kind=step))
    world.agent.allocate(aw.ROOT, "web", {"device:net.vf": "+1"})
    assert crash.reached.wait(aw.DEADLINE_S)
    world.kill_agent()
    world.restart_agent()
    world.settle()
    assert world.frozen() == before
    assert quarantine(world) == {}
    assert allocate(world, "web")["state"] == "done"


def test_pools_get_their_vfs_once(build):
    few = replace(NET, vf_count=2)
    bare = tuple(
        SimulatedFunction(replace(f.shown, vfs=()), limits=f.limits)
        for f in small_devices()
        if f.shown.pf is None
    )
    world = build(pools=(few,), functions=bare)
    made = [a for a, f in world.host.devices.read_functions().items() if f.pf == PF]
    assert len(made) == 2
    job = allocate(world, "web", want="2")
    assert job["state"] == "done", job["error"]
    settings = replace(world.agent._settings, pools=(replace(few, vf_count=4),))
    world.agent.reconfigure(settings, world.topology, world.capacity)
    world.settle()
    assert len(world.functions_of("web")) == 2
    assert any("has 2 VFs and [[device]] asks for 4" in a for a in alerts(world))


def test_a_pool_whose_pf_is_not_there_is_an_alert(build):
    world = build(pools=(replace(NET, vf_count=2),), functions=())
    assert any("net.vf" in a and PF in a for a in alerts(world))


def test_what_is_attached_beside_the_books_is_taken_home(world):
    """The journal was moved away while a guest had a function of ours."""
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.kill_agent()
    world.journal = MemoryJournal()
    world.restart_agent()
    world.settle()
    assert held(world, "web") == []
    assert world.functions_of("web") == []
    assert not shown(world, address)["holder"]
    assert allocate(world, "database", want="4")["state"] == "done"


def test_a_guest_that_became_unmanaged_by_hand_keeps_its_function_in_quarantine(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.host.write_policy(aw.uuid_of(50), None)
    world.settle()
    assert world.functions_of("web") == [address]
    assert "became unmanaged" in quarantine(world)[address]
    assert allocate(world, "database", want="4")["state"] == "refused"
    world.host.stop_guest(aw.uuid_of(50))
    world.agent._lifecycle.enqueue(world.agent._rounds.look_over)
    world.settle()
    assert quarantine(world) == {}
    assert drivers(world)[address] is None


def test_a_departure_that_fails_leaves_the_functions_to_a_later_try(world):
    allocate(world, "web")
    [address] = world.functions_of("web")
    world.journal.failure = JournalError("disk full")
    world.host.stop_guest(aw.uuid_of(50))
    world.host.events.drain()
    assert world.agent._lifecycle._errands.drain(aw.DEADLINE_S)
    world.journal.failure = None
    world.agent._lifecycle.enqueue(world.agent._rounds.look_over)
    world.settle()
    assert held(world, "web") == []
    assert drivers(world)[address] is None
    assert quarantine(world) == {}
