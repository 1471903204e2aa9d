"""Lives of a small host with two kinds of memory: little of each, and guests who want the same.

What must hold is summed up here from devices and books alone, guest by guest and node by node,
with nothing of `policy.tiers`; it is checked after every decision.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from host_data import BLOCK, BOOT_MEMORY, guest_id, snapshot_of

from virtfabric.model.amounts import CXL_KEY, MEMORY_KEY, Amounts, Key, Tier
from virtfabric.model.devicesteps import Presence
from virtfabric.model.errors import Refusal
from virtfabric.model.guest import GuestState, MemoryRoom, NumaMode, RunState, VirtioMem
from virtfabric.model.ids import GrantId, LoanId
from virtfabric.model.ledger import Books, Grant, HostSnapshot
from virtfabric.model.memorysteps import AttachMemory, DetachMemory
from virtfabric.model.plan import Plan, ResizeVirtioMem
from virtfabric.model.reclaim import Claim, Recall
from virtfabric.model.request import AGENT, Origin, Request
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.model.want import Mode, Want
from virtfabric.policy.arbiter import (
    choose_admission,
    choose_allocation,
    choose_departure,
    choose_release,
)
from virtfabric.policy.homecall import plan_homecall, waiting_for
from virtfabric.policy.loans import depart, settle
from virtfabric.policy.placement import plan_convergence, plan_decision
from virtfabric.policy.returnability import held_memory, reclaimable
from virtfabric.policy.standing import capacity_of, free

if TYPE_CHECKING:
    from collections import Counter

    from virtfabric.model.decision import Decision
    from virtfabric.model.host import Capacity
    from virtfabric.model.ids import GuestId
    from virtfabric.model.step import Step

from tier_hosts import CXL, FUNCTION, REQUEST, RESERVE, four_nodes, make_guests


def _by_alias(guests: dict[GuestId, GuestState]) -> dict[GuestId, GuestState]:
    """A device that left and came back is the last one."""
    return {
        uuid: replace(guest, virtio_mem=tuple(sorted(guest.virtio_mem, key=lambda d: d.alias)))
        for uuid, guest in guests.items()
    }


class Life:
    """Carries out what is drawn on the guests' devices, and checks what must always hold."""

    def __init__(self, draw: Random, seen: Counter[str]) -> None:
        self.draw = draw
        self.seen = seen
        self.defined = {guest.uuid: guest for guest in make_guests(draw)}
        self.guests = dict(self.defined)
        self.books = Books(7)
        self.now = 0
        self.quarantine: set[int] = set()
        offlinable = draw.choice((frozenset(CXL), frozenset(CXL), frozenset((2,))))
        self.topology = four_nodes(offlinable=offlinable)
        dram = len(self.guests) * (BOOT_MEMORY + 12 * BLOCK)
        base = snapshot_of(self.topology, reserve=RESERVE, overhead=0)
        self.capacity = replace(
            base.capacity, memory={0: Bytes(dram // 2), 1: Bytes(dram // 2)},
            cxl={node: Bytes(draw.choice((3, 6, 9, 14)) * BLOCK) for node in CXL},
        )  # fmt: skip

    def snapshot(self, **fields: object) -> HostSnapshot:
        base = snapshot_of(self.topology, self.guests.values())
        return replace(base, **{"capacity": self.grantable(), "books": self.books} | fields)

    def grantable(self) -> Capacity:
        return self.capacity.without(dict.fromkeys(self.quarantine, "in quarantine"))

    # -- what people do ---------------------------------------------------------------------

    def running(self) -> list[GuestId]:
        return sorted(g for g, s in self.guests.items() if s.active)

    def request(self, guest: GuestId) -> Request:
        tier = self.draw.choice((None, Tier.DRAM, *(Tier.CXL,) * 5))
        amount = self.draw.choice((1, 2, 3, 3, 5, 5, 8, 13, -1, -3)) * BLOCK
        if self.draw.randint(0, 15) == 0:
            amount += 4096
        mode = Mode.BY
        if self.draw.randint(0, 4) == 0 and amount > 0:
            mode, amount = Mode.TO, amount + (0 if tier is Tier.CXL else BOOT_MEMORY)
        return Request(
            REQUEST, guest, AGENT, Origin.DBUS, memory=Want(mode, amount), tier=tier,
            partial=self.draw.randint(0, 3) == 0,
        )  # fmt: skip

    def allocate(self) -> None:
        """Somebody wants more or less."""
        if self.running():
            self.ask(self.draw.choice(self.running()))

    def climb(self) -> None:
        """The highest of those that run does."""
        ranks = {guest: self.guests[guest].policy.priority for guest in self.running()}
        if ranks:
            self.ask(max(ranks, key=lambda guest: (ranks[guest], guest)))

    def ask(self, guest: GuestId) -> None:
        request = self.request(guest)
        answer = choose_allocation(self.snapshot(), request)
        if isinstance(answer, Refusal):
            self.refused(answer)
        else:
            plan = self.place(self.snapshot(), answer)
            if plan is not None:
                self.check_request(request, answer)
                self.commit(answer, plan)

    def allocate_two_at_once(self) -> None:
        """The second is decided while the plan of the first one runs, as the ledger lets it."""
        if len(self.running()) < 2:
            return
        first, second = self.draw.sample(self.running(), 2)
        snapshot = self.snapshot()
        one = choose_allocation(snapshot, self.request(first))
        if isinstance(one, Refusal) or (plan := self.place(snapshot, one)) is None:
            return
        touched = {*plan.guests, *(one.holdings or {}), first}
        pending = one.from_free.positive() + plan.node_needs
        beside = self.snapshot(pending=pending, busy=frozenset(touched))
        two = choose_allocation(beside, self.request(second))
        if isinstance(two, Refusal) or (other := self.place(beside, two)) is None:
            self.commit(one, plan)
            return
        if touched.isdisjoint({*other.guests, *(two.holdings or {}), second}):
            self.seen["at once"] += 1
            self.commit(one, plan, alone=False)
            self.commit(two, other)
        else:
            self.commit(one, plan)

    def place(self, snapshot: HostSnapshot, decision: Decision) -> Plan | None:
        plan = plan_decision(snapshot, decision)
        if isinstance(plan, Refusal):
            self.refused(plan)
            return None
        return plan

    def refused(self, refusal: Refusal) -> None:
        assert refusal.detail
        self.seen[refusal.reason] += 1

    def release(self) -> None:
        grants = [g for g in self.books.grants.values() if self.guests[g.guest].active]
        if grants:
            grant = self.draw.choice(sorted(grants, key=lambda g: g.id))
            decision = choose_release(self.snapshot(), REQUEST, grant)
            plan = self.place(self.snapshot(), decision)
            assert plan is not None, "what goes back goes back"
            self.commit(decision, plan, ends=grant)

    def call_home(self) -> None:
        """All of a node comes back, guest by guest, and what is empty leaves."""
        node = self.draw.choice(CXL)
        detach = self.draw.randint(0, 2) > 0
        fields = {
            "capacity": self.grantable().without({node: "called home"}),
            "recall": Recall(frozenset({node}), detach),
        }
        claim = Claim(CXL_KEY, self.draw.choice((2 * BLOCK, 100 * BLOCK)), node, detach=detach)
        left, before = claim.size, self.on_node(node)
        while left > 0:
            snapshot = replace(self.snapshot(), **fields)
            home = plan_homecall(snapshot, replace(claim, size=left), {})
            if not home.plan.parts:
                break
            guest = home.plan.parts[0].guest
            gift = home.plan.gift(guest)
            waiting = waiting_for(self.guests[guest], snapshot)
            want = Want(Mode.BY, -gift - waiting)
            request = Request(REQUEST, guest, AGENT, Origin.AGENT, memory=want, tier=Tier.CXL)
            decision = choose_allocation(snapshot, request)
            assert not isinstance(decision, Refusal), decision
            plan = plan_decision(snapshot, decision)
            assert not isinstance(plan, Refusal), plan
            has, lacking = self.on_node(node), sum(map(self.lacks, self.books.holdings))
            self.commit(decision, plan)
            assert self.on_node(node) == has - gift, "it came from the node, all of it"
            assert sum(map(self.lacks, self.books.holdings)) <= lacking, "went home to nowhere"
            left -= gift
            self.seen["called home"] += 1
        assert self.on_node(node) == max(0, before - claim.size), "no more and no less"

    def fail(self) -> None:
        """A node goes to quarantine, or leaves it; nobody's memory moves for that."""
        self.quarantine = set() if self.quarantine else {self.draw.choice(CXL)}
        self.seen["in quarantine"] += len(self.quarantine)
        self.check()

    def start(self) -> None:
        waiting = sorted(g for g, s in self.guests.items() if not s.active)
        if not waiting:
            return
        guest = self.draw.choice(waiting)
        answer = choose_admission(self.snapshot(), self.guests[guest], REQUEST)
        if isinstance(answer, Refusal):
            self.refused(answer)
            return
        plan = self.place(self.snapshot(), answer)
        if plan is None:
            return
        steps = tuple(step for step in plan.steps if step.guest != guest)
        self.commit(answer, replace(plan, steps=steps), starts=guest)
        self.seen["starts"] += 1

    def stop(self) -> None:
        if self.running():
            self.depart(self.draw.choice(self.running()))

    def depart(self, guest: GuestId) -> None:
        self.guests[guest] = self.defined[guest]
        decision = choose_departure(self.snapshot(), guest, REQUEST)
        plan = self.place(self.snapshot(), decision)
        assert plan is not None
        self.commit(decision, plan)
        self.books = depart(self.books, guest, float(self.now))
        self.check()

    def meddle(self) -> None:
        """Somebody resizes a device by hand; the agent mends it, as far as the nodes allow."""
        devices = [
            (g, d) for g in self.running() for d in self.guests[g].virtio_mem if d.requested
        ]  # fmt: skip
        if not devices:
            return
        guest, device = self.draw.choice(devices)
        self.set(guest, replace(device, requested=Bytes(0), current=Bytes(0)))
        self.seen["meddled"] += 1
        self.mend()

    def mend(self) -> None:
        plan = plan_convergence(self.snapshot(), None, REQUEST)
        assert isinstance(plan, Plan)
        self.carry_out(plan.steps)
        self.check()

    # -- carrying out -----------------------------------------------------------------------

    def commit(
        self, decision: Decision, plan: Plan, *, ends: Grant | None = None,
        starts: GuestId | None = None, alone: bool = True,
    ) -> None:  # fmt: skip
        self.check_takes(decision)
        self.carry_out(plan.steps)
        if starts is not None:
            self.guests[starts] = replace(self.guests[starts], state=RunState.RUNNING)
        self.now += 1
        gain = decision.delta.positive()
        wanted = gain and starts is None
        grant = Grant(GrantId(f"g{self.now}"), decision.guest, gain, REQUEST, float(self.now))
        self.books = settle(
            self.books, decision, grant=ends, new_grant=grant if wanted else None,
            loan_ids=[LoanId(f"l{self.now}.{n}") for n in range(len(decision.takes))],
            at=float(self.now), orders=plan.orders,
        )  # fmt: skip
        self.seen["takes of cxl"] += any(take.amounts[CXL_KEY] for take in decision.takes)
        self.seen["returns of cxl"] += any(back.amounts[CXL_KEY] for back in decision.returns)
        if alone:
            self.check()

    def carry_out(self, steps: tuple[Step, ...]) -> None:
        """All memory steps, in order; and on the way back, what was there before."""
        moves = [s for s in steps if isinstance(s, ResizeVirtioMem | AttachMemory | DetachMemory)]
        before = _by_alias(self.guests)
        has = {node: self.on_node(node) for node in self.quarantine}
        for step in moves:
            self.run(step)
            self.check_nodes()
        assert all(self.on_node(n) <= size for n, size in has.items()), "more in quarantine"
        after = dict(self.guests)
        for step in reversed(moves):
            self.run(step.inverse())
        assert _by_alias(self.guests) == before, "the way back"
        self.guests = after

    def run(self, step: ResizeVirtioMem | AttachMemory | DetachMemory) -> None:
        guest = self.guests[step.guest]
        device = next((d for d in guest.virtio_mem if d.alias == step.alias), None)
        assert guest.active
        if isinstance(step, DetachMemory):
            assert (device is None) == (step.before is Presence.ABSENT)
            if device is None:
                self.plug(guest, step)
            else:
                assert not device.requested
                self.seen["detached"] += 1
                self.unplug(guest, step, device)
        elif isinstance(step, AttachMemory) and not step.before:
            assert device is None
            self.seen["attached"] += 1
            self.plug(guest, step)
        elif isinstance(step, AttachMemory):
            assert device is not None
            assert device.requested == step.before
            self.unplug(guest, step, device)
        else:
            assert device is not None
            assert device.requested == step.before != step.after
            assert 0 <= step.after <= device.size
            assert step.after % device.block == 0
            assert (step.tier == "cxl") == bool(self.home(guest, device) in CXL)
            self.set(
                step.guest, replace(device, requested=Bytes(step.after), current=Bytes(step.after))
            )

    def plug(self, guest: GuestState, step: AttachMemory | DetachMemory) -> None:
        room, size = guest.memory_room, step.after if isinstance(step, AttachMemory) else 0
        assert guest.free_ports > 0
        assert room.slots > 0
        assert size <= step.size <= room.size
        assert size % step.block == 0
        assert guest.numa_mode is NumaMode.STRICT or isinstance(step, DetachMemory)
        device = VirtioMem(
            step.alias, step.cell, Bytes(step.size), Bytes(step.block), Bytes(size),
            Bytes(size), CpuSet((step.node,)),
        )  # fmt: skip
        self.guests[guest.uuid] = replace(
            guest, virtio_mem=(*guest.virtio_mem, device), free_ports=guest.free_ports - 1,
            memory_room=MemoryRoom(room.slots - 1, Bytes(room.size - step.size), room.cell),
            memory_max=Bytes(guest.memory_max + step.size),
            memory_current=Bytes(guest.memory_current + size),
        )  # fmt: skip

    def unplug(
        self, guest: GuestState, step: AttachMemory | DetachMemory, device: VirtioMem
    ) -> None:
        room = guest.memory_room
        self.guests[guest.uuid] = replace(
            guest, virtio_mem=tuple(d for d in guest.virtio_mem if d is not device),
            free_ports=guest.free_ports + 1,
            memory_room=MemoryRoom(room.slots + 1, Bytes(room.size + step.size), room.cell),
            memory_max=Bytes(guest.memory_max - step.size),
            memory_current=Bytes(guest.memory_current - device.current),
        )  # fmt: skip

    def set(self, uuid: GuestId, device: VirtioMem) -> None:
        guest = self.guests[uuid]
        devices = tuple(device if d.alias == device.alias else d for d in guest.virtio_mem)
        current = guest.boot_memory + sum(d.current for d in devices)
        self.guests[uuid] = replace(guest, virtio_mem=devices, memory_current=Bytes(current))

    # -- what must hold ---------------------------------------------------------------------

    def home(self, guest: GuestState, device: VirtioMem) -> int:
        if device.host_nodes and guest.numa_mode is not NumaMode.RESTRICTIVE:
            return min(device.host_nodes)
        return min(guest.numa_nodes)

    def on_node(self, node: int) -> int:
        return sum(
            int(device.requested)
            for guest in self.guests.values() if guest.active
            for device in guest.virtio_mem if self.home(guest, device) == node
        )  # fmt: skip

    def has(self, guest: GuestState, key: Key) -> int:
        boot = int(guest.boot_memory) if key == MEMORY_KEY else 0
        far = key == CXL_KEY
        return boot + sum(
            int(d.requested) for d in guest.virtio_mem if (self.home(guest, d) in CXL) == far
        )

    def lacks(self, guest: GuestId) -> int:
        """CXL memory that it is entitled to, and has not."""
        return self.books.holdings[guest].amounts[CXL_KEY] - self.has(self.guests[guest], CXL_KEY)

    def check_nodes(self) -> None:
        """No byte of a node is with two guests."""
        for node in CXL:
            assert self.on_node(node) <= self.capacity.cxl[node], f"node {node}"

    def check(self) -> None:
        self.check_nodes()
        snapshot = self.snapshot()
        left, total = free(snapshot), capacity_of(snapshot)
        assert total[MEMORY_KEY] == sum(self.capacity.memory.values()) - RESERVE
        sound = sum(size for n, size in self.capacity.cxl.items() if n not in self.quarantine)
        assert total[CXL_KEY] == sound + sum(self.on_node(n) for n in self.quarantine)
        for key in (MEMORY_KEY, CXL_KEY):
            held = sum(h.amounts[key] for h in self.books.holdings.values())
            # who has lost memory of a node in quarantine is entitled to it, and gets it back
            waits = sum(self.lacks(g) for g in self.books.holdings) if self.quarantine else 0
            assert left[key] >= (-waits if key == CXL_KEY else 0), key
            assert left[key] + held == total[key], f"{key}: lost, or there twice"
        for guest, holding in self.books.holdings.items():
            self.check_guest(self.guests[guest], holding.amounts)

    def check_guest(self, guest: GuestState, held: Amounts) -> None:
        assert self.has(guest, MEMORY_KEY) == held[MEMORY_KEY]
        lacks = self.lacks(guest.uuid)
        assert lacks >= 0, "has more than it holds"
        if lacks:  # came home where its nodes are full by now
            self.seen["waits for room"] += 1
        if guest.numa_mode is NumaMode.RESTRICTIVE:
            assert not held[CXL_KEY], "movable and tiered"
        if guest.devices:
            returnable = {n for n in CXL if self.topology.nodes[n].offlinable}
            on = {self.home(guest, d) for d in guest.virtio_mem if d.requested}
            assert not on & returnable, "stranded"
        limit = guest.policy.memory.limit
        if limit is not None:
            assert held.all_memory <= max(limit, self.has(self.defined[guest.uuid], MEMORY_KEY)
                + self.has(self.defined[guest.uuid], CXL_KEY))  # fmt: skip
        parts = held_memory(guest, self.snapshot())
        assert sum(part.size for part in parts) == guest.memory_current, "every byte has an answer"
        for part in parts:
            assert part.offlinable == (
                part.tier is Tier.CXL
                and not guest.devices
                and all(self.topology.nodes[n].offlinable for n in part.nodes)
            )

    def check_takes(self, decision: Decision) -> None:
        """Loans are of what a guest can be made to give, and only by lower priorities."""
        snapshot = self.snapshot()
        for take in decision.takes:
            victim = self.guests[take.victim]
            assert victim.policy.priority < self.guests[decision.guest].policy.priority
            for tier, key in ((Tier.DRAM, MEMORY_KEY), (Tier.CXL, CXL_KEY)):
                # what came home to it and has no room yet is nobody's pages
                owed = self.books.holdings[take.victim].amounts[key] - self.has(victim, key)
                assert take.amounts[key] <= reclaimable(victim, tier, snapshot) + owed

    def check_request(self, request: Request, decision: Decision) -> None:
        """Of the tier that was asked for, and of no other."""
        key = CXL_KEY if request.tier is Tier.CXL else MEMORY_KEY
        assert set(decision.delta) <= {key}
        guest = self.guests[request.guest]
        if decision.delta[CXL_KEY] > 0:
            assert "cxl" in guest.policy.memory.tiers
            self.seen["grows on cxl"] += 1
        held = self.books.holdings[request.guest].amounts[key]
        asked = request.memory.value + (held if request.memory.mode is Mode.BY else 0)
        if request.tier is not None and not request.partial:
            assert decision.delta[key] == asked - held, "exactly"


ACTIONS = (
    ("allocate", "climb") * 9 + ("allocate_two_at_once",) * 3 + ("release", "start") * 4
    + ("stop", "meddle", "meddle", "mend", "call_home", "call_home", "call_home", "fail")
)  # fmt: skip


def live(seed: int, seen: Counter[str]) -> None:
    """A life from its beginning until everybody has gone: then all of it is free again."""
    draw = Random(seed)
    life = Life(draw, seen)
    for _ in life.defined:
        life.start()
    for action in draw.choices(ACTIONS, k=draw.randint(15, 40)):
        getattr(life, action)()
    for guest in life.running():
        life.depart(guest)
    life.quarantine.clear()
    assert not life.books.holdings
    assert not life.books.loans
    assert free(life.snapshot()) == capacity_of(life.snapshot())
    assert [life.on_node(node) for node in CXL] == [0, 0]


__all__ = ["CXL", "FUNCTION", "Life", "four_nodes", "guest_id", "live"]
