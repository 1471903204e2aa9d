"""Layout: exclusiveness, SMT, locality, the operator's pins, and who stays where he is."""

import importlib.util
from dataclasses import replace

import pytest
from host_data import (
    DATA,
    HOSTS,
    guest_id,
    load_host,
    make_guest,
    snapshot_of,
)  # fmt: skip

from virtfabric.model.amounts import Amounts
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.guest import FixedMemory, NumaMode
from virtfabric.model.policy import Smt
from virtfabric.model.units import MIB, Bytes, CpuSet
from virtfabric.policy.layout import Layout, choose_layout

A, B, C = guest_id(1), guest_id(2), guest_id(3)


def layout_of(host, guests, wants, orders=None, **options):
    """Layout when guest number n holds `wants[n]` whole CPUs; `orders` are those of the books."""
    orders = orders or {}
    topology = load_host(host)
    held = {guest_id(n): Amounts.of(cpu=int(c * 1000), memory=128 * MIB) for n, c in wants.items()}
    holdings = {g: (a, orders.get(g, ())) for g, a in held.items()}
    return choose_layout(snapshot_of(topology, guests, holdings, **options), held)


@pytest.mark.parametrize("name", HOSTS)
def test_generated_hosts_are_what_the_script_makes(name):
    spec = importlib.util.spec_from_file_location("make_hosts", DATA / "make_hosts.py")
    module = importlib.util.module_from_spec(spec)
    import sys  # dataclasses look their module up

    sys.modules["make_hosts"] = module
    spec.loader.exec_module(module)
    shape = next(s for s in module.SHAPES if s.name == name)
    assert (DATA / f"{name}.json").read_text() == module.format_host(module.make_host(shape))


@pytest.mark.parametrize("name", HOSTS)
def test_a_dedicated_and_a_shared_guest_part_the_host(name):
    topology = load_host(name)
    found = layout_of(name, [make_guest(1, dedicated=True), make_guest(2)], {1: 1, 2: 0.5})
    assert isinstance(found, Layout)
    assert len(found.orders[A]) == 1
    assert found.pool == topology.cpus - set(found.orders[A])
    assert 0 not in found.orders[A], "housekeeping is taken last"
    assert found.housekeeping == CpuSet((0,))


@pytest.mark.parametrize("name", HOSTS)
def test_of_a_core_that_has_to_be_broken_the_thread_of_housekeeping_is_taken_last(name):
    core = load_host(name).pcpus[0].siblings
    found = layout_of(name, [make_guest(1, dedicated=True)], {1: 1}, cpus=str(core))
    (taken,) = found.orders[A]
    assert taken != 0 or core == {0}
    assert found.housekeeping == CpuSet((0,))


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_held_leaves_everything_to_the_pool(name):
    found = layout_of(name, [], {})
    assert found.pool == load_host(name).cpus
    assert not found.orders


@pytest.mark.parametrize("name", HOSTS)
def test_the_pool_is_kept_large_enough_for_shared_guests(name):
    count = len(load_host(name).cpus)
    guests = [make_guest(1, dedicated=True, vcpus_max=count), make_guest(2, vcpus_max=count)]
    refused = layout_of(name, guests, {1: count, 2: 0.1})
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.NO_PLACEMENT
    assert "shared guests need 1 pCPUs" in refused.detail
    assert isinstance(layout_of(name, guests, {1: count - 1, 2: 1}), Layout)
    assert isinstance(layout_of(name, guests, {1: count - 1, 2: 1.1}), Refusal)


@pytest.mark.parametrize("name", HOSTS)
def test_the_whole_host_for_one_guest_leaves_housekeeping_where_it_is(name):
    count = len(load_host(name).cpus)
    found = layout_of(name, [make_guest(1, dedicated=True, vcpus_max=count)], {1: count})
    assert not found.pool
    assert found.housekeeping == CpuSet((0,))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("smt", [Smt.REQUIRE, Smt.ISOLATE])
def test_nobody_is_beside_a_strict_guest(name, smt):
    topology = load_host(name)
    strict = make_guest(1, dedicated=True, smt=smt)
    found = layout_of(name, [strict, make_guest(2), make_guest(3, dedicated=True)], {1: 1})
    beside = {s for c in found.orders[A] for s in topology.pcpus[c].siblings} - set(found.orders[A])
    assert found.pool.isdisjoint(beside)
    assert len(found.pool) == len(topology.cpus) - 1 - len(beside)


@pytest.mark.parametrize("name", [n for n in HOSTS if load_host(n).has_smt])
def test_whole_cores_on_hosts_with_smt(name):
    topology = load_host(name)
    for smt in (Smt.PREFER, Smt.REQUIRE):
        found = layout_of(name, [make_guest(1, dedicated=True, smt=smt)], {1: 4})
        assert len({topology.pcpus[c].siblings for c in found.orders[A]}) == 2
        assert len({topology.pcpus[c].node for c in found.orders[A]}) == 1
    found = layout_of(name, [make_guest(1, dedicated=True, smt=Smt.ISOLATE)], {1: 4})
    assert len({topology.pcpus[c].siblings for c in found.orders[A]}) == 4
    threads = {s for c in found.orders[A] for s in topology.pcpus[c].siblings}
    assert found.kept_empty == dict.fromkeys(threads - set(found.orders[A]), A)


def test_isolation_that_cannot_be_had_is_refused():
    guests = [make_guest(1, dedicated=True, smt=Smt.ISOLATE, name="db")]
    refused = layout_of("smt-4x2", guests, {1: 5})
    assert isinstance(refused, Refusal)
    assert refused.detail.startswith("db: no 5 pCPUs on cores of their own")
    # three isolated cores leave two pCPUs, the shared guests hold three
    guests.append(make_guest(2))
    refused = layout_of("smt-4x2", guests, {1: 3, 2: 3})
    assert "kept empty beside dedicated vCPUs" in refused.detail


def test_growth_takes_the_sibling_and_says_so():
    guests = [make_guest(1, dedicated=True, numa_nodes=CpuSet((0,)))]
    found = layout_of("smt-4x2", guests, {1: 2}, {A: (2,)})
    assert found.orders[A] == (2, 6)
    assert found.offers[0].chosen
    assert found.offers[0].why == (
        "keeps pCPU 2, adds its sibling 6; node 0 is where its memory is"
    )
    assert all("lost on" in o.why or "equal" in o.why for o in found.offers[1:])
    assert [o.cost for o in found.offers] == sorted(o.cost for o in found.offers)


def test_growth_without_its_sibling_is_told_as_a_shared_core():
    guests = [make_guest(1, dedicated=True), make_guest(2, dedicated=True)]
    found = layout_of("smt-4x2", guests, {1: 3, 2: 5}, {A: (1, 5), B: (0, 4, 2, 6, 3)})
    assert found.orders == {A: (1, 5, 7), B: (0, 4, 2, 6, 3)}
    assert "shares a core with others" in found.offers[0].why


def test_shrink_keeps_the_best_rest():
    guest = [make_guest(1, dedicated=True)]
    assert layout_of("flat-8", guest, {1: 2}, {A: (3, 4, 5)}).orders[A] == (3, 4)
    # whole core (1, 5) stays rather than two halves; vCPU 0 stays where it is
    assert layout_of("smt-4x2", guest, {1: 2}, {A: (1, 2, 5, 6)}).orders[A] == (1, 5)


def test_guests_stay_where_they_are_and_nobody_else_is_looked_at():
    guests = [make_guest(n, dedicated=True) for n in (1, 2, 3)]
    found = layout_of("two-sockets", guests, {1: 2, 2: 1, 3: 2}, {A: (5, 9), B: (30,), C: (2, 18)})
    assert found.orders == {A: (5, 9), B: (30,), C: (2, 18)}
    assert not found.offers


def test_memory_node_first_then_the_nearest():
    far = make_guest(1, dedicated=True, numa_nodes=CpuSet((5,)))
    found = layout_of("eight-nodes", [far], {1: 4})
    nodes = load_host("eight-nodes").nodes
    assert set(found.orders[A]) <= nodes[5].cpus
    # node 5 is full but for one pCPU: the rest comes from a node of the same socket
    full = make_guest(2, dedicated=True, vcpus_max=64)
    taken = tuple(sorted(nodes[5].cpus))[:-1]
    found = layout_of("eight-nodes", [far, full], {1: 2, 2: len(taken)}, {B: taken})
    one, other = sorted(found.orders[A], key=lambda c: c not in nodes[5].cpus)
    assert one in nodes[5].cpus
    assert other in nodes[4].cpus
    assert "its memory is on node 5" in found.offers[0].why


def test_memory_on_a_node_without_pcpus_does_not_confuse():
    guest = make_guest(1, dedicated=True, numa_nodes=CpuSet((1,)), numa_mode=NumaMode.RESTRICTIVE)
    found = layout_of("memory-only", [guest], {1: 2})
    assert found.orders[A] == (1, 7)
    assert found.nodes[A] == CpuSet((1,)), "it is there on purpose"


@pytest.mark.parametrize(
    ("config", "page", "expected"), [("", 0, 1), ("0-1", 0, 1), ("0", 0, 0), ("", 2 * MIB, 0)]
)
def test_a_movable_guest_is_pulled_whole_within_the_operators_nodes(config, page, expected):
    """One on huge pages is not: each of them would need one on the other node."""
    movable = make_guest(
        1, dedicated=True, numa_mode=NumaMode.RESTRICTIVE, numa_nodes=CpuSet((0,)),
        config_numa_nodes=CpuSet.parse(config),
        fixed_memory=(FixedMemory("cell 0", Bytes(MIB), page=Bytes(page)),),
    )  # fmt: skip
    full = make_guest(2, dedicated=True, vcpus_max=32)
    node0 = tuple(c for c in load_host("two-sockets").nodes[0].cpus if c not in (3, 19))
    found = layout_of("two-sockets", [movable, full], {1: 4, 2: len(node0)}, {A: (3, 19), B: node0})
    assert found.nodes[A] == CpuSet((expected,))
    on = {load_host("two-sockets").pcpus[c].node for c in found.orders[A]}
    assert on == ({1} if expected else {0, 1})
    if expected:
        assert "pulled" in found.offers[0].why


def test_config_pins_are_hard():
    pins = {0: CpuSet((5, 6)), 1: CpuSet((5,))}
    guest = make_guest(1, dedicated=True, config_pins=pins)
    assert layout_of("flat-8", [guest], {1: 3}).orders[A][:2] == (6, 5)
    clash = make_guest(1, dedicated=True, config_pins={0: CpuSet((5,)), 1: CpuSet((5,))})
    refused = layout_of("flat-8", [clash], {1: 2})
    assert isinstance(refused, Refusal)
    assert "vcpupin" in refused.detail


def test_another_guest_is_moved_only_when_nothing_else_fits():
    guests = [
        make_guest(1, dedicated=True, smt=Smt.REQUIRE),
        make_guest(2, dedicated=True),
        make_guest(3, dedicated=True),
    ]
    orders = {B: (1, 2), C: (3,)}
    found = layout_of("smt-4x2", guests, {1: 4, 2: 2, 3: 1}, orders)
    assert len(found.orders[A]) == 4
    assert {c % 4 for c in found.orders[A]} == {0, 3} or len({c % 4 for c in found.orders[A]}) == 2
    mine = next(o for o in found.offers if o.guest == A and o.chosen)
    assert "nothing else fits" in mine.why
    assert "moves" in mine.why
    # with less to ask for nobody moves
    calm = layout_of("smt-4x2", guests, {1: 2, 2: 2, 3: 1}, orders)
    assert {g: calm.orders[g] for g in (B, C)} == orders


def test_pins_of_one_guest_push_another_aside():
    pinned = make_guest(1, dedicated=True, config_pins={0: CpuSet((2,))})
    found = layout_of("flat-8", [pinned, make_guest(2, dedicated=True)], {1: 1, 2: 1}, {B: (2,)})
    assert found.orders[A] == (2,)
    assert found.orders[B] != (2,)


def test_books_that_name_one_pcpu_twice_or_a_lost_one_are_mended():
    guests = [make_guest(n, dedicated=True) for n in (1, 2)]
    found = layout_of("flat-8", guests, {1: 2, 2: 2}, {A: (1, 2), B: (2, 77)})
    assert found.orders[A] == (1, 2)
    assert len(set(found.orders[B]) | {1, 2}) == 4
    assert all(c < 8 for c in found.orders[B])


def test_a_guest_that_is_out_of_sight_keeps_its_place():
    held = {A: Amounts.of(cpu=2000), B: Amounts.of(cpu=1000)}
    snapshot = snapshot_of(
        load_host("flat-8"),
        [make_guest(2, dedicated=True)],
        {A: (held[A], (1, 2)), B: (held[B], ())},
    )
    found = choose_layout(snapshot, held)
    assert found.orders[A] == (1, 2)
    assert found.orders[B][0] not in (1, 2)


def test_only_managed_pcpus_are_given():
    guests = [make_guest(1, dedicated=True), make_guest(2)]
    found = layout_of("two-sockets", guests, {1: 2, 2: 1}, cpus="8-11", housekeeping="0")
    assert set(found.orders[A]) | found.pool == {8, 9, 10, 11}
    assert found.housekeeping == CpuSet((0,))


def test_policy_change_to_isolate_moves_the_guest_apart():
    guest = make_guest(1, dedicated=True, smt=Smt.ISOLATE)
    found = layout_of("smt-4x2", [guest], {1: 2}, {A: (1, 5)})
    assert found.orders[A][0] == 1
    assert found.orders[A][1] % 4 != 1


@pytest.mark.parametrize("name", HOSTS)
def test_layout_is_stable_once_committed(name):
    guests = [make_guest(1, dedicated=True), make_guest(2)]
    first = layout_of(name, guests, {1: 1, 2: 0.5})
    again = layout_of(name, guests, {1: 1, 2: 0.5}, first.orders)
    assert replace(first, offers=()) == again
