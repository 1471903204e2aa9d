"""The handler contract on the simulated host, and what only faults can show."""

import threading
from dataclasses import replace

import pytest

from tests.contract.handler_contract import Context, HandlerContract
from tests.contract.simulated_world import (
    ATTACH,
    ATTACH_DIMM,
    ATTACH_MEMORY,
    BALLOON,
    BIND,
    BOUND_VF,
    CRYPTO,
    DETACH_MEMORY,
    DISK,
    EMPTIED,
    GROW,
    PIN,
    PLUG,
    POLICY,
    PROFILE,
    RESET,
    TIERED,
    TYPE,
    VF,
    SimulatedWorld,
)
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.adapters.simulated.devices import NO_SETTINGS, SimulatedFunction
from virtfabric.adapters.simulated.faults import Effect, Fault, Phase, SimulatedCrash
from virtfabric.adapters.simulated.guest import GuestSpec
from virtfabric.adapters.simulated.machines import DATABASE
from virtfabric.model.cardsteps import AssignSlice, BringSlice
from virtfabric.model.device import (
    GuestDevice,
    HostUse,
    PciAddress,
    PciFunction,
    UseKind,
)
from virtfabric.model.devicesteps import (
    BindDriver,
)
from virtfabric.model.errors import (
    DeviceError,
    DeviceGoneError,
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    InvalidValueError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.guest import MemoryMechanism, MemoryRoom
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import (
    STEP_TYPES,
    Definition,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetVcpuCount,
)
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.ports import EventKind


@pytest.fixture
def world():
    return SimulatedWorld()


class TestSimulated(HandlerContract):
    def test_every_step_type_is_in_the_contract(self, world):
        kinds = {s.kind for s in world.steps()} | {RESET.kind}
        of_cards = {BringSlice.kind, AssignSlice.kind}  # test_handlers_cards
        assert kinds == set(STEP_TYPES) - of_cards == world.handlers.kinds

    def test_libvirt_says_yes_and_the_kernel_does_not_follow(self, world):
        for step in world.steps():
            before = world.observe(step)
            world.host.faults.add(Fault(Effect.LOSE, kind=step.kind))
            world.apply(step)
            if not step.needs_guest or step.kind in (
                "set-vcpu-count", "attach-function", "detach-memory"
            ):  # fmt: skip
                assert world.observe(step) == before
                with pytest.raises(VerificationError):
                    world.handlers.for_step(step).verify(step)


def test_undo_of_a_step_of_the_host_fails_without_its_guest_as_well(world):
    world.apply(BIND)
    world.host.stop_guest(DATABASE)
    world.host.faults.add(Fault(Effect.FAIL, Phase.UNDO, kind=BIND.kind))
    handler = world.handlers.for_step(BIND)
    with pytest.raises(DeviceError):
        handler.undo(BIND)
    assert world.observe(BIND).shown.driver == BIND.after
    assert handler.undo(BIND) == 0
    assert (world.observe(BIND).shown.driver or "") == BIND.before


def test_profile_of_somebody_else_is_left_alone(world):
    found = world.host.devices.find(VF)
    found.profiles = {TYPE: "42"}
    with pytest.raises(DeviceError, match="is 42"):
        world.apply(PROFILE)
    assert world.handlers.for_step(PROFILE).undo(PROFILE) == 0
    assert found.profiles == {TYPE: "42"}
    found.profiles, found.user = {TYPE: "0"}, DATABASE
    with pytest.raises(DeviceError, match="still open"):
        world.apply(PROFILE)
    assert found.profiles == {TYPE: "0"}
    found.profiles, found.user = {}, None
    with pytest.raises(DeviceError, match="has no nvidia/current_vgpu_type"):
        world.apply(PROFILE)
    assert world.handlers.for_step(PROFILE).undo(PROFILE) == 0


def test_function_of_a_vendors_vfio_driver_is_opened_under_it(world):
    found = world.host.devices.find(VF)
    world.host.devices.bind(VF, "nvidia")
    attach = replace(ATTACH, address=VF)
    with pytest.raises(HypervisorError, match="is bound to nvidia"):
        world.apply(attach)
    found.vfio_drivers = (*found.vfio_drivers, "nvidia")
    world.apply(attach)
    assert found.user == DATABASE


def test_guest_that_gives_only_some(world):
    world.apply(GROW)
    world.host.faults.gives[DATABASE] = 100 * MIB
    with pytest.raises(ShortfallError) as caught:
        world.apply(GROW.inverse())
    reached = 1 * GIB - 100 * MIB
    assert caught.value.reached == reached
    device = world.host.read_guest(DATABASE).virtio_mem[0]
    assert (device.requested, device.current) == (reached, reached)
    assert world.handlers.for_step(GROW).undo(GROW) == reached - 512 * MIB
    device = world.host.read_guest(DATABASE).virtio_mem[0]
    assert (device.requested, device.current) == (512 * MIB, reached)


def test_memory_device_takes_a_port_a_slot_and_its_node(world):
    world.apply(ATTACH_MEMORY)
    guest = world.host.read_guest(TIERED)
    (device,) = guest.virtio_mem
    assert (device.host_nodes, device.size, device.current) == (CpuSet([1]), GIB, 512 * MIB)
    assert (guest.memory_max, guest.memory_current) == (2 * GIB, GIB + 512 * MIB)
    assert guest.mechanism is MemoryMechanism.VIRTIO_MEM
    assert guest.memory_room == MemoryRoom(1, Bytes(GIB), 0)
    assert guest.free_ports == 3
    nodes = world.host.read_topology().nodes
    assert nodes[1].memory_total - nodes[1].memory_free == 512 * MIB
    world.apply(ATTACH_DIMM)
    guest = world.host.read_guest(TIERED)
    assert guest.memory_room == MemoryRoom(0, Bytes(GIB - 256 * MIB), 0)
    assert guest.free_ports == 3  # it is no PCIe device
    second = replace(ATTACH_MEMORY, alias="ua-virtfabric-cxl0", node=0)
    with pytest.raises(HypervisorError, match="slots"):
        world.apply(second)


def test_memory_device_stays_as_long_as_it_holds_something(world):
    world.apply(ATTACH_MEMORY)
    world.host.faults.gives[TIERED] = 100 * MIB
    handler = world.handlers.for_step(ATTACH_MEMORY)
    assert handler.undo(ATTACH_MEMORY) == 412 * MIB
    (device,) = world.host.read_guest(TIERED).virtio_mem
    assert (device.requested, device.current) == (0, 412 * MIB)
    world.host.faults.clear()
    assert handler.undo(ATTACH_MEMORY) == 0
    assert world.host.read_guest(TIERED).virtio_mem == ()


def test_memory_device_that_holds_something_is_not_detached(world):
    world.apply(ATTACH_MEMORY)
    with pytest.raises(ShortfallError, match="still holds 512MiB"):
        world.apply(replace(DETACH_MEMORY, guest=TIERED))
    assert len(world.host.read_guest(TIERED).virtio_mem) == 1


def test_empty_memory_device_that_the_guest_keeps(world):
    world.host.faults.keeps_memory_devices.add(EMPTIED)
    with pytest.raises(ShortfallError, match="does not let it go"):
        world.apply(DETACH_MEMORY)
    world.host.faults.clear()
    world.apply(DETACH_MEMORY)
    guest = world.host.read_guest(EMPTIED)
    assert (guest.virtio_mem, guest.free_ports, guest.memory_room.slots) == ((), 4, 2)


def test_memory_device_that_the_guest_fills_too_little(world):
    world.host.faults.takes[TIERED] = 64 * MIB
    with pytest.raises(ShortfallError) as caught:
        world.apply(ATTACH_MEMORY)
    assert caught.value.reached == 64 * MIB
    assert world.handlers.for_step(ATTACH_MEMORY).undo(ATTACH_MEMORY) == 0


def test_guest_that_stops_inside_the_tolerance_is_fine_and_leaves_a_residue(world):
    world.host.faults.gives[DATABASE] = 508 * MIB
    world.apply(GROW)
    assert world.handlers.for_step(GROW).undo(GROW) == 4 * MIB


def test_guest_that_takes_too_little(world):
    world.host.faults.takes[DATABASE] = 64 * MIB
    with pytest.raises(ShortfallError) as caught:
        world.apply(GROW)
    assert caught.value.reached == 576 * MIB


def test_vcpu_that_does_not_leave(world):
    world.apply(PLUG)
    world.host.faults.keeps_vcpus.add(DATABASE)
    with pytest.raises(ShortfallError):
        world.apply(PLUG.inverse())
    assert world.handlers.for_step(PLUG).undo(PLUG) == 1
    world.host.faults.clear()
    assert world.handlers.for_step(PLUG).undo(PLUG) == 0


@pytest.mark.parametrize(
    ("effect", "phase", "error"),
    [
        (Effect.FAIL, Phase.APPLY, HypervisorError),
        (Effect.FAIL, Phase.VERIFY, VerificationError),
        (Effect.FAIL, Phase.UNDO, HypervisorError),
        (Effect.VANISH, Phase.APPLIED, GuestGoneError),
        (Effect.VANISH, Phase.VERIFY, GuestGoneError),
        (Effect.DISCONNECT, Phase.APPLY, HypervisorGoneError),
        (Effect.DISCONNECT, Phase.UNDO, HypervisorGoneError),
        (Effect.CRASH, Phase.APPLIED, SimulatedCrash),
        (Effect.CRASH, Phase.VERIFIED, SimulatedCrash),
    ],
)
def test_faults_strike_where_they_are_put(world, effect, phase, error):
    fault = world.host.faults.add(Fault(effect, phase, kind="pin-vcpu"))
    handler = world.handlers.for_step(PIN)
    world.apply(PLUG)

    def all_three():
        handler.apply(PIN, Context())
        handler.verify(PIN)
        handler.undo(PIN)

    with pytest.raises(error):
        all_three()
    assert fault.reached.is_set()


def test_fault_waits_for_its_turn(world):
    world.host.faults.add(Fault(Effect.FAIL, skip=2))
    for _ in range(2):
        world.apply(PIN)
    with pytest.raises(HypervisorError):
        world.apply(PIN)
    world.apply(PIN)


def test_slow_step_opens_is_cancelled_or_times_out(world):
    handler = world.handlers.for_step(GROW)

    def start():
        fault = world.host.faults.add(Fault(Effect.HOLD))
        context, errors = Context(), []

        def run():
            try:
                handler.apply(GROW, context)
            except (ShortfallError, StepCancelledError) as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert fault.reached.wait(5)
        return fault, context, errors, thread

    fault, context, errors, thread = start()
    context.cancelled.set()
    thread.join(5)
    assert isinstance(errors[0], StepCancelledError)

    fault, context, errors, thread = start()
    world.clock.advance(31)
    thread.join(5)
    assert errors[0].reached == 512 * MIB

    fault, context, errors, thread = start()
    fault.gate.set()
    thread.join(5)
    assert not errors
    handler.verify(GROW)


@pytest.mark.parametrize(
    "step",
    [
        PinVcpu(guest=DATABASE, vcpu=0, before=CpuSet(), after=CpuSet([99])),
        PinVcpu(guest=DATABASE, vcpu=9, before=CpuSet(), after=CpuSet([1])),
        SetVcpuCount(guest=DATABASE, before=2, after=5),
        SetQuota(guest=DATABASE, before=-1, after=1),
        SetBalloon(guest=DATABASE, before=GIB, after=MIB),
        SetBalloon(guest=BALLOON, before=GIB, after=2 * GIB),
        SetNodeset(guest=DATABASE, before=CpuSet(), after=CpuSet([7])),
        ResizeVirtioMem(guest=DATABASE, alias="nope", before=0, after=0),
        ResizeVirtioMem(guest=DATABASE, alias="ua-vm0", before=0, after=MIB),
    ],
)
def test_what_a_host_cannot_do(world, step):
    before = world.host.kernel(step.guest)
    with pytest.raises(HypervisorError):
        world.apply(step)
    assert world.host.kernel(step.guest) == before


def test_pin_of_a_vcpu_that_is_not_plugged_does_nothing(world):
    step = PinVcpu(guest=DATABASE, vcpu=3, before=CpuSet(), after=CpuSet([1]))
    before = world.host.kernel(DATABASE)
    world.apply(step)
    world.handlers.for_step(step).verify(step)
    assert world.host.kernel(DATABASE) == before


def test_registry_refuses_two_for_one_and_unknown(world):
    handler = world.handlers.for_step(PIN)
    with pytest.raises(InvalidValueError, match="pin-vcpu"):
        HandlerRegistry([handler, handler])
    with pytest.raises(InvalidValueError, match="pin-vcpu"):
        HandlerRegistry([]).for_step(PIN)


def test_the_policy_of_a_definition_is_undone_when_its_guest_has_stopped(world):
    """Unlike what is live, it does not end with the guest."""
    step = SetPolicy(guest=BALLOON, definition=Definition.CONFIG, before="", after=POLICY)
    world.apply(step)
    world.handlers.for_step(step).verify(step)
    assert world.host.read_guest(BALLOON).config_policy_text == POLICY
    assert world.host.read_guest(BALLOON).policy_text == ""
    world.vanish(step)
    assert world.host.read_guest(BALLOON).policy.priority == 77
    assert world.handlers.for_step(step).undo(step) == 0
    assert world.host.read_guest(BALLOON).policy is None


def test_function_comes_and_goes_as_libvirt_tells(world):
    events = []
    world.host.events.start(events.append)
    world.apply(ATTACH)
    state = world.host.read_guest(DATABASE)
    assert state.devices == (GuestDevice(BOUND_VF, "ua-virtfabric-0000-01-10-2"),)
    assert state.devices[0].ours
    assert state.free_ports == 3
    world.apply(ATTACH.inverse())
    world.handlers.for_step(ATTACH).verify(ATTACH.inverse())
    assert world.host.read_guest(DATABASE).devices == ()
    world.host.events.drain()
    world.host.events.close()
    told = [(e.guest, e.detail) for e in events if e.kind is EventKind.DEVICE_REMOVED]
    assert told == [(DATABASE, "ua-virtfabric-0000-01-10-2")]


def test_guest_that_ignores_the_request_to_unplug(world):
    world.apply(ATTACH)
    world.host.faults.keeps_functions.add(DATABASE)
    with pytest.raises(ShortfallError) as caught:
        world.apply(ATTACH.inverse())
    assert caught.value.reached == 1
    assert world.handlers.for_step(ATTACH).undo(ATTACH) == 1
    world.host.let_go(DATABASE, BOUND_VF)
    assert world.handlers.for_step(ATTACH).undo(ATTACH) == 0
    assert world.host.read_guest(DATABASE).devices == ()


def test_function_is_with_one_guest_and_its_driver_stays(world):
    world.apply(ATTACH)
    other = replace(ATTACH, guest=BALLOON)
    with pytest.raises(HypervisorError):
        world.apply(other)
    away = BindDriver(guest=DATABASE, address=BOUND_VF, before="vfio-pci", after="")
    with pytest.raises(DeviceError, match="still open"):
        world.apply(away)
    world.host.stop_guest(DATABASE)
    world.apply(away)
    with pytest.raises(HypervisorError, match="no driver"):
        world.apply(other)


def test_reset_cleans_what_a_guest_left_and_fails_where_there_is_none(world):
    world.apply(ATTACH)
    with pytest.raises(DeviceError, match="still open"):
        world.apply(RESET)
    world.apply(ATTACH.inverse())
    with pytest.raises(VerificationError):
        world.handlers.for_step(RESET).verify(RESET)
    world.apply(RESET)
    world.handlers.for_step(RESET).verify(RESET)
    assert world.handlers.for_step(RESET).undo(RESET) == 0
    world.handlers.for_step(RESET).verify(RESET)
    world.host.devices.change(BOUND_VF, resets=())
    with pytest.raises(DeviceError):
        world.apply(RESET)


def test_function_that_vanishes_is_undone(world):
    world.apply(BIND)
    world.apply(ATTACH)
    for address in (CRYPTO, BOUND_VF):
        world.host.remove_function(address)
    assert world.host.read_guest(DATABASE).devices == ()
    for step in (ATTACH, BIND):
        assert world.handlers.for_step(step).undo(step) == 0
        with pytest.raises(DeviceGoneError):
            world.apply(step)


def test_what_the_host_uses_keeps_its_driver(world):
    with pytest.raises(DeviceError, match="nvme0n1p1 on /"):
        world.apply(BindDriver(guest=DATABASE, address=DISK, before="nvme", after="vfio-pci"))
    world.host.devices.change(CRYPTO, uses=(HostUse(UseKind.NETWORK, "eth9 is up"),))
    world.apply(replace(BIND, after=""))  # bound to nothing as it is: nothing is taken from it
    world.host.devices.change(CRYPTO, driver="crypto")
    with pytest.raises(DeviceError, match="eth9 is up"):
        world.apply(BIND)


def test_guest_without_a_free_port(world):
    spec = GuestSpec(GuestId("00000000-0000-4000-8000-000000000003"), "full", ports=0)
    world.host.start_guest(spec)
    with pytest.raises(HypervisorError, match="PCI slots"):
        world.apply(replace(ATTACH, guest=spec.uuid))


def test_functions_that_a_definition_names(world):
    """libvirt binds those it manages, and gives them back when the guest stops."""
    spec = GuestSpec(
        GuestId("00000000-0000-4000-8000-000000000003"), "byhand",
        functions=(GuestDevice(VF, managed=True), GuestDevice(BOUND_VF)),
    )  # fmt: skip
    world.host.start_guest(spec)
    assert world.host.devices.read_functions()[VF].driver == "vfio-pci"
    state = world.host.read_guest(spec.uuid)
    assert state.devices == state.config_devices == spec.functions
    with pytest.raises(HypervisorError, match="in use"):
        world.apply(ATTACH)
    world.host.stop_guest(spec.uuid)
    assert world.host.devices.read_functions()[VF].driver is None
    world.apply(ATTACH)


def test_tree_tells_of_changes(world):
    calls = []
    world.host.devices.watch(calls.append)
    world.apply(BIND)
    world.host.remove_function(CRYPTO)
    assert len(calls) == 2
    world.host.devices.close()
    world.host.remove_function(VF)
    assert len(calls) == 2
    assert CRYPTO not in world.host.devices.read_functions()


def test_guest_whose_function_is_not_to_be_had_does_not_start(world):
    """And what libvirt had bound for it already goes back."""
    spec = GuestSpec(
        GuestId("00000000-0000-4000-8000-000000000003"), "byhand",
        functions=(GuestDevice(VF, managed=True), GuestDevice(DISK, managed=True)),
    )  # fmt: skip
    with pytest.raises(HypervisorError, match="nvme0n1p1 on /"):
        world.host.start_guest(spec)
    functions = world.host.devices.read_functions()
    assert (functions[VF].driver, functions[DISK].driver) == (None, "nvme")
    assert world.host.kernel(spec.uuid) is None


def test_vfs_are_made_once(world):
    pf = PciAddress("0000:05:00.0")
    world.host.devices.plug(
        SimulatedFunction(PciFunction(pf, class_code=0x020000, driver="igb", group=50, vfs_max=7))
    )
    assert [world.host.devices.ensure(pf, count) for count in (3, 3, 5)] == [3, 3, 3]
    functions = world.host.devices.read_functions()
    vfs = [functions[address] for address in functions[pf].vfs]
    assert [vf.address for vf in vfs] == ["0000:05:10.0", "0000:05:10.1", "0000:05:10.2"]
    assert [(vf.pf, vf.vf_index, vf.driver, vf.settings) for vf in vfs] == [
        (pf, index, None, NO_SETTINGS) for index in range(3)
    ]
    assert len({f.group for f in functions.values()} - {None}) == len(functions)
    with pytest.raises(DeviceError, match="it can have 7"):
        world.host.devices.ensure(pf, 8)
