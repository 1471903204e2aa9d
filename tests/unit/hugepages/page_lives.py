"""Lives of guests on huge pages, beside an administrator and others who use the same pools.

What must hold is summed up from the simulated kernel and from the books, with nothing of
`policy.hugepages`; it is checked after every event.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from virtfabric.adapters.simulated.guest import GuestSpec, MemoryDevice
from virtfabric.adapters.simulated.host import build_simulated_host
from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.daemon.custody import after_plan
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import HypervisorError, VirtfabricError
from virtfabric.model.guest import NumaMode
from virtfabric.model.host import Capacity
from virtfabric.model.hugepages import PoolKey
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.plan import Plan, ResizeVirtioMem
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.policy.hugepages import returnable, with_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.model.step import Step

PAGE = 2 * MIB
POOLS = (PoolKey(0, PAGE), PoolKey(1, PAGE))
REQUEST = RequestId("req-1")
NODE_PAGES = 60


class Context:
    def progress(self, fraction: float, text: str) -> None:
        """Nobody looks."""


class Life:
    """Three guests: bound to either node, and to both."""

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        topology = make_topology(cores=1, nodes=2, node_memory=NODE_PAGES * PAGE)
        self.host = build_simulated_host(topology, map(self._spec, range(4)))
        self.guests = sorted(self.host.guests())
        self.capacity = Capacity(topology.cpus, CpuSet([0]), {}, Bytes(0), Bytes(0))
        self.books = Books()
        self.others = dict.fromkeys(POOLS, 0)
        self.admin = {key: self.draw.choice((0, 0, 7, 25)) for key in POOLS}
        self.robbed = False
        for key, size in self.admin.items():
            self.host.pages.set_pool(key, size)

    def _spec(self, number: int) -> GuestSpec:
        home = CpuSet([number % 2])
        device = MemoryDevice(
            "ua-m", 0, Bytes(20 * PAGE), Bytes(self.draw.randrange(4) * PAGE), host_nodes=home
        )
        return GuestSpec(
            GuestId(f"00000000-0000-4000-8000-{number:012d}"), f"g{number}",
            boot_memory=Bytes(self.draw.randint(1, 30) * PAGE), devices=(device,), page=Bytes(PAGE),
            numa_mode=NumaMode.STRICT, numa_nodes=home, running=False,
        )  # fmt: skip

    # -- events ---------------------------------------------------------------------------------

    def step(self) -> None:
        events = (
            self.prepare, self.prepare, self.begin, self.begin, self.resize, self.resize,
            self.resize, self.end, self.others_come_or_go, self.scatter, self.administrate,
            self.sweep, self.forget,
        )  # fmt: skip
        self.draw.choice(events)(self.draw.choice(self.guests))
        self.check()

    def prepare(self, guest: GuestId) -> None:
        if guest in self.books.holdings or self._runs(guest):
            return
        after = {g: Amounts.of(memory=1) for g in (*self.books.holdings, guest)}
        plan = with_pages(self.snapshot(), Plan(REQUEST, 0, ()), after)
        if isinstance(plan, Plan) and self._carry_out(plan.steps):
            holdings = {**self.books.holdings, guest: Holding(guest, after[guest])}
            self._settle(plan, replace(self.books, holdings=holdings))

    def begin(self, guest: GuestId) -> None:
        if guest not in self.books.holdings or self._runs(guest):
            return
        try:
            self.host.start_guest(guest)
        except HypervisorError:
            # its pages were there for it, unless somebody came in between
            assert self.robbed, "pages were promised, and were not there"
            self.depart(guest)

    def resize(self, guest: GuestId) -> None:
        if guest not in self.books.holdings or not self._runs(guest):
            return
        (device,) = self.host.guests()[guest].read().virtio_mem
        step = ResizeVirtioMem(
            guest=guest, alias="ua-m", before=int(device.requested),
            after=self.draw.randint(0, 20) * PAGE,
        )  # fmt: skip
        after = dict.fromkeys(self.books.holdings, Amounts.of(memory=1))
        plan = with_pages(self.snapshot(), Plan(REQUEST, 0, (step,)), after)
        if isinstance(plan, Plan) and self._carry_out(plan.steps):
            self._settle(plan, self.books)

    def end(self, guest: GuestId) -> None:
        """It stops, or never came to run."""
        self.host.stop_guest(guest)
        if guest in self.books.holdings:
            self.depart(guest)

    def depart(self, guest: GuestId) -> None:
        left = {g: h for g, h in self.books.holdings.items() if g != guest}
        after = {g: h.amounts for g, h in left.items()}
        plan = with_pages(self.snapshot(), Plan(REQUEST, 0, ()), after)
        assert isinstance(plan, Plan)
        self._carry_out(plan.steps)
        self._settle(plan, replace(self.books, holdings=left))

    def forget(self, guest: GuestId) -> None:
        """The agent's hand is lifted from a guest that runs, or its books are lost."""
        left = {g: h for g, h in self.books.holdings.items() if g != guest}
        if self._runs(guest):
            self.books = replace(self.books, holdings=left)

    def others_come_or_go(self, _: GuestId) -> None:
        """They take what is free, also what somebody counts on."""
        key = self.draw.choice(POOLS)
        most = self.others[key] + max(0, self.host.pages.free(key))
        self.others[key] = self.draw.choice((0, 0, self.draw.randint(0, most)))
        self.robbed |= self.others[key] > 0
        self.host.pages.use(key, self.others[key])

    def scatter(self, _: GuestId) -> None:
        self.host.pages.scattered = self.draw.choice(
            ({}, dict.fromkeys(POOLS, 0), {POOLS[0]: self.draw.randrange(20)})
        )

    def administrate(self, _: GuestId) -> None:
        """Seldom, and never below what is in use."""
        if self.draw.random() < 0.2:
            key = self.draw.choice(POOLS)
            size = self._size(key) - self.host.pages.free(key) + self.draw.randrange(10)
            self.admin[key] = size
            self.robbed = True
            self.host.pages.set_pool(key, size)

    def sweep(self, _: GuestId) -> None:
        self._carry_out(returnable(self.snapshot()))

    # -- how ------------------------------------------------------------------------------------

    def snapshot(self) -> HostSnapshot:
        return HostSnapshot(
            0, self.host.read_topology(), self.capacity, self.host.read_guests(), self.books,
            pools=self.host.pages.read_pools(),
        )  # fmt: skip

    def _carry_out(self, steps: Sequence[Step]) -> bool:
        """As the executor does: optional steps may fail, any other is undone with all before it."""
        done: list[Step] = []
        for step in steps:
            handler = self.host.handlers.for_step(step)
            done.append(step)
            try:
                handler.apply(step, Context())
                handler.verify(step)
            except VirtfabricError:
                if not step.optional:
                    for one in reversed(done):
                        assert self.host.handlers.for_step(one).undo(one) == 0
                    return False
        return True

    def _settle(self, plan: Plan, books: Books) -> None:
        self.books = after_plan(books, books, plan, (), 0.0)

    def _runs(self, guest: GuestId) -> bool:
        return self.host.guests()[guest].read().active

    def _size(self, key: PoolKey) -> int:
        return self.host.pages.read_pools().pools[key].pages.total

    # -- what must hold -------------------------------------------------------------------------

    def check(self) -> None:
        waiting = [
            held
            for guest, holding in self.books.holdings.items()
            for held in holding.pages
            if not self._runs(guest)
        ]
        for key in POOLS:
            pool = self.host.pages.read_pools().pools[key]
            assert pool.pages.free >= 0, "a guest touched a page that was not there"
            made = sum(pool.made.values())
            assert all(count > 0 for count in pool.made.values()), "more went back than was ours"
            assert pool.pages.total - made == self.admin[key], "the administrator's pool changed"
            if not self.robbed:
                claimed = sum(held.count for held in waiting if held.key == key)
                assert claimed <= pool.pages.free, "a page was promised twice"

    def finish(self) -> None:
        """Everybody leaves: nothing of ours is left."""
        for guest in self.guests:
            self.end(guest)
        for key in POOLS:
            self.host.pages.use(key, 0)
        self.sweep(self.guests[0])
        self.check()
        for key in POOLS:
            assert self._size(key) == self.admin[key], "pages leaked"


def live(seed: int, events: int) -> Life:
    life = Life(seed)
    for _ in range(events):
        life.step()
    life.finish()
    return life
