"""Which function a guest gets, from whom, by which steps, and why it gets none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from device_world import (
    IN_USE,
    KEEPS,
    NET,
    NVME,
    OLD,
    PROFILE,
    WANTED,
    YIELDS,
    A,
    B,
    C,
    World,
    ask_for,
    at,
    decided,
    device_guest,
    disk,
    inventory_of,
    nic,
    refused,
)
from host_data import load_host, make_guest

from virtfabric.model.amounts import Amounts
from virtfabric.model.capability import device_key
from virtfabric.model.decision import Verdict
from virtfabric.model.device import (
    Found,
    GuestDevice,
    HeldFunction,
    Match,
    PciFunction,
    Quarantine,
    VfSettings,
)
from virtfabric.model.errors import Reason
from virtfabric.model.guest import MemoryMechanism, NumaMode, RunState
from virtfabric.model.ids import RequestId
from virtfabric.model.ledger import Holding
from virtfabric.model.plan import (
    AttachFunction,
    BindDriver,
    LimitLink,
    PinVcpu,
    Presence,
    ResetFunction,
    SetNodeset,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.profile import Profile, ProfileFile
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.model.want import Mode
from virtfabric.policy.arbiter import (
    choose_admission,
    choose_allocation,
    choose_departure,
    choose_release,
)
from virtfabric.policy.bookcheck import check_functions, check_new_functions
from virtfabric.policy.handmade import BY_HAND, with_named
from virtfabric.policy.placement import plan_convergence, plan_decision, plan_lift
from virtfabric.policy.pools import members
from virtfabric.policy.standing import capacity_of, floor_of, free
from virtfabric.policy.stock import Stock
from virtfabric.policy.wishes import unmet_wishes

REQUEST = RequestId("req-1")
NET_KEY = device_key(NET)


def allocate(world: World, guest=A, **wants):
    return world.commit(decided(choose_allocation(world.snapshot(), ask_for(guest, **wants))))


def moves(plan):
    """Its steps of functions."""
    return [step for step in plan.steps if hasattr(step, "address")]


def words(plan):
    return [f"{type(s).__name__} {s.address} {s.before}>{s.after}" for s in moves(plan)]


def test_a_free_function_is_bound_set_up_and_attached_and_all_of_it_comes_back():
    world = World.of(inventory_of(nic(1)), device_guest(1))
    first = world.host.state()
    plan, grant = allocate(world, net=1)
    kept = VfSettings(vlan=0, trust=False)
    assert words(plan) == [
        f"BindDriver {at(1)} igbvf>vfio-pci",
        f"SetUpVf {at(1)} {kept}>{WANTED}",
        f"AttachFunction {at(1)} absent>attached",
    ]
    assert plan.functions == {A: (HeldFunction(NET, at(1), Found("igbvf", kept)),)}
    assert world.host.settings[at(1)].mac == OLD.mac
    assert HeldFunction.from_json(plan.functions[A][0].to_json()) == plan.functions[A][0]
    back, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert [type(s) for s in moves(back)] == [AttachFunction, ResetFunction, SetUpVf, BindDriver]
    assert [s.optional for s in moves(back)] == [False, True, True, True]
    assert world.host.state() == first
    assert back.functions == {A: ()}


def test_a_function_goes_from_guest_to_guest_and_home_again():
    world = World.of(
        inventory_of(nic(1)), device_guest(1, YIELDS, priority=10), device_guest(2, priority=90)
    )
    allocate(world, A, net=1)
    plan, grant = allocate(world, B, net=1)
    assert [(type(s), s.guest) for s in moves(plan)] == [
        (AttachFunction, A), (ResetFunction, A), (AttachFunction, B)
    ]  # fmt: skip
    assert not moves(plan)[1].optional, "the next guest must not find anything of this one"
    assert world.held(A) == []
    assert world.books.holdings[B].functions[0].found.driver == "igbvf"
    back, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert (world.held(A), world.held(B)) == ([at(1)], [])
    assert [s.guest for s in moves(back)] == [B, B, A]
    assert not world.books.loans


OTHER = replace(PROFILE, value="1160")
ELSEWHERE = Profile(ProfileFile("vendor/mode"), "7", "-")


def test_a_profile_is_set_before_the_link_and_taken_back_before_the_driver():
    world = World.of(inventory_of(nic(1), profile=PROFILE, vfio_driver="vendor", link_speed=5000),
                     device_guest(1))  # fmt: skip
    first = world.host.state()
    plan, grant = allocate(world, net=1)
    kept = VfSettings(vlan=0, trust=False)
    assert words(plan) == [
        f"BindDriver {at(1)} igbvf>vendor",
        f"SetUpVf {at(1)} {kept}>{WANTED}",
        f"SetProfile {at(1)} 0>1155",
        f"LimitLink {at(30)} 0>5000",
        f"AttachFunction {at(1)} absent>attached",
    ]
    assert moves(plan)[2].file == "vendor/type"
    [held] = plan.functions[A]
    assert (held.found.profile, held.found.vfio_driver) == (PROFILE, "vendor")
    assert HeldFunction.from_json(held.to_json()) == held
    back, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert words(back) == [
        f"AttachFunction {at(1)} attached>absent",
        f"ResetFunction {at(1)} 0>0",
        f"LimitLink {at(30)} 5000>0",
        f"SetUpVf {at(1)} {WANTED}>{kept}",
        f"SetProfile {at(1)} 1155>0",
        f"BindDriver {at(1)} vendor>igbvf",
    ]
    assert [s.optional for s in moves(back)] == [False, *[True] * 5]
    assert world.host.state() == first


def test_what_the_vendors_driver_has_already_is_not_bound_to_another():
    world = World.of(inventory_of(nic(1), profile=PROFILE, vfio_driver="igbvf"), device_guest(1))
    first = world.host.state()
    plan, grant = allocate(world, net=1)
    assert [type(s) for s in moves(plan)] == [SetUpVf, SetProfile, AttachFunction]
    back, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    kinds = [type(s) for s in moves(back)]
    assert kinds == [AttachFunction, ResetFunction, SetUpVf, SetProfile]
    assert world.host.state() == first
    # a guest that is gone leaves the same to do
    allocate(world, net=1)
    world.stop(A)
    plan, _ = world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert [type(s) for s in moves(plan)] == [ResetFunction, SetUpVf, SetProfile]
    assert world.host.state()[:4] == first[:4]


def test_the_rest_of_a_group_goes_to_vfio_pci():
    world = World.of(inventory_of(nic(1, 50), disk(2, 50), vfio_driver="vendor"), device_guest(1))
    plan, _ = allocate(world, net=1)
    assert words(plan)[:2] == [
        f"BindDriver {at(1)} igbvf>vendor", f"BindDriver {at(2)} nvme>vfio-pci",
    ]  # fmt: skip


def test_a_function_that_a_stub_keeps_is_bound_and_its_stubbed_sibling_is_let_be():
    functions = nic(1, 50, driver="pci-stub"), disk(2, 50, driver="pci-stub")
    world = World.of(inventory_of(*functions), device_guest(1))
    snapshot = world.snapshot()
    plan = plan_decision(snapshot, decided(choose_allocation(snapshot, ask_for(A, net=1))))
    binds = [s for s in moves(plan) if isinstance(s, BindDriver)]
    assert [(s.address, s.before, s.after) for s in binds] == [(at(1), "pci-stub", "vfio-pci")]


def pass_on(**later):
    """The steps by which B takes A's function after the pool became another meanwhile."""
    world = World.of(
        inventory_of(nic(1), profile=PROFILE, vfio_driver="vendor"),
        device_guest(1, YIELDS, priority=10), device_guest(2, priority=90),
    )  # fmt: skip
    first = world.host.state()
    allocate(world, A, net=1)
    world.reconfigure(**later)
    plan, grant = allocate(world, B, net=1)
    [held] = plan.functions[B]
    assert (held.found.profile, held.found.vfio_driver, held.found.driver) == (
        later.get("profile", PROFILE), later.get("vfio_driver", "vendor"), "igbvf",
    )  # fmt: skip
    prepares = [s for s in moves(plan) if isinstance(s, SetProfile | BindDriver)]
    assert {s.guest for s in prepares} <= {B}
    world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    world.stop(A)
    world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert world.host.drivers == first[0]
    assert set(world.host.profiles.values()) <= {"0", "-"}
    return [f"{s.before}>{s.after}" for s in prepares]


def test_a_function_keeps_its_profile_on_its_way_from_guest_to_guest():
    assert pass_on() == []


@pytest.mark.parametrize(
    ("later", "steps"),
    [
        ({"profile": OTHER}, ["1155>1160"]),
        ({"profile": None}, ["1155>0"]),
        ({"vfio_driver": "vfio-pci"}, ["1155>0", "vendor>vfio-pci", "0>1155"]),
        ({"vfio_driver": "vfio-pci", "profile": None}, ["1155>0", "vendor>vfio-pci"]),
    ],
)
def test_what_changed_in_its_pool_is_changed_on_its_way(later, steps):
    assert pass_on(**later) == steps


def test_a_profile_in_another_file_replaces_the_first():
    world = World.of(inventory_of(nic(1), profile=PROFILE), device_guest(1, YIELDS, priority=10),
                     device_guest(2, priority=90))  # fmt: skip
    allocate(world, A, net=1)
    snapshot = world.snapshot()
    net, nvme = snapshot.devices.pools
    devices = replace(snapshot.devices, pools=(replace(net, profile=ELSEWHERE), nvme))
    decision = decided(choose_allocation(snapshot, ask_for(B, net=1)))
    plan = plan_decision(replace(snapshot, devices=devices), decision)
    steps = [s for s in moves(plan) if isinstance(s, SetProfile)]
    assert [(s.file, s.before, s.after) for s in steps] == [
        ("vendor/type", "1155", "0"), ("vendor/mode", "-", "7"),
    ]  # fmt: skip


def test_the_way_back_is_that_of_the_profile_that_was_set():
    """The configuration has another one by then, or none, or another driver."""
    for later in ({"profile": OTHER}, {"profile": None}, {"profile": None, "vfio_driver": "other"}):
        world = World.of(
            inventory_of(nic(1), profile=PROFILE, vfio_driver="vendor"), device_guest(1)
        )
        _, grant = allocate(world, net=1)
        world.reconfigure(**later)
        plan, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
        assert [type(s) for s in moves(plan)][1:] == [
            ResetFunction, SetUpVf, SetProfile, BindDriver,
        ]  # fmt: skip
        assert world.host.profiles == {at(1): "0"}


def test_a_profile_went_with_the_driver_that_showed_it():
    """Unbound by hand while in quarantine: where its file was, nothing is to be written."""
    world = World.of(inventory_of(nic(1), profile=PROFILE, vfio_driver="vendor"), device_guest(1))
    allocate(world, net=1)
    world.stop(A)
    world.host.drivers[at(1)] = "igbvf"
    plan = plan_decision(world.snapshot(), choose_departure(world.snapshot(), A, REQUEST))
    assert [type(s) for s in moves(plan)] == [SetUpVf]


def test_a_pool_of_a_driver_keeps_what_a_vendors_vfio_driver_has():
    pool = {"match": Match(driver="igbvf", class_prefix="0200"), "vfio_driver": "vendor"}
    for driver, there in (("igbvf", 1), ("vendor", 1), (None, 1), ("vfio-pci", 1), ("igb", 0)):
        inventory = inventory_of(nic(1, driver=driver))
        pools = (replace(inventory.pools[0], **pool),)
        assert len(members(replace(inventory, pools=pools), NET)) == there, driver


@pytest.mark.parametrize(
    ("wish", "priority", "verdict"),
    [
        (KEEPS, 10, Verdict.NO_MECHANISM), (YIELDS, 90, Verdict.PRIORITY),
        (DevicePolicy(NVME, 1, reclaimable=True), 10, Verdict.NO_MECHANISM),
    ],
)  # fmt: skip
def test_who_does_not_yield_keeps_his_function(wish, priority, verdict):
    world = World.of(
        inventory_of(nic(1)), device_guest(1, wish, priority=priority),
        device_guest(2, priority=90),
    )  # fmt: skip
    allocate(world, A, net=1)
    answer = refused(choose_allocation(world.snapshot(), ask_for(B, net=1)))
    assert answer.reason is Reason.NO_CAPACITY
    assert answer.would_fit == {"device:net.vf": 0}
    assert verdict in answer.considered[0]


def test_what_a_policy_asks_for_is_a_floor_once_it_is_held():
    world = World.of(inventory_of(nic(1), nic(2)), device_guest(1, KEEPS))
    assert floor_of(world.guests[A], world.snapshot())[NET_KEY] == 0
    allocate(world, net=1)
    assert floor_of(world.snapshot().guests[A], world.snapshot())[NET_KEY] == 1
    answer = refused(choose_allocation(world.snapshot(), ask_for(A, net=-1)))
    assert answer.reason is Reason.BELOW_FLOOR
    above = refused(choose_allocation(world.snapshot(), ask_for(A, Mode.TO, net=3)))
    assert (above.reason, above.would_fit) == (Reason.ABOVE_LIMIT, {"device:net.vf": 1})


def answer_for(world, **wants):
    return refused(choose_allocation(world.snapshot(), ask_for(A, **wants)))


def test_refusals_name_what_is_in_the_way():
    world = World.of(inventory_of(nic(1)), device_guest(1, free_ports=0), device_guest(2))
    unknown = answer_for(world, gpu=1)
    assert unknown.reason is Reason.UNKNOWN_CAPABILITY
    assert "net.vf, storage.nvme" in unknown.detail
    port = answer_for(world, net=1)
    assert port.reason is Reason.NO_FREE_PORT
    assert "virtfabric ports add guest1" in port.detail
    world.guests[A] = device_guest(1, free_ports=1)
    both = inventory_of(nic(1), disk(2))
    assert answer_for(replace_inventory(world, both), net=1, nvme=1).reason is Reason.NO_FREE_PORT
    used = replace_inventory(world, inventory_of(nic(1, uses=IN_USE)))
    answer = answer_for(used, net=1)
    assert answer.reason is Reason.DEVICE_IN_USE
    assert any(f"{at(1)}" in line and "eth0 is up" in line for line in answer.considered)
    for guest in (replace(device_guest(1), state=RunState.PAUSED),
                  replace(device_guest(1), state=RunState.SHUTOFF)):  # fmt: skip
        used.guests[A] = guest
        assert answer_for(used, net=1).reason is Reason.NOT_RUNNING
    used.guests[A] = replace(device_guest(1), policy=None)
    assert answer_for(used, net=1).reason is Reason.UNMANAGED_GUEST


def replace_inventory(world, inventory):
    return World.of(inventory, *world.guests.values())


def test_a_group_is_one_guests_or_nobodys():
    inventory = inventory_of(nic(1, 50), nic(2, 50), disk(3, 50))
    world = World.of(inventory, device_guest(1), device_guest(2))
    plan, _ = allocate(world, A, net=1)
    bound = [s.address for s in plan.steps if isinstance(s, BindDriver)]
    assert bound == [at(1), at(2), at(3)], "its siblings leave the host drivers with it"
    siblings = plan.functions[A][0].found.siblings
    assert siblings == ((at(2), "igbvf"), (at(3), "nvme"))
    answer = refused(choose_allocation(world.snapshot(), ask_for(B, nvme=1)))
    assert answer.reason is Reason.GROUP_NOT_VIABLE
    assert any("guest1 holds" in line for line in answer.considered)
    more, _ = allocate(world, A, nvme=1)
    assert not any(isinstance(s, BindDriver) for s in more.steps)
    assert dict(more.functions[A][1].found.siblings) == {at(2): "igbvf"}
    less = decided(choose_allocation(world.snapshot(), ask_for(A, net=-1)))
    plan, _ = world.commit(less)
    assert not any(isinstance(s, BindDriver) for s in plan.steps), "the disk is still attached"
    assert dict(plan.functions[A][0].found.siblings) == {at(1): "igbvf", at(2): "igbvf"}
    world.stop(A)
    world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert world.host.drivers[at(1)] == world.host.drivers[at(2)] == "igbvf"
    assert world.host.drivers[at(3)] == "nvme"


@pytest.mark.parametrize("change", [{"uses": IN_USE}, {"vfs": (at(7),)}])
def test_a_sibling_that_the_host_needs_bars_its_group(change):
    world = World.of(inventory_of(nic(1, 50), disk(3, 50, **change)), device_guest(1))
    assert answer_for(world, net=1).reason in (Reason.GROUP_NOT_VIABLE, Reason.NO_CAPACITY)
    assert capacity_of(world.snapshot())[NET_KEY] == 0


@pytest.mark.parametrize("managed", [True, False])
def test_what_somebody_attached_by_hand_is_not_ours(managed):
    other = device_guest(2)
    other = other if managed else replace(other, policy=None)
    world = World.of(inventory_of(nic(1), nic(2)), device_guest(1), other)
    world.by_hand[at(1)] = B
    plan, _ = allocate(world, A, net=1)
    assert world.held(A) == [at(2)]
    assert answer_for(world, net=1).reason in (Reason.DEVICE_IN_USE, Reason.NO_CAPACITY)
    assert at(1) not in plan.addresses


def test_the_near_function_is_chosen_and_the_others_say_what_they_lost_on():
    inventory = inventory_of(nic(1, node=1), nic(2, node=0))
    guest = device_guest(1, numa_mode=NumaMode.STRICT, numa_nodes=CpuSet((0,)))
    world = World.of(inventory, guest)
    plan, _ = allocate(world, net=1)
    assert world.held(A) == [at(2)]
    assert [o.chosen for o in plan.offers] == [True, False]
    assert "node 0, where its memory is" in plan.offers[0].why
    assert "lost on distance to its memory" in plan.offers[1].why


def test_a_movable_guest_is_pulled_before_the_function_pins_it_and_its_pcpus_follow():
    topology = load_host("two-sockets")
    home, away = (topology.nodes[n].cpus.sorted() for n in (0, 1))
    guest = device_guest(
        1, dedicated=True, numa_mode=NumaMode.RESTRICTIVE, numa_nodes=CpuSet((0,)),
        vcpu_affinity={0: CpuSet((home[2],))},
    )  # fmt: skip
    world = World.of(inventory_of(nic(1, node=1)), guest)
    amounts = Amounts.of(cpu=1000, memory=128 * MIB)
    world.books.holdings[A] = Holding(A, amounts, (home[2],))
    plan, _ = allocate(world, net=1)
    kinds = [type(s) for s in plan.steps]
    assert kinds.index(SetNodeset) < kinds.index(AttachFunction) < kinds.index(PinVcpu)
    assert plan.orders[A][0] in away
    assert "pulled to node 1" in plan.offers[0].why
    # from now on its pages are pinned: growing CPUs never pull it again
    held = world.snapshot().guests[A]
    there = replace(held, vcpu_affinity={0: CpuSet(plan.orders[A])})
    snapshot = world.snapshot()
    snapshot = replace(snapshot, guests={A: there})
    later = plan_convergence(snapshot, [A], REQUEST)
    assert not any(isinstance(s, SetNodeset) for s in later.steps)


def test_one_that_is_known_to_be_near_comes_before_one_of_no_known_node():
    guest = device_guest(1, numa_mode=NumaMode.RESTRICTIVE, numa_nodes=CpuSet((1,)))
    world = World.of(inventory_of(nic(1, node=None), nic(2, node=1)), guest)
    plan, _ = allocate(world, A, net=1)
    assert world.held(A) == [at(2)]
    assert "its node is not known" in plan.offers[1].why
    assert "lost on functions of no known node" in plan.offers[1].why
    # for that alone no memory is pulled
    other = replace(guest, numa_nodes=CpuSet((0,)))
    world = World.of(inventory_of(nic(1, node=None), nic(2, node=1)), other)
    plan, _ = allocate(world, A, net=1)
    assert world.held(A) == [at(1)]


def test_memory_is_not_pulled_only_to_share_a_pf_with_fewer():
    other_pf = PciFunction(at(28), class_code=0x020000, driver="igb", group=128)
    alone = nic(3, node=1, parent=at(29), pf=other_pf.address)
    inventory = inventory_of(nic(1), nic(2), other_pf, alone)
    guest = device_guest(1, numa_mode=NumaMode.RESTRICTIVE, numa_nodes=CpuSet((0,)))
    other = device_guest(2, numa_mode=NumaMode.STRICT, numa_nodes=CpuSet((0,)))
    world = World.of(inventory, guest, other)
    allocate(world, B, net=1)
    assert world.held(B) == [at(1)]
    plan, _ = allocate(world, A, net=1)
    assert world.held(A) == [at(2)]
    assert "pulled to node 1" in plan.offers[1].why
    assert "lost on memory pulled" in plan.offers[1].why


def test_memory_that_can_be_taken_back_and_functions_exclude_each_other():
    guest = device_guest(1, KEEPS, numa_mode=NumaMode.STRICT, numa_nodes=CpuSet((2,)))
    world = World.of(inventory_of(nic(1)), guest)
    snapshot = world.snapshot()
    nodes = dict(snapshot.topology.nodes)
    nodes[2] = replace(nodes[1], number=2, cpus=CpuSet())
    snapshot = replace(snapshot, topology=replace(snapshot.topology, nodes=nodes))
    answer = refused(choose_allocation(snapshot, ask_for(A, net=1)))
    assert answer.reason is Reason.STRANDS_MEMORY
    off = replace(guest, state=RunState.SHUTOFF)
    started = decided(choose_admission(snapshot, off, REQUEST))
    assert started.delta[NET_KEY] == 0
    assert unmet_wishes(snapshot) == {}


def test_a_balloon_that_gave_memory_away_bars_a_function():
    guest = device_guest(1, mechanism=MemoryMechanism.BALLOON, memory_max=512 * MIB)
    world = World.of(inventory_of(nic(1)), guest)
    snapshot = replace(world.snapshot(), lend_ballooned=True)
    answer = refused(choose_allocation(snapshot, ask_for(A, net=1)))
    assert answer.reason is Reason.NO_MECHANISM
    assert decided(choose_allocation(world.snapshot(), ask_for(A, net=1)))


def test_one_time_use_is_quarantined_and_never_passed_on():
    world = World.of(
        inventory_of(nic(1), one_time_use=True), device_guest(1, YIELDS, priority=10),
        device_guest(2, priority=90),
    )  # fmt: skip
    _, grant = allocate(world, A, net=1)
    assert refused(choose_allocation(world.snapshot(), ask_for(B, net=1)))
    plan, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert plan.retired == (at(1),)
    assert "devices release" in world.books.quarantine[at(1)].remedy
    answer = refused(choose_allocation(world.snapshot(), ask_for(B, net=1)))
    assert "one_time_use" in answer.considered[-1]
    assert free(world.snapshot())[NET_KEY] == 0


def test_a_link_is_limited_by_the_first_and_freed_by_the_last():
    world = World.of(inventory_of(disk(1), disk(2)), device_guest(1), device_guest(2))
    _, first = allocate(world, A, nvme=1)
    plan, second = allocate(world, B, nvme=1)
    assert not any(isinstance(s, LimitLink) for s in plan.steps)
    assert world.host.links == {at(29): 8000}
    world.commit(choose_release(world.snapshot(), REQUEST, first), first)
    assert world.host.links == {at(29): 8000}
    world.commit(choose_release(world.snapshot(), REQUEST, second), second)
    assert world.host.links == {at(29): 0}


def test_a_start_reserves_what_is_in_stock_and_attaches_it_once_the_guest_runs():
    guest = device_guest(1, KEEPS, state=RunState.SHUTOFF)
    world = World.of(inventory_of(nic(1)), guest)
    plan, _ = world.commit(decided(choose_admission(world.snapshot(), guest, REQUEST)))
    assert plan.steps == ()
    assert world.held(A) == [at(1)]
    world.guests[A] = replace(guest, state=RunState.RUNNING)
    plan = plan_convergence(world.snapshot(), [A], REQUEST)
    world.carry_out(plan)
    assert world.host.attached == {at(1): A}
    assert unmet_wishes(world.snapshot()) == {}, "its second wish cannot be had"


def test_wishes_come_true_by_priority_when_capacity_comes_back():
    world = World.of(
        inventory_of(nic(1)), device_guest(1, KEEPS, priority=10),
        device_guest(2, KEEPS, priority=90), device_guest(3, free_ports=0),
    )  # fmt: skip
    found = unmet_wishes(world.snapshot())
    assert list(found) == [B, A]
    assert found[B][NET].value == 1
    assert C not in found


def test_convergence_attaches_what_is_missing_and_detaches_what_the_books_do_not_know():
    world = World.of(inventory_of(nic(1), nic(2)), device_guest(1))
    allocate(world, net=1)
    del world.host.attached[at(1)]
    world.host.drivers[at(2)] = "vfio-pci"
    world.host.attached[at(2)] = A
    plan = plan_convergence(world.snapshot(), None, REQUEST)
    attachments = [s for s in plan.steps if isinstance(s, AttachFunction)]
    assert [(s.address, s.after) for s in attachments] == [
        (at(2), Presence.ABSENT),
        (at(1), Presence.ATTACHED),
    ]
    world.carry_out(plan)
    broken = Quarantine(at(1), "the reset failed", "reboot", 0.0)
    world.books.quarantine[at(1)] = broken
    del world.host.attached[at(1)]
    assert not plan_convergence(world.snapshot(), None, REQUEST).addresses


def test_lifting_our_hand_gives_the_functions_back():
    world = World.of(inventory_of(nic(1)), device_guest(1))
    first = world.host.state()
    allocate(world, net=1)
    plan = plan_lift(world.snapshot(), A, REQUEST)
    world.carry_out(plan)
    assert plan.functions == {A: ()}
    assert world.host.state() == first


def test_of_a_function_that_vanished_its_group_and_its_link_come_back():
    """Found by random lives: siblings stayed with vfio-pci and the link stayed slow."""
    world = World.of(inventory_of(nic(1, 50), disk(2, 50), nic(3), link_speed=5000),
                     device_guest(1))  # fmt: skip
    world.books.quarantine[at(3)] = Quarantine(at(3), "why", "how", 0.0)
    _, grant = allocate(world, net=1)
    assert world.host.drivers[at(2)] == "vfio-pci"
    world.vanish(at(1))
    world.books.quarantine.clear()
    allocate(world, net=1)
    assert dict(world.books.holdings[A].functions[0].found.siblings) == {at(2): "nvme"}
    world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    world.stop(A)
    world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert (world.host.drivers[at(2)], world.host.drivers[at(3)]) == ("nvme", "igbvf")
    assert not any(world.host.links.values())


def test_the_link_of_a_function_that_vanished_is_still_limited_for_the_next():
    world = World.of(inventory_of(disk(1), disk(2)), device_guest(1), device_guest(2))
    _, grant = allocate(world, A, nvme=1)
    world.vanish(at(1))
    plan, _ = allocate(world, B, nvme=1)
    assert not any(isinstance(step, LimitLink) for step in plan.steps)
    world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert world.host.links == {at(29): 8000}


def test_a_limit_does_not_outlive_a_function_that_was_pulled_and_put_back():
    """It is in quarantine and not prepared any more when its guest goes: seeds of lives."""
    world = World.of(inventory_of(disk(1)), device_guest(1))
    allocate(world, A, nvme=1)
    world.vanish(at(1))
    world.books.quarantine[at(1)] = Quarantine(at(1), "why", "how", 0.0)
    world.reappear(at(1))
    world.stop(A)
    plan, _ = world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert words(plan) == [f"LimitLink {at(29)} 8000>0"]
    assert world.host.links == {at(29): 0}


def test_a_limit_that_is_there_is_neither_set_again_nor_taken_for_none():
    world = World.of(inventory_of(disk(1)), device_guest(1))
    world.host.links[at(29)] = 8000
    plan, grant = allocate(world, A, nvme=1)
    assert not any(isinstance(step, LimitLink) for step in plan.steps)
    world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    world.host.links[at(29)] = 2500
    plan, _ = allocate(world, A, nvme=1)
    assert f"LimitLink {at(29)} 2500>8000" in words(plan)


def test_where_no_port_tells_its_limit_the_first_sets_it_and_the_last_lifts_it():
    world = World.of(inventory_of(disk(1), disk(2)), device_guest(1), device_guest(2))

    def blind(snapshot):
        functions = {a: replace(f, limit=None) for a, f in snapshot.devices.functions.items()}
        return replace(snapshot, devices=replace(snapshot.devices, functions=functions))

    limits = []
    for guest in (A, B):
        decision = decided(choose_allocation(blind(world.snapshot()), ask_for(guest, nvme=1)))
        plan = plan_decision(blind(world.snapshot()), decision)
        limits.append([w for w in words(plan) if "Limit" in w])
        world.commit(decision)
    assert limits == [[f"LimitLink {at(29)} 0>8000"], []]
    for guest, gone in ((A, []), (B, [f"LimitLink {at(29)} 8000>0"])):
        world.stop(guest)
        decision = choose_departure(blind(world.snapshot()), guest, REQUEST)
        plan = plan_decision(blind(world.snapshot()), decision)
        assert [w for w in words(plan) if "Limit" in w] == gone
        world.commit(decision)
        world.departed(guest)


@pytest.mark.parametrize("grabbed", [1, 2])
def test_what_somebody_attached_by_hand_meanwhile_is_neither_reset_nor_unbound(grabbed):
    """A guest holds one of a group; a stranger has it, or its sibling, when the guest goes."""
    inventory = inventory_of(nic(1, 50), disk(2, 50))
    world = World.of(inventory, device_guest(1), replace(device_guest(2), policy=None))
    allocate(world, A, net=1)
    del world.host.attached[at(1)]  # taken from under it
    world.attach_by_hand(at(grabbed), B)
    assert not plan_convergence(world.snapshot(), None, REQUEST).addresses
    world.stop(A)
    plan, _ = world.commit(choose_departure(world.snapshot(), A, REQUEST))
    assert at(grabbed) not in plan.addresses
    assert world.host.drivers[at(1)] == world.host.drivers[at(2)] == "vfio-pci"


def test_a_function_that_is_back_waits_while_another_guest_has_its_group():
    world = World.of(inventory_of(nic(1, 50), nic(2, 50)), device_guest(1), device_guest(2))
    allocate(world, A, net=1)
    back, there = world.host.inventory.functions[at(1)], world.host.inventory
    world.vanish(at(1))
    allocate(world, B, net=1)
    world.host.inventory = replace(there, functions={**there.functions, at(1): back})
    world.host.drivers[at(1)] = "igbvf"
    world.host.settings[at(1)] = OLD
    assert not plan_convergence(world.snapshot(), None, REQUEST).addresses


def test_a_victim_of_two_functions_in_one_group_gives_neither():
    """One of them alone cannot pass on, and a reclaim of one would take both (documented)."""
    world = World.of(
        inventory_of(nic(1, 50), nic(2, 50)), device_guest(1, YIELDS, priority=10),
        device_guest(2, priority=90),
    )  # fmt: skip
    allocate(world, A, net=2)
    for count in (1, 2):
        answer = refused(choose_allocation(world.snapshot(), ask_for(B, net=count)))
        assert Verdict.NO_MECHANISM in answer.considered[0]


def test_functions_that_a_running_plan_touches_are_left_alone():
    world = World.of(inventory_of(nic(1, 50), nic(2, 50), nic(3)), device_guest(1))
    snapshot = replace(world.snapshot(), working=frozenset((at(1),)))
    decision = decided(choose_allocation(snapshot, ask_for(A, net=1)))
    plan = plan_decision(snapshot, decision)
    assert [f.address for f in plan.functions[A]] == [at(3)]
    answer = refused(choose_allocation(snapshot, ask_for(A, net=2)))
    assert any("a running plan works on" in line for line in answer.considered)


def name_by_hand(world: World, guest, *functions: HeldFunction) -> None:
    """As after `prepare`: what the guest's XML names is with vfio-pci, and so is its group."""
    for function in functions:
        for address in (function.address, *dict(function.found.siblings)):
            world.host.drivers[address] = "vfio-pci"
    world.books = with_named(world.books, guest, functions)


def live_devices(world: World, guest, *addresses):
    """The host with these `<hostdev>` in the guest's live and persistent XML."""
    snapshot = world.snapshot()
    devices = tuple(GuestDevice(one) for one in addresses)
    state = replace(snapshot.guests[guest], devices=devices, config_devices=devices)
    return replace(snapshot, guests={**snapshot.guests, guest: state})


def test_what_a_guests_own_xml_names_is_its_own_and_nobody_elses():
    world = World.of(inventory_of(nic(1), nic(2)), device_guest(1), device_guest(2))
    name_by_hand(world, A, HeldFunction(BY_HAND, at(1), Found("igbvf")))
    stock = Stock(live_devices(world, A, at(1)))
    assert stock.holders == {at(1): A}
    assert stock.strangers == {}
    assert [f.address for f in stock.in_stock(NET_KEY)] == [at(2)]
    answer = refused(choose_allocation(stock.snapshot, ask_for(B, net=2)))
    assert answer.would_fit == {f"device:{NET}": 1}


def test_what_a_running_plan_attaches_is_not_a_strangers():
    world = World.of(inventory_of(nic(1)), device_guest(1))
    snapshot = live_devices(world, A, at(1))
    assert Stock(snapshot).strangers == {at(1): snapshot.guests[A].name}
    assert Stock(replace(snapshot, working=frozenset((at(1),)))).strangers == {}


def test_the_group_of_a_named_function_stays_with_vfio_when_another_of_it_goes_back():
    world = World.of(inventory_of(nic(1, 50), nic(2, 50)), device_guest(1))
    named = HeldFunction(BY_HAND, at(1), Found("igbvf", siblings=((at(2), "igbvf"),)))
    name_by_hand(world, A, named)
    _, grant = allocate(world, net=1)
    assert world.held(A) == [at(2)]
    assert world.books.holdings[A].functions[0].found.driver == "igbvf", "before `prepare`"
    back, _ = world.commit(choose_release(world.snapshot(), REQUEST, grant), grant)
    assert not any(isinstance(step, BindDriver) for step in moves(back))
    assert world.books.holdings[A].named == (named,)


def test_a_balloon_with_a_function_gives_no_memory():
    plain = make_guest(1, mechanism=MemoryMechanism.BALLOON, memory=256 * MIB,
                       memory_max=256 * MIB)  # fmt: skip
    world = World.of(inventory_of(nic(1)), replace(plain, free_ports=1))
    snapshot = replace(world.snapshot(), lend_ballooned=True)
    assert floor_of(snapshot.guests[A], snapshot).memory < 256 * MIB
    world.by_hand[at(1)] = A
    snapshot = replace(world.snapshot(), lend_ballooned=True)
    assert floor_of(snapshot.guests[A], snapshot).memory == Bytes(256 * MIB)


def test_the_checks_of_the_books_find_what_they_look_for():
    inventory = inventory_of(nic(1, 50), nic(2, 50))
    one, two = HeldFunction(NET, at(1)), HeldFunction(NET, at(2))
    world = World.of(inventory, device_guest(1), device_guest(2))
    amounts = Amounts({NET_KEY: 1})
    shared = replace(world.books, holdings={A: Holding(A, amounts, (), (one,)),
                                            B: Holding(B, amounts, (), (one,))})  # fmt: skip
    assert "is held 2 times" in check_functions(shared, inventory)[0]
    group = replace(shared, holdings={**shared.holdings, B: Holding(B, amounts, (), (two,))})
    assert "share IOMMU group 50" in check_functions(group, inventory)[0]
    short = replace(shared, holdings={A: Holding(A, Amounts(), (), (one,))})
    assert "amounts say otherwise" in check_functions(short, inventory)[0]
    broken = replace(world.books, quarantine={at(1): Quarantine(at(1), "why", "how", 0.0)})
    assert "in quarantine" in check_new_functions(broken, group)[0]
    named = with_named(world.books, A, (one,))
    assert "in quarantine" in check_new_functions(broken, named)[0]
    assert check_functions(named, inventory) == []
    assert "is held 2 times" in check_functions(with_named(named, B, (one,)), inventory)[0]
    assert "share IOMMU group" in check_functions(with_named(named, B, (two,)), inventory)[0]
    assert check_new_functions(replace(group, quarantine=broken.quarantine), group) == []
