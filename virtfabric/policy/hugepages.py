"""Huge pages of a plan: which pools they come from, how many are made, what goes back.

Owns the sums by pool, so that no page is promised twice: what is free, less what the kernel has
promised, less what guests count on that do not run yet, less what running plans have reserved. A
guest's pages are looked for before it starts or grows, on the nodes that its memory is bound to:
one that is missing when the guest touches it would kill it. It decides no amounts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.hugepages import HeldPages, HugePools, MakeHugePages, PoolKey
from virtfabric.model.memorysteps import AttachDimm, AttachMemory
from virtfabric.model.plan import ResizeVirtioMem, SetBalloon
from virtfabric.model.units import GIB, Bytes, CpuSet
from virtfabric.policy.tiers import device_nodes, fixed_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.model.step import Step

_Sizing = ResizeVirtioMem | AttachMemory | AttachDimm
_MOVES_MEMORY = (ResizeVirtioMem, SetBalloon, AttachMemory, AttachDimm)


class Need(NamedTuple):
    """Pages of one size that a guest is about to take, or gives (below zero).

    Attributes:
        nodes: of the host, any of which will do; empty for any node.
    """

    nodes: CpuSet
    page: int
    pages: int


def with_pages(
    snapshot: HostSnapshot,
    plan: Plan,
    after: Mapping[GuestId, Amounts],
    *,
    mend: bool = False,
) -> Plan | Refusal:
    """A plan that also sees to the huge pages of the guests that it starts, grows, shrinks, ends.

    Pages are made before any memory grows, once what shrinks has shrunk, and given back last of
    all: an undo then never depends on making any.

    Args:
        snapshot: the host; without a look at its pools the plan stays as it is.
        plan: all the rest.
        after: what each guest holds afterwards.
        mend: what is amiss with one must not keep another: leave out what cannot grow.
    """
    if snapshot.pools is None:
        return plan
    deal = _Deal(snapshot, snapshot.pools)
    refusal = deal.start(after)
    if refusal is not None:
        return refusal
    touched = plan.guests | {step.guest for step in snapshot.done}
    for guest in sorted(touched & snapshot.guests.keys()):
        refusal = deal.follow(snapshot.guests[guest], plan.steps)
        if refusal is not None:
            if not mend:
                return refusal
            plan = replace(plan, steps=tuple(s for s in plan.steps if not _grows(s, guest)))
    for guest in sorted(snapshot.books.holdings.keys() - after.keys()):
        deal.give_all(guest)
    return deal.finish(plan)


def needs_of(guest: GuestState, snapshot: HostSnapshot) -> list[Need]:
    """What a guest takes when it starts."""
    parts = [(p.host_nodes, p.page, int(p.size)) for p in fixed_parts(guest)]
    parts += [(device_nodes(guest, d), d.page, int(d.requested)) for d in guest.virtio_mem]
    total: dict[tuple[CpuSet, int], int] = {}
    for nodes, given, size in parts:
        page = int(snapshot.topology.page_of(given))
        if page:
            total[nodes, page] = total.get((nodes, page), 0) + -(-size // page)
    # who can be anywhere takes what the others leave
    found = [Need(nodes, page, count) for (nodes, page), count in total.items()]
    return sorted(found, key=lambda need: (not need.nodes, len(need.nodes), need.page))


def strays(snapshot: HostSnapshot) -> tuple[MakeHugePages, ...]:
    """What was made for guests that have no use for it any more, as steps that give all of it back.

    Pages that were in use when they should have gone back, or that a crash left. Not of a guest
    that runs and holds nothing: it has them still.
    """
    steps = []
    for key, pool in sorted((snapshot.pools or HugePools()).pools.items()):
        for guest, made in sorted(pool.made.items()):
            holding, state = snapshot.books.holdings.get(guest), snapshot.guests.get(guest)
            if guest in snapshot.busy or (holding is None and state is not None and state.active):
                continue
            due = sum(p.made for p in holding.pages if p.key == key) if holding else 0
            if made > due:
                name = state.name if state else guest
                steps.append(_step(guest, name, key, made, due, optional=True))
    return tuple(steps)


def returnable(snapshot: HostSnapshot) -> tuple[MakeHugePages, ...]:
    """Of `strays`, as much as nobody uses or counts on by now."""
    free, steps = unclaimed(snapshot, snapshot.pools or HugePools()), []
    for step in strays(snapshot):
        back = min(step.before - step.after, free[step.pool])
        if back > 0:
            free[step.pool] -= back
            steps.append(replace(step, after=step.before - back))
    return tuple(steps)


def _changes_of(guest: GuestState, steps: Sequence[Step], snapshot: HostSnapshot) -> Iterator[Need]:
    """What steps change of a running guest's huge pages, device by device."""
    devices = {device.alias: device for device in guest.virtio_mem}
    first: dict[str, _Sizing] = {}
    last: dict[str, _Sizing] = {}
    for step in steps:
        if step.guest == guest.uuid and isinstance(step, _Sizing):
            first.setdefault(step.alias, step)
            last[step.alias] = step
    for alias, step in first.items():
        device = devices.get(alias)
        if device is not None:
            page, nodes = int(snapshot.topology.page_of(device.page)), device_nodes(guest, device)
        elif isinstance(step, AttachMemory | AttachDimm):
            page, nodes = step.page, CpuSet((step.node,))
        else:
            continue
        if page and (count := -(-last[alias].after // page) - -(-step.before // page)):
            yield Need(nodes, page, count)


def _grows(step: Step, guest: GuestId) -> bool:
    return step.guest == guest and isinstance(step, _MOVES_MEMORY) and step.after > step.before


@dataclass
class _Take:
    """What a guest gets of one pool: pages in all, and how many of these are made."""

    count: int = 0
    make: int = 0


@dataclass
class _Deal:
    """What is left of each pool while a plan is made."""

    snapshot: HostSnapshot
    pools: HugePools
    free: dict[PoolKey, int] = field(init=False)
    takes: dict[tuple[GuestId, PoolKey], _Take] = field(default_factory=dict)
    gifts: dict[tuple[GuestId, PoolKey], _Take] = field(default_factory=dict)
    had: dict[tuple[GuestId, PoolKey], int] = field(default_factory=dict)
    names: dict[GuestId, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = unclaimed(self.snapshot, self.pools)

    def follow(self, guest: GuestState, steps: Sequence[Step]) -> Refusal | None:
        """What a plan changes of a running guest; what it gives counts even if it cannot grow.

        Of a transaction that is decided anew nothing went back yet, and what was made is there.
        """
        done = [step for step in self.snapshot.done if step.guest == guest.uuid]
        given = _changes_of(guest, [*done, *steps], self.snapshot)
        self.give(guest.uuid, guest.name, [need for need in given if need.pages < 0])
        for made in (step for step in done if isinstance(step, MakeHugePages)):
            self.names[guest.uuid] = guest.name
            self.had[guest.uuid, made.pool] = self.had.get((guest.uuid, made.pool), 0) + made.free
        taken = _changes_of(guest, steps, self.snapshot)
        return self.take(guest, [need for need in taken if need.pages > 0])

    # -- more -----------------------------------------------------------------------------------

    def start(self, after: Mapping[GuestId, Amounts]) -> Refusal | None:
        """Whoever does not run yet, and is to hold something from now on."""
        for guest in sorted(after.keys() - self.snapshot.books.holdings.keys()):
            state = self.snapshot.guests.get(guest)
            if state is not None and not state.active:
                refusal = self.take(state, needs_of(state, self.snapshot))
                if refusal is not None:
                    return refusal
        return None

    def take(self, guest: GuestState, needs: Sequence[Need]) -> Refusal | None:
        """Find pages for all of it, or for nothing."""
        free, takes = dict(self.free), {k: replace(t) for k, t in self.takes.items()}
        self.names[guest.uuid] = guest.name
        for need in needs:
            refusal = self._take_one(guest, need)
            if refusal is not None:
                self.free, self.takes = free, takes
                return refusal
        return None

    def _take_one(self, guest: GuestState, need: Need) -> Refusal | None:
        there = self.pools.of_size(need.page)
        if not there:
            sizes = ", ".join(str(Bytes(size)) for size in self.pools.sizes) or "none"
            detail = (
                f"{guest.name}: needs {need.pages} huge pages of {Bytes(need.page)}, which this "
                f"host does not offer (it offers {sizes})"
            )
            return Refusal(Reason.NO_HUGE_PAGES, detail)
        anywhere = self.snapshot.topology.nodes.keys() - self.snapshot.topology.cxl_nodes
        sound = (need.nodes or anywhere) - self.snapshot.capacity.withheld.keys()
        nodes = [n for n in sorted(sound) if n in there]
        left = need.pages
        for node in sorted(nodes, key=lambda n: (-self.free[PoolKey(n, need.page)], n)):
            key = PoolKey(node, need.page)
            count = min(left, max(0, self.free[key]))
            self._note(guest.uuid, key, count, 0)
            left -= count
        if left:
            left = self._make(guest, nodes, need.page, left)
        return self._nowhere(guest, need, nodes, left) if left else None

    def _make(self, guest: GuestState, nodes: list[int], page: int, left: int) -> int:
        """Share out what has to be made, where memory is free first; what finds no place."""
        fit = [n for n in nodes if self._can_be_made(n, page)]
        rooms = {n: self._room(n, page) for n in fit}
        fit.sort(key=lambda n: (-rooms[n], n))
        for node in fit:
            count = min(left, rooms[node])
            self._note(guest.uuid, PoolKey(node, page), count, count)
            left -= count
        if not left or not fit:
            return left
        # page cache may make way: only the kernel knows how much
        most = int(self.snapshot.topology.nodes[fit[0]].memory_total) // page
        if left + rooms[fit[0]] > most:
            return left
        self._note(guest.uuid, PoolKey(fit[0], page), left, left)
        return 0

    def _can_be_made(self, node: int, page: int) -> bool:
        """The kernel takes gigantic pages of no memory that it must be able to move."""
        found = self.snapshot.topology.nodes.get(node)
        return found is not None and not (page >= GIB and found.offlinable)

    def _room(self, node: int, page: int) -> int:
        """Pages that free memory has room for, beside those that this plan makes already."""
        made = sum(t.make * k.page for (_, k), t in self.takes.items() if k.node == node)
        return max(0, int(self.pools.free_memory.get(node, 0)) - made) // page

    def _note(self, guest: GuestId, key: PoolKey, count: int, make: int) -> None:
        if count:
            take = self.takes.setdefault((guest, key), _Take())
            take.count += count
            take.make += make
            self.free[key] -= count - make

    def _nowhere(self, guest: GuestState, need: Need, nodes: list[int], left: int) -> Refusal:
        page = Bytes(need.page)
        lines = []
        for node in nodes:
            pages = self.pools.pools[PoolKey(node, need.page)].pages
            lines.append(
                f"node {node}: {pages.total} in the pool, {pages.free} free, {pages.reserved} "
                f"promised, {self.pools.free_memory.get(node, Bytes(0)).rounded()} of memory free"
            )
            if not self._can_be_made(node, need.page):
                lines[-1] += ", all movable: the kernel makes no such pages there"
        withheld = self.snapshot.capacity.withheld
        lines += [f"node {n}: {withheld[n]}" for n in need.nodes if n in withheld]
        where = "; ".join(lines) or f"node {need.nodes}: it has no such pool"
        detail = (
            f"{guest.name}: needs {need.pages} huge pages of {page}, {need.pages - left} are to be "
            f"had ({where}); free memory there, bind the guest to another node, or give it "
            "smaller pages"
        )
        return Refusal(Reason.NO_HUGE_PAGES, detail)

    # -- less -----------------------------------------------------------------------------------

    def give(self, guest: GuestId, name: str, needs: Sequence[Need]) -> None:
        """Of what the guest lets go, give back what was made for it; the rest stays in the pool."""
        self.names[guest] = name
        made = self.pools.made_for(guest)
        for need in needs:
            left = -need.pages
            for held in _pages_of(self.snapshot, guest):
                fits = held.page == need.page and (not need.nodes or held.node in need.nodes)
                if not fits:
                    continue
                gift = self.gifts.setdefault((guest, held.key), _Take())
                count = min(left, held.count - gift.count)
                back = min(count, made.get(held.key, 0) - gift.make)
                gift.count, gift.make = gift.count + count, gift.make + max(0, back)
                left -= count

    def give_all(self, guest: GuestId) -> None:
        """All that was made for a guest that ends."""
        state = self.snapshot.guests.get(guest)
        self.names[guest] = state.name if state else guest
        for key, made in self.pools.made_for(guest).items():
            self.gifts[guest, key] = _Take(made, made)

    # -- both -----------------------------------------------------------------------------------

    def finish(self, plan: Plan) -> Plan:
        """The plan with its steps, with what it needs of each pool, and who has which pages."""
        made = {pair: self.pools.made_for(pair[0]).get(pair[1], 0) for pair in self._pairs}
        makes, returns = [], []
        for (guest, key), take in self.takes.items():
            now = made[guest, key]
            made[guest, key] += take.make
            then = made[guest, key]
            makes.append(_step(guest, self.names[guest], key, now, then, free=take.count))
        for (guest, key), gift in self.gifts.items():
            if gift.make:
                now = made[guest, key]
                then = now - gift.make
                returns.append(_step(guest, self.names[guest], key, now, then, optional=True))
        first = next((i for i, step in enumerate(plan.steps) if not _shrinks(step)), None)
        at = len(plan.steps) if first is None else first
        steps = (*plan.steps[:at], *makes, *plan.steps[at:], *returns)
        needs: dict[Key, int] = {}
        for (_, key), take in self.takes.items():
            needs[key.amount_key] = needs.get(key.amount_key, 0) + take.count
        touched = {guest for guest, _ in self._pairs}
        pages = {guest: self._afterwards(guest) for guest in sorted(touched)}
        return replace(plan, steps=steps, pages=pages, node_needs=plan.node_needs + Amounts(needs))

    @property
    def _pairs(self) -> set[tuple[GuestId, PoolKey]]:
        return {*self.takes, *self.gifts, *self.had}

    def _afterwards(self, guest: GuestId) -> tuple[HeldPages, ...]:
        counts = {held.key: held.count for held in _pages_of(self.snapshot, guest)}
        made = self.pools.made_for(guest)
        for (whose, key), count in self.had.items():
            if whose == guest:
                counts[key] = counts.get(key, 0) + count
        for (whose, key), take in self.takes.items():
            if whose == guest:
                counts[key] = counts.get(key, 0) + take.count
                made[key] = made.get(key, 0) + take.make
        for (whose, key), gift in self.gifts.items():
            if whose == guest:
                counts[key] = counts.get(key, 0) - gift.count
                made[key] = made.get(key, 0) - gift.make
        return tuple(
            HeldPages(key.node, key.page, count, made.get(key, 0))
            for key, count in sorted(counts.items())
            if count > 0
        )


def unclaimed(snapshot: HostSnapshot, pools: HugePools) -> dict[PoolKey, int]:
    """Free pages by pool that nobody counts on; below zero where too many do."""
    free = {key: pool.pages.available for key, pool in pools.pools.items()}
    for guest, holding in snapshot.books.holdings.items():
        state = snapshot.guests.get(guest)
        if holding.pages and (state is None or not state.active):
            for held in holding.pages:
                if held.key in free:
                    free[held.key] -= held.count
    return {key: count - snapshot.pending[key.amount_key] for key, count in free.items()}


def _pages_of(snapshot: HostSnapshot, guest: GuestId) -> tuple[HeldPages, ...]:
    holding = snapshot.books.holdings.get(guest)
    return holding.pages if holding else ()


def _shrinks(step: Step) -> bool:
    return isinstance(step, _MOVES_MEMORY) and step.after < step.before


def _step(
    guest: GuestId,
    name: str,
    key: PoolKey,
    before: int,
    after: int,
    *,
    free: int = 0,
    optional: bool = False,
) -> MakeHugePages:
    return MakeHugePages(
        guest=guest, name=name, node=key.node, page=key.page, before=before, after=after,
        free=free, optional=optional,
    )  # fmt: skip
