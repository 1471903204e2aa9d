"""Functions over many decisions: judged by a simulated host, and by what books must hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from device_world import (
    IN_USE,
    NET,
    NVME,
    World,
    ask_for,
    device_guest,
    disk,
    inventory_of,
    nic,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.model.decision import Decision
from virtfabric.model.device import Quarantine, device_key
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import NumaMode, RunState
from virtfabric.model.ids import RequestId
from virtfabric.model.plan import Plan
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.request import Mode
from virtfabric.model.units import CpuSet
from virtfabric.policy.arbiter import (
    choose_admission,
    choose_allocation,
    choose_departure,
    choose_release,
)
from virtfabric.policy.bookcheck import check_functions, check_new_functions
from virtfabric.policy.placement import plan_convergence
from virtfabric.policy.wishes import unmet_wishes

if TYPE_CHECKING:
    from virtfabric.model.amounts import Key
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Grant

REQUEST = RequestId("req-1")
NAMES = {"net": NET, "nvme": NVME}
HISTORIES = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def wishes(draw: st.DrawFn) -> list[DevicePolicy]:
    names = draw(st.sampled_from(((NET, NVME), (NET, NVME), (NET,), (NVME,), ())))
    yields = st.sampled_from((True, True, False))
    return [DevicePolicy(n, draw(st.integers(1, 3)), draw(yields)) for n in names]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to eight functions in few groups, some in use or broken; up to four guests."""
    functions = []
    for number in range(draw(st.sampled_from((2, 3, 4, 6, 8)))):
        kind = nic if draw(st.booleans()) else disk
        functions.append(
            kind(
                number, draw(st.sampled_from((number,) * 5 + (40, 41))),
                node=draw(st.sampled_from((0, 1, None))),
                uses=draw(st.sampled_from(((),) * 7 + (IN_USE,))),
                driver=draw(st.sampled_from(("own", "own", None, "vfio-pci"))),
            )
        )  # fmt: skip
    inventory = inventory_of(
        *functions, one_time_use=draw(st.integers(0, 4)) == 0,
        link_speed=draw(st.sampled_from((None, 5000))),
    )  # fmt: skip
    guests = [
        device_guest(
            n, *draw(wishes()), priority=draw(st.sampled_from((10 + 20 * n, 50))),
            free_ports=draw(st.sampled_from((8, 8, 8, 2, 0))),
            numa_mode=draw(st.sampled_from((NumaMode.STRICT, NumaMode.RESTRICTIVE))),
            numa_nodes=CpuSet((draw(st.integers(0, 1)),)),
        )
        for n in range(draw(st.integers(2, 4)))
    ]  # fmt: skip
    world = World.of(inventory, *guests)
    for function in draw(st.lists(st.sampled_from(functions), max_size=1)):
        if not function.uses:
            world.by_hand[function.address] = draw(st.sampled_from(guests)).uuid
    for function in draw(st.lists(st.sampled_from(functions), max_size=1)):
        broken = Quarantine(function.address, "the reset failed", "reboot", 0.0)
        world.books.quarantine[function.address] = broken
    return world


class History:
    """Carries out what is drawn, and checks after each decision what must always hold."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.grants: list[Grant] = []
        functions = world.host.inventory.functions.values()
        self.forbidden = {f.address for f in functions if f.uses or f.bridge} | set(world.by_hand)

    def commit(self, decision: Decision, ends: Grant | None = None) -> Plan:
        world, before = self.world, self.world.books
        victims = {t.victim: t.amounts for t in decision.takes}
        plan, grant = world.commit(decision, ends)
        if grant.amounts:
            self.grants.append(grant)
        after = world.books
        assert check_functions(after, world.host.inventory) == []
        assert check_new_functions(before, after) == []
        assert self.forbidden.isdisjoint(plan.addresses)
        for guest in victims:
            assert world.guests[guest].policy.priority < (
                world.guests[decision.guest].policy.priority
            )
        for guest, functions in plan.functions.items():
            if guest in after.holdings:
                assert after.holdings[guest].functions == functions
        self.check_attached()
        return plan

    def check_attached(self) -> None:
        """What each running guest has is what it holds."""
        for guest, state in self.world.guests.items():
            attached = {a for a, g in self.world.host.attached.items() if g == guest}
            held = set(self.world.held(guest)) if state.active else set()
            assert attached == held

    def allocate(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(sorted(self.world.guests)))
        wants = data.draw(
            st.dictionaries(
                st.sampled_from(("net", "nvme")), st.sampled_from((1, 1, 2, 3, -1)), min_size=1
            )
        )
        partial = data.draw(st.booleans())
        mode = Mode.BY if data.draw(st.booleans()) else Mode.TO
        request = ask_for(guest, mode, partial=partial, **wants)
        answer = choose_allocation(self.world.snapshot(), request)
        if isinstance(answer, Refusal):
            self.check_would_fit(guest, answer)
            return
        before = Counter(self.counts(guest))
        self.commit(answer)
        if not partial and mode is Mode.BY:
            before.update({device_key(NAMES[word]): n for word, n in wants.items()})
            assert self.counts(guest) == {k: n for k, n in before.items() if n}

    def check_would_fit(self, guest: GuestId, refusal: Refusal) -> None:
        assert refusal.detail
        for name, most in refusal.would_fit.items():
            if most:
                request = ask_for(guest, **{name.removeprefix("device:"): most})
                assert isinstance(choose_allocation(self.world.snapshot(), request), Decision)

    def counts(self, guest: GuestId) -> dict[Key, int]:
        holding = self.world.books.holdings.get(guest)
        functions = holding.functions if holding else ()
        return dict(Counter(device_key(f.capability) for f in functions))

    def release(self, data: st.DataObject) -> None:
        open_grants = [g for g in self.grants if g.id in self.world.books.grants]
        if open_grants:
            grant = data.draw(st.sampled_from(open_grants))
            grant = self.world.books.grants[grant.id]
            self.commit(choose_release(self.world.snapshot(), REQUEST, grant), grant)

    def stop(self, data: st.DataObject) -> None:
        running = sorted(g for g, s in self.world.guests.items() if s.active)
        if running:
            self.depart(data.draw(st.sampled_from(running)))

    def depart(self, guest: GuestId) -> None:
        self.world.stop(guest)
        for address in [a for a, g in self.world.by_hand.items() if g == guest]:
            del self.world.by_hand[address]  # libvirt gave it back
            self.forbidden.remove(address)
        self.commit(choose_departure(self.world.snapshot(), guest, REQUEST))
        self.world.departed(guest)
        assert not self.world.held(guest)

    def start(self, data: st.DataObject) -> None:
        off = sorted(g for g, s in self.world.guests.items() if not s.active)
        if off:
            guest = data.draw(st.sampled_from(off))
            snapshot = self.world.snapshot()
            answer = choose_admission(snapshot, snapshot.guests[guest], REQUEST)
            assert isinstance(answer, Decision)
            assert not any(t.amounts[device_key(c)] for c in (NET, NVME) for t in answer.takes)
            plan = self.commit(answer)
            assert not plan.addresses.difference(self.world.held(guest))
            self.world.guests[guest] = self.running(guest)
            self.converge()

    def running(self, guest: GuestId) -> GuestState:
        # its machine has a port for each function that is reserved, whatever else it has
        ports = max(self.world.guests[guest].free_ports, len(self.world.held(guest)) + 1)
        return replace(self.world.guests[guest], state=RunState.RUNNING, pid=1, free_ports=ports)

    def surprise(self, data: st.DataObject) -> None:
        """A function is pulled from under its guest, or another of ours turns up."""
        if self.world.host.attached:
            address = data.draw(st.sampled_from(sorted(self.world.host.attached)))
            del self.world.host.attached[address]
            self.converge()

    def converge(self) -> None:
        plan = plan_convergence(self.world.snapshot(), None, REQUEST)
        assert isinstance(plan, Plan), plan
        self.world.carry_out(plan)
        self.check_attached()
        again = plan_convergence(self.world.snapshot(), None, REQUEST)
        assert isinstance(again, Plan)
        assert not again.addresses

    def wish(self, data: st.DataObject) -> None:
        for guest, wants in unmet_wishes(self.world.snapshot()).items():
            names = {name: want.value for name, want in wants.items()}
            before = sum(self.counts(guest).values())
            request = ask_for(guest, Mode.TO, partial=True, **names)
            answer = choose_allocation(self.world.snapshot(), request)
            assert isinstance(answer, Decision), answer
            self.commit(answer)
            assert sum(self.counts(guest).values()) > before
            return


ACTIONS = ("allocate",) * 6 + ("release", "stop", "start", "surprise", "wish")


@HISTORIES
@given(st.data())
def test_functions_are_never_lost_leaked_or_shared(data: st.DataObject) -> None:
    world = data.draw(worlds())
    first = world.host.state()
    history = History(world)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), min_size=4, max_size=12)):
        getattr(history, action)(data)
    for guest in sorted(world.guests):
        if world.guests[guest].active:
            history.depart(guest)
    last = world.host.state()
    assert last[:4] == first[:4], "drivers, settings, links and attachments are as found"
    assert not world.books.loans
