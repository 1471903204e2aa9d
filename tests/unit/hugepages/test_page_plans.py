"""Which pools a guest's pages come from, how many are made, and where that is put in a plan."""

from dataclasses import replace

import pytest

from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import FixedMemory, GuestState, NumaMode, RunState, VirtioMem
from virtfabric.model.host import Capacity, HugePages
from virtfabric.model.hugepages import HeldPages, HugePools, MakeHugePages, Pool, PoolKey
from virtfabric.model.ids import GuestId, RequestId
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.memorysteps import AttachMemory
from virtfabric.model.plan import Plan, ResizeVirtioMem, SetQuota
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.policy.hugepages import needs_of, with_pages

DB = GuestId("00000000-0000-4000-8000-000000000001")
WEB = GuestId("00000000-0000-4000-8000-000000000002")
PAGE = 2 * MIB
NEAR, FAR = PoolKey(0, PAGE), PoolKey(1, PAGE)
HELD = Amounts.of(memory=GIB)


def guest(*cells, page=PAGE, devices=(), uuid=DB, active=False, **fields):
    """`cells`: (pages, nodes)."""
    parts = tuple(
        FixedMemory(f"cell {n}", Bytes(count * (page or PAGE)), CpuSet(nodes), page)
        for n, (count, nodes) in enumerate(cells)
    )
    state = RunState.RUNNING if active else RunState.SHUTOFF
    return GuestState(
        uuid, "db" if uuid == DB else "web", state, fixed_memory=parts, virtio_mem=devices,
        boot_memory=Bytes(sum(p.size for p in parts)),
        **{"numa_mode": NumaMode.STRICT} | fields,
    )  # fmt: skip


def device(alias, requested, node, page=PAGE):
    size = Bytes(requested * PAGE)
    return VirtioMem(alias, 0, Bytes(GIB), Bytes(PAGE), size, size, CpuSet([node]), Bytes(page))


def pools(near=0, far=0, *, reserved=0, made=None, free=(8 * GIB, 8 * GIB), large=True):
    sizes = {NEAR: near, FAR: far}
    if large:
        sizes |= {PoolKey(n, GIB): 0 for n in (0, 1)}
    return HugePools(
        {
            key: Pool(
                HugePages(Bytes(key.page), size, size, min(size, reserved)),
                (made or {}).get(key, {}),
            )
            for key, size in sizes.items()
        },
        dict(enumerate(map(Bytes, free))),
    )


def snapshot(found, *guests, holdings=(), pending=None, movable=()):
    topology = make_topology(cores=1, nodes=2)
    nodes = {n: replace(node, offlinable=n in movable) for n, node in topology.nodes.items()}
    capacity = Capacity(CpuSet([0]), CpuSet([0]), {}, Bytes(0), Bytes(0))
    return HostSnapshot(
        1, replace(topology, nodes=nodes), capacity,
        {g.uuid: g for g in guests}, Books(holdings={h.guest: h for h in holdings}),
        pending or Amounts(), pools=found,
    )  # fmt: skip


def plan(*steps):
    return Plan(RequestId("req-1"), 1, steps)


def start(found, state, **fields):
    after = dict.fromkeys([state.uuid, *(h.guest for h in fields.get("holdings", ()))], HELD)
    return with_pages(snapshot(found, state, **fields), plan(), after)


def made(answer):
    assert isinstance(answer, Plan), answer
    return {(s.node, s.page): (s.before, s.after, s.free) for s in answer.steps}


def test_free_pages_go_first_and_the_rest_is_made():
    answer = start(pools(near=10), guest((30, [0])))
    assert made(answer) == {NEAR: (0, 20, 30)}
    assert answer.pages == {DB: (HeldPages(0, PAGE, 30, 20),)}
    assert answer.node_needs == Amounts({NEAR.amount_key: 30})


def test_where_nothing_has_to_be_made_it_is_looked_at_all_the_same():
    assert made(start(pools(near=30), guest((30, [0])))) == {NEAR: (0, 0, 30)}


def test_pages_on_another_node_are_no_help():
    assert made(start(pools(far=100), guest((30, [0])))) == {NEAR: (0, 30, 30)}


def test_two_parts_do_not_count_on_the_same_pages():
    state = guest((10, [0]), (10, [1]), devices=(device("a", 10, 0),), numa_nodes=CpuSet())
    assert made(start(pools(near=15, far=4), state)) == {NEAR: (0, 5, 20), FAR: (0, 6, 10)}


def test_a_guest_without_nodes_gets_what_the_others_leave():
    state = guest((10, []), (12, [0]))
    assert made(start(pools(near=12, far=10), state)) == {NEAR: (0, 0, 12), FAR: (0, 0, 10)}


def test_pages_are_made_where_memory_is_free():
    answer = start(pools(free=(20 * PAGE, 100 * PAGE)), guest((110, [])))
    assert made(answer) == {FAR: (0, 100, 100), NEAR: (0, 10, 10)}


def test_page_cache_may_make_way():
    assert made(start(pools(free=(0, 0)), guest((30, [0])))) == {NEAR: (0, 30, 30)}


def test_what_is_promised_counted_on_or_reserved_is_not_free():
    waiting = Holding(WEB, HELD, pages=(HeldPages(0, PAGE, 20, 5),))
    found = pools(near=100, reserved=10)
    answer = start(
        found, guest((70, [0])), holdings=[waiting], pending=Amounts({NEAR.amount_key: 30})
    )
    assert made(answer) == {NEAR: (0, 30, 70)}


def test_a_guest_that_runs_has_its_pages_already():
    web = guest((20, [0]), uuid=WEB, active=True)
    holding = Holding(WEB, HELD, pages=(HeldPages(0, PAGE, 20, 5),))
    view = snapshot(pools(near=30), guest((30, [0])), web, holdings=[holding])
    assert made(with_pages(view, plan(), {DB: HELD, WEB: HELD})) == {NEAR: (0, 0, 30)}


def test_the_hosts_default_size():
    state = guest((3, [0]), page=None)
    assert [(n.page, n.pages) for n in needs_of(state, snapshot(pools(), state))] == [(PAGE, 3)]
    assert made(start(pools(), state)) == {NEAR: (0, 3, 3)}


def test_gigantic_pages_are_not_made_of_movable_memory():
    state = guest((2, [1]), page=GIB)
    assert made(start(pools(), state)) == {(1, GIB): (0, 2, 2)}
    refusal = start(pools(), state, movable=[1])
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.NO_HUGE_PAGES
    assert "all movable: the kernel makes no such pages there" in refusal.detail


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (guest((1, [0]), page=16 * MIB), "does not offer (it offers 2MiB, 1GiB)"),
        (guest((10_000, [0])), "needs 10000 huge pages of 2MiB, 4101 are to be had (node 0: 5 in"),
        (guest((1, [7])), "node 7: it has no such pool"),
    ],
)
def test_refusals(state, words):
    refusal = start(pools(near=5), state)
    assert isinstance(refusal, Refusal)
    assert words in refusal.detail


def grown(alias="a", before=10, after=25, uuid=DB):
    return ResizeVirtioMem(guest=uuid, alias=alias, before=before * PAGE, after=after * PAGE)


QUOTA = SetQuota(guest=DB, before=-1, after=1000)


def test_made_before_growth_but_after_others_have_shrunk_and_given_back_last():
    db = guest((10, [0]), devices=(device("a", 10, 0),), active=True)
    web = guest((10, [0]), devices=(device("b", 30, 0),), uuid=WEB, active=True)
    holding = Holding(WEB, HELD, pages=(HeldPages(0, PAGE, 40, 35),))
    found = pools(near=0, made={NEAR: {WEB: 35}})
    shrink = grown("b", 30, 10, WEB)
    view = snapshot(found, db, web, holdings=[holding, Holding(DB, HELD)])
    answer = with_pages(view, plan(shrink, QUOTA, grown()), {DB: HELD, WEB: HELD})
    assert isinstance(answer, Plan)
    make = MakeHugePages(guest=DB, name="db", node=0, page=PAGE, before=0, after=15, free=15)
    back = MakeHugePages(
        guest=WEB, name="web", node=0, page=PAGE, before=35, after=15, optional=True
    )
    assert answer.steps == (shrink, make, QUOTA, grown(), back)
    assert answer.pages == {DB: (HeldPages(0, PAGE, 15, 15),), WEB: (HeldPages(0, PAGE, 20, 15),)}


def test_a_guest_that_gives_of_one_device_and_takes_for_another_keeps_the_difference():
    """Both steps are absolute: the second one goes on from where the first one ends."""
    devices = (device("a", 10, 0), device("b", 30, 0))
    db = guest((10, [0]), devices=devices, active=True)
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 50, 40),))
    view = snapshot(pools(made={NEAR: {DB: 40}}), db, holdings=[holding])
    answer = with_pages(view, plan(grown("b", 30, 24), grown("a", 10, 25)), {DB: HELD})
    steps = [(s.before, s.after) for s in answer.steps if isinstance(s, MakeHugePages)]
    assert steps == [(40, 55), (55, 49)]
    assert answer.pages == {DB: (HeldPages(0, PAGE, 59, 49),)}


def test_two_devices_do_not_give_the_same_pages():
    devices = (device("a", 10, 0), device("b", 30, 0))
    db = guest((0, [0]), devices=devices, active=True)
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 12, 12),))
    view = snapshot(pools(made={NEAR: {DB: 12}}), db, holdings=[holding])
    answer = with_pages(view, plan(grown("a", 10, 0), grown("b", 30, 20)), {DB: HELD})
    steps = [(s.before, s.after) for s in answer.steps if isinstance(s, MakeHugePages)]
    assert steps == [(12, 0)]
    assert answer.pages == {DB: ()}


def test_only_what_was_made_goes_back():
    db = guest((10, [0]), devices=(device("a", 10, 0),), active=True)
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 20, 3),))
    view = snapshot(pools(made={NEAR: {DB: 3}}), db, holdings=[holding])
    answer = with_pages(view, plan(grown(before=10, after=0)), {DB: HELD})
    assert [(s.before, s.after) for s in answer.steps if isinstance(s, MakeHugePages)] == [(3, 0)]
    assert answer.pages == {DB: (HeldPages(0, PAGE, 10, 0),)}


def test_all_that_was_made_for_a_guest_that_ends_goes_back():
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 20, 3),))
    view = snapshot(pools(made={NEAR: {DB: 3}, FAR: {DB: 8}}), holdings=[holding])
    answer = with_pages(view, plan(), {})
    assert made(answer) == {NEAR: (3, 0, 0), FAR: (8, 0, 0)}
    assert all(step.optional for step in answer.steps)


def test_a_device_that_comes_takes_pages_of_its_node():
    db = guest((10, [0]), active=True)
    step = AttachMemory(
        guest=DB, alias="x", node=1, cell=0, size=GIB, block=PAGE, before=0, after=7 * PAGE,
        page=PAGE,
    )  # fmt: skip
    view = snapshot(pools(far=2), db, holdings=[Holding(DB, HELD)])
    answer = with_pages(view, plan(step), {DB: HELD})
    assert [s for s in answer.steps if s is not step] == [
        MakeHugePages(guest=DB, name="db", node=1, page=PAGE, before=0, after=5, free=7)
    ]


def test_mending_goes_as_far_as_it_can():
    db = guest((10, [0]), devices=(device("a", 10, 0),), active=True)
    view = snapshot(pools(), db, holdings=[Holding(DB, HELD)])
    steps = plan(QUOTA, grown(after=100_000))
    refusal = with_pages(view, steps, {DB: HELD})
    assert isinstance(refusal, Refusal)
    assert with_pages(view, steps, {DB: HELD}, mend=True).steps == (QUOTA,)


def test_without_a_look_nothing_is_done():
    db = guest((10, [0]))
    assert with_pages(snapshot(None, db), plan(), {DB: HELD}) == plan()


def withheld(view, node):
    return replace(view, capacity=view.capacity.without({node: "in quarantine: it is poisoned"}))


def test_pages_of_a_withheld_node_are_neither_promised_nor_made():
    state = guest((30, [0, 1]))
    view = withheld(snapshot(pools(far=100), state), 1)
    assert made(with_pages(view, plan(), {DB: HELD})) == {NEAR: (0, 30, 30)}
    anywhere = guest((30, []))
    view = withheld(snapshot(pools(near=10, far=100), anywhere), 1)
    assert made(with_pages(view, plan(), {DB: HELD})) == {NEAR: (0, 20, 30)}


def test_a_guest_that_is_bound_to_a_withheld_node_is_told_why():
    state = guest((30, [1]))
    answer = with_pages(withheld(snapshot(pools(far=100), state), 1), plan(), {DB: HELD})
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.NO_HUGE_PAGES
    assert "node 1: in quarantine: it is poisoned" in answer.detail


def resize(before, after):
    return ResizeVirtioMem(guest=DB, alias="a", before=before * PAGE, after=after * PAGE)


def anew(state, found, holding, *done):
    """What becomes of a guest's pages where a transaction is decided anew, without more for it."""
    view = replace(snapshot(found, state, holdings=[holding]), done=done)
    answer = with_pages(view, plan(), {DB: HELD})
    assert isinstance(answer, Plan)
    return [(s.before, s.after, s.free) for s in answer.steps], answer.pages


def test_what_a_guest_gave_before_the_plan_was_made_anew_goes_back():
    state = guest((5, [0]), devices=(device("a", 6, 0),), active=True)
    found = pools(near=15, made={NEAR: {DB: 15}})
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 15, 15),))
    assert anew(state, found, holding, resize(10, 6)) == (
        [(15, 11, 0)], {DB: (HeldPages(0, PAGE, 11, 11),)},
    )  # fmt: skip


def test_what_was_made_before_the_plan_was_made_anew_is_the_guests():
    state = guest((5, [0]), devices=(device("a", 10, 0),), active=True)
    found = pools(near=15, made={NEAR: {DB: 8}})
    holding = Holding(DB, HELD, pages=(HeldPages(0, PAGE, 9, 2),))
    step = MakeHugePages(guest=DB, node=0, page=PAGE, before=2, after=8, free=6)
    assert anew(state, found, holding, step, resize(4, 10)) == (
        [], {DB: (HeldPages(0, PAGE, 15, 8),)},
    )  # fmt: skip
