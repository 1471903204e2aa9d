"""The invariants of architecture.md, over random lives of a whole agent on a simulated host.

Short and always the same; with `VIRTFABRIC_LIVES=600 VIRTFABRIC_STEPS=25` a long search through
other lives each time.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import agent_world as aw
from examples import examples
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Search
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from virtfabric.adapters.simulated.devices import SimulatedFunction, small_devices
from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.capability import device_key
from virtfabric.model.device import VFIO_PCI, DevicePool, Match, PciAddress, PciFunction, VfSettings
from virtfabric.model.errors import InvalidValueError, RefusedError
from virtfabric.model.ids import JobId
from virtfabric.model.plan import PinVcpu
from virtfabric.model.policy import DevicePolicy, GuestPolicy, Placement
from virtfabric.model.profile import Profile, ProfileFile
from virtfabric.model.units import MIB, CpuSet

CORES = 6
MEMORY_MIB = 2600
LEASE_S = 3600
NAMES = {"batch": 10, "web": 50, "database": 90, "pinned": 70}
POLICIES = (
    {"priority": "5"},
    {"priority": "95"},
    {"cpu": "250m:1"},
    {"cpu": "1:3"},
    {"cpu": "2:4"},
    {"memory": "256M:512M"},
    {"memory": "768M:2G"},
    {"shares": "300"},
    {"placement": "dedicated"},
    {"placement": "shared"},
)

PF = PciAddress("0000:01:00.0")
TYPE = ProfileFile("vendor/type")
PROFILE = Profile(TYPE, "1155", "0")
POOLS = (
    DevicePool("net.vf", Match(pf=PF), VfSettings(vlan=7, trust=True), profile=PROFILE),
    DevicePool(
        "crypto.aes", Match(ids=frozenset({"1234:11e8"})), one_time_use=True, profile=PROFILE,
        vfio_driver="vendor",
    ),
    DevicePool("storage.nvme", Match(class_prefix="0108")),
)  # fmt: skip
"""The last one's only function is the host's boot disk."""
WISHES = {
    "batch": (DevicePolicy("net.vf", 2, reclaimable=True),),
    "web": (DevicePolicy("net.vf", 1), DevicePolicy("crypto.aes", 1, reclaimable=True)),
    "pinned": (DevicePolicy("storage.nvme", 1),),
}
ASSIGNABLE = tuple(f.shown.address for f in small_devices() if f.shown.pf or not f.shown.driver)
VFIO_DRIVERS = {PciAddress("0000:03:00.0"): "vendor"}
CAPABILITIES = ("net.vf", "crypto.aes", "storage.nvme")

MUCH = (
    {"cpu": "+1", "memory": "+512M", "device:net.vf": "+1"},
    {"memory": "+64M", "device:crypto.aes": "+1"},
    {"device:net.vf": "-1"},
    {"cpu": "+1", "memory": "+512M"},
    {"cpu": "+500m", "memory": "+128M"},
    {"memory": "+64M"},
    {"cpu": "-500m", "memory": "-64M"},
    {"memory": "-64M"},
)
"""Something to go wrong with, the longest plan first."""

names = st.sampled_from(sorted(NAMES))
nth = st.integers(0, 9)
phases = st.sampled_from([Phase.APPLY, Phase.APPLIED, Phase.VERIFY, Phase.VERIFIED])


def _devices() -> tuple[SimulatedFunction, ...]:
    devices = small_devices()
    for one in devices:
        one.profiles = {TYPE: PROFILE.none}
        one.vfio_drivers = (VFIO_DRIVERS.get(one.shown.address, VFIO_PCI),)
    return devices


def _specs() -> tuple[object, ...]:
    return (
        aw.make_spec(10, "batch", 10, vcpus=2, initial_mib=512, devices=WISHES["batch"]),
        aw.make_spec(50, "web", 50, initial_mib=256, devices=WISHES["web"]),
        aw.make_spec(90, "database", 90),
        aw.make_spec(
            70, "pinned", 70, cpu=(1000, 3000), placement=Placement.DEDICATED,
            devices=WISHES["pinned"],
        ),
    )  # fmt: skip


def _words(policy: GuestPolicy) -> dict[str, str]:
    cpu, memory = policy.cpu, policy.memory
    assert cpu.limit is not None
    assert memory.limit is not None
    return {
        "priority": str(policy.priority),
        "cpu": f"{int(cpu.reservation)}m:{int(cpu.limit)}m",
        "memory": f"{memory.reservation // MIB}M:{memory.limit // MIB}M",
        "shares": str(cpu.shares),
        "placement": cpu.placement.value,
    }


class Life(RuleBasedStateMachine):
    """What may happen to a host, in any order; what may never happen, never does."""

    def __init__(self) -> None:
        super().__init__()
        self.world = aw.AgentWorld(
            specs=_specs(), cores=CORES, memory_mib=MEMORY_MIB, functions=_devices(),
            settings={"pools": POOLS},
        )  # fmt: skip
        self.at_home = {a: (f.driver, f.settings) for a, f in self._functions().items()}
        self.taken_out: list[SimulatedFunction] = []
        self.world.start()
        self.world.settle()

    def teardown(self) -> None:
        self.world.close()

    def _running(self, name: str) -> bool:
        return bool(self.world.live(name).active)

    def _check_frozen(
        self, before: dict[str, Any], job: object = None, *, functions: bool = True
    ) -> None:
        """Nothing is live but what was before; what differs is told, and nothing else."""
        now = self._frozen(functions=functions)
        assert {k: (v, now.get(k)) for k, v in before.items() if now.get(k) != v} == {}, job

    def _frozen(self, *, functions: bool = True) -> dict[str, Any]:
        """Guests, with the functions that they have; the functions have their own invariant."""
        frozen = self.world.frozen()
        return {name: frozen[name] if functions else frozen[name][:-1] for name in NAMES}

    def _functions(self) -> dict[PciAddress, PciFunction]:
        return self.world.host.devices.read_functions()

    def _quarantine(self) -> list[str]:
        found = self.world.agent.devices(aw.ROOT)
        return [f["address"] for f in found if f["quarantine"]]

    def _find_much(self) -> tuple[str, dict[str, str], int] | None:
        """Something that would be granted now: for whom, what, and in how many steps."""
        for name in ("database", "pinned", "web", "batch"):
            for wants in MUCH:
                with contextlib.suppress(RefusedError):
                    if steps := self.world.agent.plan(aw.ROOT, name, wants)["steps"]:
                        return name, wants, len(steps)
        return None

    def _ask_for(self, name: str, wants: dict[str, str], **more: str) -> str:
        wants = wants | {"deadline": "1"} | more
        return str(self.world.agent.allocate(aw.ROOT, name, wants)["job"])

    # -- what people ask for --------------------------------------------------------------------

    @rule(
        name=names,
        cpu=st.sampled_from(["", "+1", "-1", "+500m", "2", "4"]),
        memory=st.sampled_from(["", "+128M", "-64M", "+512M", "+2M"]),
        partial=st.sampled_from(["yes", "no"]),
        lease=st.booleans(),
    )
    def allocate(self, name: str, cpu: str, memory: str, partial: str, lease: bool) -> None:
        wants = {k: v for k, v in (("cpu", cpu), ("memory", memory)) if v}
        if not wants:
            return
        if lease:
            wants["for"] = f"{LEASE_S}s"
        before = self._frozen()
        job = self.world.allocate(name, partial=partial, deadline="2", **wants)
        assert job["state"] in ("done", "refused"), job
        if job["state"] == "refused":
            self._check_frozen(before)

    @rule(
        name=names,
        capability=st.sampled_from(CAPABILITIES),
        want=st.sampled_from(["+1", "-1", "0", "2", "+3"]),
        partial=st.sampled_from(["yes", "no"]),
        lease=st.booleans(),
    )
    def allocate_functions(
        self, name: str, capability: str, want: str, partial: str, lease: bool
    ) -> None:
        wants = {f"device:{capability}": want, "deadline": "2", "partial": partial}
        if lease:
            wants["for"] = f"{LEASE_S}s"
        before = self._frozen()
        job = self.world.allocate(name, **wants)
        assert job["state"] in ("done", "refused"), job
        if job["state"] == "refused":
            self._check_frozen(before)

    @rule()
    def quarantine_is_released(self) -> None:
        for address in self._quarantine():
            with contextlib.suppress(RefusedError):
                job = self.world.agent.device_release(aw.ROOT, address)["job"]
                assert self.world.finish(job)["state"] == "done"

    @rule(first=names, second=names)
    def two_ask_at_once(self, first: str, second: str) -> None:
        wants = {"cpu": "+1", "memory": "+384M", "device:net.vf": "+1"}
        jobs = [self.world.agent.allocate(aw.ROOT, name, wants)["job"] for name in (first, second)]
        for job in jobs:
            assert self.world.finish(job)["state"] in ("done", "refused")

    @rule(choice=st.integers(0, 1000))
    def release(self, choice: int) -> None:
        grants = [g["id"] for g in self.world.agent.grants(aw.ROOT)]
        if grants:
            grant = grants[choice % len(grants)]
            job = self.world.finish(self.world.agent.release(aw.ROOT, grant)["job"])
            assert job["state"] == "done", job

    @rule()
    def leases_end(self) -> None:
        leased = {g["id"] for g in self.world.agent.grants(aw.ROOT) if g["expires"]}
        self.world.clock.leap(LEASE_S + 1)
        self.world.agent._leases._look()
        self.world.agent._rounds.tick()
        self.world.settle()
        assert not leased & {g["id"] for g in self.world.agent.grants(aw.ROOT)}

    @rule(name=names, changes=st.sampled_from(POLICIES))
    def policy_changes(self, name: str, changes: dict[str, str]) -> None:
        before = self.world.live(name).policy
        job = self._set_policy(name, changes)
        if job and job["state"] == "refused":
            # it cannot have what the new policy reserves: the operator takes it back
            back = self._set_policy(name, _words(before))
            assert back is None or back["state"] == "done", back

    def _set_policy(self, name: str, changes: dict[str, str]) -> dict[str, Any] | None:
        try:
            job = self.world.agent.policy_set(aw.ROOT, name, changes)["job"]
        except InvalidValueError:
            return None
        if job is None:
            return None
        done = self.world.finish(job)
        assert done["state"] in ("done", "refused"), done
        return done

    # -- what guests and libvirt do -------------------------------------------------------------

    @rule(name=names)
    def stop_or_start(self, name: str) -> None:
        if self._running(name):
            self.world.host.stop_guest(aw.uuid_of(NAMES[name]))
            self.world.settle()
            assert self.world.guest(name)["cpu"]["grant"] is None
            return
        before = self._frozen()
        if self.world.virsh_start(name):
            self._check_frozen(before)
        else:
            self.world.settle()
            assert self.world.guest(name)["cpu"]["grant"]

    @rule(name=names, mib=st.integers(0, 64))
    def stop_short(self, name: str, mib: int) -> None:
        self.world.host.faults.gives[aw.uuid_of(NAMES[name])] = mib * MIB
        before = self._frozen()
        job = self.world.finish(self._ask_for("database", MUCH[0]))
        self.world.host.faults.clear()
        if job["state"] != "done":
            self._check_frozen(before)

    @rule(name=names, late=st.booleans())
    def keep_functions(self, name: str, late: bool) -> None:
        """The guest ignores the request to let one go, and perhaps follows it long after."""
        guest = aw.uuid_of(NAMES[name])
        self.world.host.faults.keeps_functions.add(guest)
        had = self.world.functions_of(name)
        done = self.world.finish(self._ask_for("database", {"device:net.vf": "+2"}))
        assert done["state"] in ("done", "refused"), done
        self.world.settle()
        assert set(had) <= set(self.world.functions_of(name))
        self.world.host.faults.clear()
        if late and had:
            self.world.host.let_go(guest, PciAddress(had[0]))

    @rule(name=names, resets=st.booleans())
    def let_go_unasked(self, name: str, resets: bool) -> None:
        had = self.world.functions_of(name)
        if not had:
            return
        if not resets:
            self.world.host.faults.add(Fault(Effect.FAIL, kind="reset-function"))
        self.world.host.let_go(aw.uuid_of(NAMES[name]), PciAddress(had[0]))
        self.world.settle()
        self.world.host.faults.clear()

    @rule(which=st.sampled_from(ASSIGNABLE))
    def taken_out_of_the_host(self, which: PciAddress) -> None:
        if self.world.host.devices.knows(which):
            found = self.world.host.devices.find(which)
            self.world.host.remove_function(which)
            shown = replace(found.shown, driver=None, driver_override=None)
            driver, settings = self.at_home[which]
            fresh = replace(shown, driver=driver, settings=settings)
            self.taken_out.append(
                SimulatedFunction(
                    fresh, limits=found.limits, profiles={TYPE: PROFILE.none},
                    vfio_drivers=found.vfio_drivers,
                )
            )  # fmt: skip

    @rule()
    def put_in_again(self) -> None:
        if self.taken_out:
            self.world.host.devices.plug(self.taken_out.pop())

    @rule(name=names, undo_fails=st.sampled_from(["", "attach-function", "resize-virtio-mem"]))
    def an_attach_fails_and_cannot_be_undone(self, name: str, undo_fails: str) -> None:
        guest = aw.uuid_of(NAMES[name])
        self.world.host.faults.keeps_functions.add(guest)
        self.world.host.faults.add(Fault(Effect.FAIL, Phase.VERIFY, kind="attach-function"))
        if undo_fails:
            self.world.host.faults.add(Fault(Effect.FAIL, Phase.UNDO, kind=undo_fails))
        done = self.world.finish(self._ask_for(name, {"device:net.vf": "+1", "memory": "+64M"}))
        assert done["state"] in ("refused", "failed"), done
        self.world.agent._conductor.unfinished.finish()
        self.world.host.faults.clear()
        self.world.agent._lifecycle.enqueue(self.world.agent._rounds.look_over)

    @rule(
        name=names,
        kind=st.sampled_from(["reset-function", "set-up-vf", "set-profile", "bind-driver"]),
        phase=phases,
        undone=st.booleans(),
    )
    def a_way_home_fails(self, name: str, kind: str, phase: Phase, undone: bool) -> None:
        """A function cannot be restored; then perhaps libvirt goes away before all is committed."""
        before = self._frozen()
        self.world.host.faults.add(Fault(Effect.FAIL, phase, kind=kind))
        if undone:
            self.world.host.faults.add(Fault(Effect.DISCONNECT, Phase.APPLY, kind="bind-driver"))
        job = self.world.finish(self._ask_for(name, {"device:net.vf": "-1"}))
        assert job["state"] in ("done", "refused", "failed"), job
        self.world.host.faults.clear()
        self.world.host.reconnect()
        self.world.settle()
        if job["state"] != "done":
            self._check_frozen(before, job)

    @rule(name=names, cpu=st.integers(0, CORES - 1))
    def pinned_by_hand(self, name: str, cpu: int) -> None:
        state = self.world.live(name)
        if not state.active:
            return
        was = state.vcpu_affinity[0]
        self.world.host.change_beside(
            PinVcpu(guest=state.uuid, vcpu=0, before=was, after=CpuSet([cpu]))
        )
        self.world.host.events.drain()
        job = self.world.finish(self.world.agent.drift_repair(aw.ROOT)["job"])
        assert job["state"] == "done", job
        assert self.world.live(name).vcpu_affinity[0] == was

    @rule()
    def libvirtd_restarts(self) -> None:
        before = self._frozen()
        self.world.host.disconnect()
        job = self.world.finish(self._ask_for("database", MUCH[0]))
        assert job["state"] in ("failed", "refused"), job
        self.world.host.reconnect()
        self.world.settle()
        self._check_frozen(before)

    @rule(name=names)
    def guest_stops_while_libvirtd_is_away(self, name: str) -> None:
        self.world.host.disconnect()
        self.world.host.stop_guest(aw.uuid_of(NAMES[name]))
        self.world.host.reconnect()
        self.world.settle()
        assert self.world.guest(name)["cpu"]["grant"] is None

    # -- what goes wrong in mid-plan ------------------------------------------------------------

    @rule(
        effect=st.sampled_from([Effect.FAIL, Effect.VANISH, Effect.DISCONNECT]),
        phase=phases,
        step=nth,
        undo_fails=st.booleans(),
    )
    def a_step_fails(self, effect: Effect, phase: Phase, step: int, undo_fails: bool) -> None:
        if (much := self._find_much()) is None:
            return
        name, wants, steps = much
        before, running = self._frozen(), self.world.host.read_guests()
        self.world.host.faults.add(Fault(effect, phase, skip=step % steps))
        if undo_fails:
            self.world.host.faults.add(Fault(Effect.FAIL, Phase.UNDO))
        job = self.world.finish(self._ask_for(name, wants))
        self.world.host.faults.clear()
        self.world.host.reconnect()
        self.world.agent._lifecycle.enqueue(self.world.agent._rounds.look_over)
        self.world.settle()
        now = self.world.host.read_guests()
        if job["state"] != "done" and all(now[g].pid == running[g].pid for g in now):
            self._check_frozen(before, job)

    @rule(step=nth)
    def the_caller_cancels(self, step: int) -> None:
        if (much := self._find_much()) is None:
            return
        name, wants, steps = much
        before = self._frozen()
        hold = self.world.host.faults.add(Fault(Effect.HOLD, skip=step % steps))
        job = self._ask_for(name, wants, deadline="5")
        assert hold.reached.wait(aw.DEADLINE_S)
        self.world.agent.job_cancel(aw.ROOT, JobId(job))
        done = self.world.finish(job)
        self.world.host.faults.clear()
        assert done["state"] == "cancelled", done
        self._check_frozen(before)

    @rule(phase=phases, step=nth)
    def the_agent_is_killed(self, phase: Phase, step: int) -> None:
        if (much := self._find_much()) is None:
            return
        name, wants, steps = much
        # the next run tries again to bring home what is in quarantine, and may meet wishes with it
        certain = not self._quarantine()
        before = self._frozen(functions=certain)
        crash = self.world.host.faults.add(Fault(Effect.CRASH, phase, skip=step % steps))
        self._ask_for(name, wants)
        assert crash.reached.wait(aw.DEADLINE_S)
        self.world.kill_agent()
        self.world.restart_agent()
        self.world.settle()
        self._check_frozen(before, functions=certain)

    # -- what may never happen ------------------------------------------------------------------

    @invariant()
    def nobody_is_wronged(self) -> None:
        self.world.settle()  # each does: hypothesis calls them in the order of their names
        guests = [g for g in self.world.agent.guests(aw.ROOT) if g["cpu"]["grant"] is not None]
        assert {g["name"] for g in guests} == {n for n in NAMES if self._running(n)}
        for guest in guests:
            cpu, memory = guest["cpu"], guest["memory"]
            assert cpu["floor"] <= cpu["grant"] <= cpu["limit"], guest
            # what its definition boots it with is the operator's word, and counts in full
            spec = self.world.spec(guest["name"])
            boots_with = spec.boot_memory + sum(d.initial for d in spec.devices)
            assert memory["floor"] <= memory["grant"] <= max(memory["limit"], boots_with), guest
        assert sum(g["cpu"]["grant"] for g in guests) <= CORES * 1000
        overhead = self.world.overhead_mib * MIB
        assert sum(g["memory"]["grant"] + overhead for g in guests) <= MEMORY_MIB * MIB

    @invariant()
    def no_pcpu_in_two_dedicated_sets(self) -> None:
        self.world.settle()
        states = [g for g in self.world.host.read_guests().values() if g.active]
        own = [g for g in states if g.policy.cpu.placement is Placement.DEDICATED]
        taken = [c for g in own for c in frozenset().union(*g.vcpu_affinity.values())]
        assert len(taken) == len(set(taken))
        for guest in states:
            if guest not in own:
                for cpus in guest.vcpu_affinity.values():
                    assert not cpus & set(taken)

    @invariant()
    def no_function_is_lost_leaked_or_shared(self) -> None:
        self.world.settle()
        books = self.world.agent._ledger.view().books
        holdings = {g: h for g, h in books.holdings.items() if h.functions}
        held = [f.address for h in holdings.values() for f in h.functions]
        attached = {n: self.world.functions_of(n) for n in NAMES if self._running(n)}
        assert len(held) == len(set(held))
        assert sorted(held) == sorted(a for functions in attached.values() for a in functions)
        for holding in books.holdings.values():
            for capability in CAPABILITIES:
                count = sum(f.capability == capability for f in holding.functions)
                assert holding.amounts[device_key(capability)] == count, holding
        for address, function in self._functions().items():
            profile = self.world.host.devices.find(address).profiles[TYPE]
            if address in held:
                assert function.driver == VFIO_DRIVERS.get(address, VFIO_PCI)
                assert profile == PROFILE.value
            elif address not in books.quarantine:
                assert (function.driver, function.settings) == self.at_home[address], address
                assert profile == PROFILE.none
        assert "0000:02:00.0" not in {*held, *books.quarantine}  # the boot disk
        assert not set(held) & books.quarantine.keys()

    @invariant()
    def journal_and_audit_are_whole(self) -> None:
        self.world.settle()
        assert self.world.journal.open_transactions() == ()
        assert self.world.agent._ledger.view().busy == frozenset()
        assert self.world.agent.audit_verify(aw.ROOT, "")["whole"]
        loans = self.world.agent.loans(aw.ROOT)
        # what an admission borrowed has no grant of its own and names its request
        lent = {loan["grant"] for loan in loans if not loan["grant"].startswith("req-")}
        assert lent <= {g["id"] for g in self.world.agent.grants(aw.ROOT)}


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=int(os.environ.get("VIRTFABRIC_LIVES", str(examples(20)))),
    stateful_step_count=int(os.environ.get("VIRTFABRIC_STEPS", "12")),
    derandomize="VIRTFABRIC_LIVES" not in os.environ,
    database=None,
    deadline=None,
    phases=[Search.generate],  # a failure may wait for its deadline: shrinking would take an hour
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def test_a_victim_of_an_admission_is_capped_at_what_it_still_holds() -> None:
    """A random life found it: the books took CPU from batch at `prepare`, its cap stayed."""
    life = Life()
    try:
        life.stop_or_start("pinned")
        life.allocate("web", "4", "", "no", lease=False)
        life.allocate("web", "-1", "+2M", "no", lease=False)
        for name in ("database", "pinned", "database"):
            life.stop_or_start(name)
            life.nobody_is_wronged()
    finally:
        life.teardown()


def test_what_was_bound_for_a_guest_that_is_gone_goes_home_though_its_first_undo_failed() -> None:
    """A random life found it: the guest was gone, and with it the undo of the binding."""
    life = Life()
    try:
        life.stop_or_start("web")
        life.allocate("pinned", "4", "+512M", "no", lease=True)
        life.allocate("batch", "2", "", "yes", lease=True)
        life.allocate("batch", "", "+128M", "no", lease=False)
        life.a_step_fails(Effect.VANISH, Phase.VERIFY, 2, undo_fails=True)
        life.journal_and_audit_are_whole()
        life.no_function_is_lost_leaked_or_shared()
    finally:
        life.teardown()
