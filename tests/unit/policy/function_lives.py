"""Lives of a small host with functions: few functions, guests who want the same ones, mishaps.

Functions are so few, and ask so many for them, that lives are about reclaim and return; `LEAST` in
the test says how often each thing must have happened at least. What must hold is checked after
each decision and each repair.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, TypeVar

from device_world import (
    IN_USE,
    NET,
    NVME,
    PROFILE,
    World,
    ask_for,
    device_guest,
    disk,
    inventory_of,
    nic,
)

from virtfabric.model.capability import capability_of, device_key
from virtfabric.model.decision import Decision
from virtfabric.model.device import Quarantine
from virtfabric.model.devicesteps import SetProfile
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import NumaMode, RunState
from virtfabric.model.ids import RequestId
from virtfabric.model.plan import Plan, SetNodeset
from virtfabric.model.policy import DevicePolicy
from virtfabric.model.units import CpuSet
from virtfabric.model.want import Mode
from virtfabric.policy.arbiter import (
    choose_admission,
    choose_allocation,
    choose_departure,
    choose_release,
)
from virtfabric.policy.bookcheck import check_functions, check_new_functions
from virtfabric.policy.placement import plan_convergence
from virtfabric.policy.standing import capacity_of, free, held_of
from virtfabric.policy.stock import Stock
from virtfabric.policy.wishes import unmet_wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from virtfabric.model.amounts import Key
    from virtfabric.model.device import PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Grant, HostSnapshot

T = TypeVar("T")
REQUEST = RequestId("req-1")
NAMES = {"net": NET, "nvme": NVME}
PRIORITIES = (10, 30, 50, 50, 90)
FAR_NODE = 2
"""Of `device_world.three_nodes`: memory without CPUs, which can be taken back."""


def make_world(draw: Random) -> World:
    """Two to four functions of one or two pools; three or four guests who all want them."""
    kinds = draw.choice(((nic,), (disk,), (nic, disk)))
    functions = [
        kinds[number % len(kinds)](
            number, draw.choice((number,) * 6 + (40,)),
            node=draw.choice((0, 1, None)),
            uses=draw.choice(((),) * 15 + (IN_USE,)),
            driver=draw.choice(("own", "own", "own", None, "vfio-pci")),
        )
        for number in range(draw.choice((2, 2, 3, 3, 4)))
    ]  # fmt: skip
    inventory = inventory_of(
        *functions, one_time_use=draw.randint(0, 9) == 0,
        link_speed=draw.choice((None, 5000)),
        vfio_driver=draw.choice(("vfio-pci", "own", "vendor")),
        profile=draw.choice((None, PROFILE, PROFILE)),
    )  # fmt: skip
    names = [NET] * (nic in kinds) + [NVME] * (disk in kinds)
    ranks = draw.sample(PRIORITIES, len(PRIORITIES))
    guests = [_managed(draw, n, names, ranks[n]) for n in range(draw.choice((3, 3, 4)))]
    for number in range(draw.choice((0, 1, 1))):
        guests.append(replace(device_guest(10 + number), policy=None))
    world = World.of(inventory, *guests)
    if draw.randint(0, 2) == 0:
        function = draw.choice(functions)
        if not function.uses:
            world.attach_by_hand(function.address, draw.choice(guests).uuid)
    return world


def _managed(draw: Random, number: int, names: list[str], priority: int) -> GuestState:
    yields = (True, True, True, True, False)
    wishes = [DevicePolicy(name, draw.randint(2, 3), draw.choice(yields)) for name in names]
    if draw.randint(0, 9) == 0:
        wishes = []
    home = draw.choice((0, 0, 0, 0, 0, 1, 1, 1, 1, 1, FAR_NODE))
    return device_guest(
        number, *wishes, priority=priority,
        free_ports=draw.choice((8, 8, 8, 8, 1)),
        numa_mode=draw.choice((NumaMode.STRICT, NumaMode.RESTRICTIVE)),
        numa_nodes=CpuSet((home,)),
    )  # fmt: skip


class Life:
    """Carries out what is drawn, and checks after each decision what must always hold."""

    def __init__(self, world: World, seen: Counter[str], draw: Random) -> None:
        self.world = world
        self.seen = seen
        self.draw = draw
        self.grants: list[Grant] = []
        self.meddled: set[PciAddress] = set()

    def pick(self, choices: Iterable[T]) -> T | None:
        """One of them; None where there is none."""
        found = sorted(choices, key=str)
        return self.draw.choice(found) if found else None

    def decide(self, choose: Callable[[HostSnapshot], T]) -> T:
        """The answer, which does not depend on the order in which the host was read."""
        snapshot = self.world.snapshot()
        devices = snapshot.devices
        turned = replace(
            snapshot,
            guests=dict(reversed(snapshot.guests.items())),
            devices=replace(devices, functions=dict(reversed(devices.functions.items()))),
            books=replace(
                snapshot.books,
                holdings=dict(reversed(snapshot.books.holdings.items())),
                loans=dict(reversed(snapshot.books.loans.items())),
            ),
        )
        answer = choose(snapshot)
        assert choose(turned) == answer
        return answer

    def commit(self, decision: Decision, ends: Grant | None = None) -> Plan:
        world, before = self.world, self.world.books
        untouchable = self.untouchable()
        for back in decision.returns:
            loan = before.loans[back.loan]
            assert loan.victim == back.victim
            assert not (back.amounts - loan.amounts).positive(), "more comes home than was lent"
        plan, grant = world.commit(decision, ends)
        if grant.amounts:
            self.grants.append(grant)
        assert check_functions(world.books, world.host.inventory) == []
        assert check_new_functions(before, world.books) == []
        assert untouchable.isdisjoint(plan.addresses)
        for take in decision.takes:
            victim = world.guests[take.victim].policy
            assert victim.priority < world.guests[decision.guest].policy.priority
            for wish in victim.devices:
                assert wish.reclaimable or not take.amounts[device_key(wish.capability)]
        for guest, functions in plan.functions.items():
            if guest in world.books.holdings:
                assert world.books.holdings[guest].functions == functions
        self.check_sum()
        self.check_attached()
        self.seen["takes"] += any(_moves(take.amounts) for take in decision.takes)
        self.seen["returns"] += any(_moves(back.amounts) for back in decision.returns)
        self.seen["profiles"] += any(isinstance(step, SetProfile) for step in plan.steps)
        self.seen["pulls"] += any(isinstance(step, SetNodeset) for step in plan.steps)
        return plan

    def untouchable(self) -> set[PciAddress]:
        """What no step may name: what the host uses, and what somebody's own hand attached."""
        functions = self.world.host.inventory.functions.values()
        return {f.address for f in functions if f.uses} | set(self.world.by_hand)

    def check_sum(self) -> None:
        """A pool is what is free and what is held, and nothing is lost between decisions."""
        snapshot = self.world.snapshot()
        holdings = snapshot.books.holdings
        for key in Stock(snapshot).keys:
            held = sum(held_of(snapshot, guest)[key] for guest in holdings)
            rest = free(snapshot)[key]
            assert rest >= 0
            assert rest + held == capacity_of(snapshot)[key]
            pool = {one.address for one in Stock(snapshot).members(key)}
            ours = {f.address for h in holdings.values() for f in h.functions}
            assert held == len(ours & pool) + sum(
                device_key(f.capability) == key and f.address not in pool
                for h in holdings.values() for f in h.functions
            )  # fmt: skip

    def check_attached(self) -> None:
        """A running guest has what it holds, but for what nobody can be given now."""
        stock = Stock(self.world.snapshot())
        for guest, state in self.world.guests.items():
            attached = {a for a, g in self.world.host.attached.items() if g == guest}
            held = set(self.world.held(guest)) if state.active else set()
            assert attached <= held
            assert all(stock.objections(address) for address in held - attached)

    # -- what people ask for ----------------------------------------------------------------

    def allocate(self) -> None:
        """Somebody wants more or less."""
        managed = (g for g, s in self.world.guests.items() if s.managed)
        self.ask(managed, (1, 1, 1, 1, 2, 2, 3, -1))

    def climb(self) -> None:
        """One of the two highest that run wants one more."""
        running = (g for g, s in self.world.guests.items() if s.managed and s.active)
        self.ask(sorted(running, key=lambda g: self.world.guests[g].policy.priority)[-2:], (1,))

    def ask(self, guests: Iterable[GuestId], wanted: tuple[int, ...]) -> None:
        guest = self.pick(guests)
        if guest is None:
            return
        pools = [word for word, name in NAMES.items() if self.world.has_pool(name)]
        words = self.draw.choice((*((p,) for p in pools), tuple(pools)))
        wants = {word: self.draw.choice(wanted) for word in words}
        partial = self.draw.randint(0, 3) == 0
        mode = self.draw.choice((Mode.BY, Mode.BY, Mode.TO))
        request = ask_for(guest, mode, partial=partial, **wants)
        answer = self.decide(lambda snapshot: choose_allocation(snapshot, request))
        if isinstance(answer, Refusal):
            self.seen[answer.reason] += 1
            self.check_would_fit(guest, answer)
            return
        before = Counter(self.counts(guest))
        self.commit(answer)
        if not partial and mode is Mode.BY:
            before.update({device_key(NAMES[word]): n for word, n in wants.items()})
            assert self.counts(guest) == {k: n for k, n in before.items() if n}, "all or nothing"

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

    def release(self) -> None:
        """A borrower gives a grant back, if there is any."""
        grants = self.world.books.grants
        lent = {loan.grant for loan in self.world.books.loans.values()}
        name = self.pick(lent & grants.keys() or grants)
        if name is not None:
            grant = grants[name]
            decision = self.decide(lambda snapshot: choose_release(snapshot, REQUEST, grant))
            self.commit(decision, grant)
            assert not any(loan.grant == name for loan in self.world.books.loans.values())

    def wish(self) -> None:
        """What policies ask for comes true, as far as it can by now."""
        for guest, wants in self.decide(unmet_wishes).items():
            names = {name: want.value for name, want in wants.items()}
            before = sum(self.counts(guest).values())
            request = ask_for(guest, Mode.TO, partial=True, **names)
            answer = choose_allocation(self.world.snapshot(), request)
            assert isinstance(answer, Decision), answer
            self.commit(answer)
            assert sum(self.counts(guest).values()) > before
            self.seen["wishes"] += 1
            return

    # -- lives of guests --------------------------------------------------------------------

    def stop(self) -> None:
        guest = self.pick(g for g, s in self.world.guests.items() if s.active)
        if guest is not None:
            self.depart(guest)

    def depart(self, guest: GuestId) -> None:
        self.world.stop(guest)
        if self.world.guests[guest].managed:
            self.commit(self.decide(lambda s: choose_departure(s, guest, REQUEST)))
            self.world.departed(guest)
            assert not self.world.held(guest)
        self.converge()

    def start(self) -> None:
        guest = self.pick(g for g, s in self.world.guests.items() if not s.active)
        if guest is None:
            return
        if self.world.guests[guest].managed:
            answer = self.decide(lambda s: choose_admission(s, s.guests[guest], REQUEST))
            assert isinstance(answer, Decision)
            assert not any(_moves(take.amounts) for take in answer.takes)
            plan = self.commit(answer)
            assert not plan.addresses.difference(self.world.held(guest))
        self.world.guests[guest] = self.running(guest)
        self.converge()

    def running(self, guest: GuestId) -> GuestState:
        # its machine has a port for each function that is reserved, whatever else it has
        ports = max(self.world.guests[guest].free_ports, len(self.world.held(guest)) + 1)
        return replace(self.world.guests[guest], state=RunState.RUNNING, pid=1, free_ports=ports)

    # -- mishaps ----------------------------------------------------------------------------

    def pull_out(self) -> None:
        """A function is taken from under its guest; it is still there and comes back."""
        address = self.pick(self.world.host.attached)
        if address is not None:
            del self.world.host.attached[address]
            self.converge()

    def vanish(self) -> None:
        """A function is gone from the host, whoever had it."""
        address = self.pick(self.world.present)
        if address is not None and address not in self.world.by_hand:
            mates = [m.address for m in self.world.host.inventory.group_of(address)]
            self.world.vanish(address)
            if self.draw.random() < 0.5:  # a card with all that is on it
                for mate in set(mates) & set(self.world.present) - self.world.by_hand.keys():
                    self.world.vanish(mate)
            self.seen["vanished"] += 1
            self.converge()

    def reappear(self) -> None:
        """One that was gone is there again, as new."""
        address = self.pick(self.world.gone)
        if address is not None:
            self.world.reappear(address)
            self.converge()

    def quarantine(self) -> None:
        address = self.pick(self.world.present)
        if address is not None:
            broken = Quarantine(address, "the reset failed", "reboot", 0.0)
            self.set_quarantine(self.world.books.quarantine | {address: broken})

    def let_out(self) -> None:
        address = self.pick(self.world.books.quarantine)
        rest = {a: q for a, q in self.world.books.quarantine.items() if a != address}
        self.set_quarantine(rest)

    def set_quarantine(self, quarantine: dict[PciAddress, Quarantine]) -> None:
        self.world.books = replace(self.world.books, quarantine=quarantine)
        self.converge()

    def grab(self) -> None:
        """An operator gives an unmanaged guest a function, by hand: whichever libvirt lets him."""
        takers = [g for g, s in self.world.guests.items() if s.active and not s.managed]
        address = self.pick(self.world.open_to_hands())
        if takers and address is not None:
            if self.world.host.drivers[address] == "vfio-pci":
                self.meddled.add(address)  # libvirt gives it back as it found it
            self.meddled |= {address} & set(self.world.held_addresses())
            self.world.attach_by_hand(address, takers[0])
            self.seen["grabbed"] += 1
            self.converge()

    def converge(self) -> None:
        def mend(snapshot: HostSnapshot) -> Plan | Refusal:
            return plan_convergence(snapshot, None, REQUEST)

        plan = self.decide(mend)
        assert isinstance(plan, Plan), plan
        assert self.untouchable().isdisjoint(plan.addresses)
        self.world.carry_out(plan)
        self.check_attached()
        again = mend(self.world.snapshot())
        assert isinstance(again, Plan)
        assert not again.addresses


def _moves(amounts: Iterable[Key]) -> bool:
    """Whether functions are among them."""
    return any(capability_of(key) is not None for key in amounts)


MISHAPS = ("pull_out", "vanish", "reappear", "quarantine", "let_out", "grab")
ACTIONS = ("allocate", "climb") * 6 + ("release", "start") * 4 + ("stop", "wish") * 2 + MISHAPS


def live(seed: int, seen: Counter[str]) -> None:
    """A life from its beginning until everybody has gone: then the host is as it was found."""
    draw = Random(seed)
    world = make_world(draw)
    found = dict(world.host.inventory.functions)
    life = Life(world, seen, draw)
    for action in draw.choices(ACTIONS, k=draw.randint(10, 30)):
        getattr(life, action)()
    for guest in sorted(world.guests):
        if world.guests[guest].active:
            life.depart(guest)
    for address in world.host.inventory.functions.keys() - life.meddled:
        assert world.host.drivers[address] == (found[address].driver or "")
        assert world.host.settings.get(address) == found[address].settings
        assert world.host.profiles.get(address, PROFILE.none) == PROFILE.none
    assert not any(world.host.links.values())
    assert not world.host.attached
    assert not world.books.loans
