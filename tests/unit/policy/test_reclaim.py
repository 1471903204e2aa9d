"""The reclaim planner: who is asked for what, by which device; no byte counted twice or lost."""

from __future__ import annotations

from dataclasses import replace

import arbiter_host as ah
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import MEMORY_KEY
from virtfabric.model.decision import Decision
from virtfabric.model.device import GuestDevice, PciAddress
from virtfabric.model.guest import MemoryMechanism, VirtioMem
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.policy import Escalation
from virtfabric.model.reclaim import Claim, MemoryReport, Push, Recall
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.reclaim import (
    LEAST_WAIT_S,
    MARGIN,
    Victim,
    limits_of,
    memory_paid,
    plan_payment,
    plan_reclaim,
    share_time,
    sum_up,
    victim_of,
)
from virtfabric.policy.sources import Source, sources_of
from virtfabric.policy.stepper import spread_virtio_mem

VIRTIO, BALLOON = MemoryMechanism.VIRTIO_MEM, MemoryMechanism.BALLOON
ONE, TWO = GuestId("a"), GuestId("b")


def source(alias="v0", room=512, block=2, mechanism=VIRTIO, nodes=(), has=None):
    has = room if has is None else has
    return Source(mechanism, alias, CpuSet(nodes), block * MIB, room * MIB, has * MIB)


def victim(guest=ONE, most=512, *sources, spare=None, given=0, presses=True, granule=2):
    return Victim(
        guest, f"guest-{guest}", most * MIB, given * MIB, None if spare is None else spare * MIB,
        presses, granule * MIB, sources or (source(),), "tells something",
    )  # fmt: skip


def asked(plan):
    return [(p.guest, p.alias, p.size // MIB, p.push.value) for p in plan.parts]


def reclaim(size, *victims, **fields):
    return plan_reclaim(Claim(size=size * MIB, **fields), victims)


# -- in order ---------------------------------------------------------------------------------


def test_first_victim_gives_all_before_the_next_one():
    plan = reclaim(600, victim(ONE), victim(TWO))
    assert asked(plan) == [("a", "v0", 512, "spare"), ("b", "v0", 88, "spare")]
    assert (plan.planned, plan.short, plan.notes) == (600 * MIB, 0, ())


def test_spare_memory_of_all_comes_before_anybody_is_pressed():
    plan = reclaim(400, victim(ONE, spare=100), victim(TWO, spare=200))
    assert asked(plan) == [
        ("a", "v0", 100, "spare"), ("a", "v0", 100, "pressed"), ("b", "v0", 200, "spare"),
    ]  # fmt: skip
    assert plan.notes == (
        "guest-a: memory: keeps 312MiB above its floor: tells something",
        "guest-b: memory: keeps 312MiB above its floor: tells something",
    )


def test_who_is_not_to_be_pressed_is_not():
    plan = reclaim(400, victim(ONE, spare=100, presses=False))
    assert asked(plan) == [("a", "v0", 100, "spare")]
    assert plan.short == 300 * MIB
    assert plan.notes[0].endswith("its policy says escalate='no'")


def test_whole_blocks_only():
    assert asked(reclaim(3, victim(granule=2))) == [("a", "v0", 4, "spare")]
    odd = victim(ONE, 7, source(room=7, has=7))
    assert asked(reclaim(7, odd)) == [("a", "v0", 6, "spare")]
    mixed = victim(ONE, 8, source("v1", 3, 2), source("v0", 7, 4), granule=4)
    assert asked(reclaim(8, mixed)) == [("a", "v1", 2, "spare"), ("a", "v0", 4, "spare")]


def test_next_device_when_the_first_has_no_more():
    both = victim(ONE, 512, source("v1", 100), source("v0", 400))
    plan = reclaim(200, both, deadline_s=40.0)
    assert asked(plan) == [("a", "v1", 100, "spare"), ("a", "v0", 100, "spare")]
    assert [part.deadline_s for part in plan.parts] == [20.0, 20.0]


def test_what_was_given_before_is_not_asked_for_again():
    plan = reclaim(300, victim(given=200))
    assert (asked(plan), plan.given) == ([("a", "v0", 100, "spare")], {ONE: 200 * MIB})
    assert plan.gift(ONE) == 300 * MIB


def test_what_it_told_before_it_gave_is_not_counted_twice():
    assert reclaim(300, victim(given=200, spare=200, presses=False)).planned == 200 * MIB


def test_device_is_detached_where_that_is_asked_and_it_is_empty():
    one = victim(ONE, 512, source(room=512, nodes=[2]))
    for size, fields, detached in (
        (512, {"node": 2, "detach": True}, [True]),
        (510, {"node": 2, "detach": True}, [False]),
        (512, {"node": 2}, [False]),
    ):
        plan = reclaim(size, one, **fields)
        assert [part.detach for part in plan.parts] == detached, (size, fields)
    assert str(reclaim(512, one, node=2, detach=True).parts[0]) == (
        "guest-a: 512MiB by virtio-mem v0 (node 2) within 30 s, then the device is detached"
    )
    stuck = victim(ONE, 512, source(room=500, has=512, nodes=[2]))
    assert [p.detach for p in reclaim(512, stuck, node=2, detach=True).parts] == [False]


def test_guest_that_has_nothing_to_give_is_named():
    nothing = victim()._replace(sources=())
    assert reclaim(4, nothing).notes == ("guest-a: memory: nothing of it can give any",)


# -- properties ---------------------------------------------------------------------------------

BLOCKS = st.sampled_from([1, 2, 4, 64])


@st.composite
def victims(draw):
    found = []
    for number in range(draw(st.integers(1, 4))):
        block = draw(BLOCKS)
        rooms = draw(st.lists(st.integers(0, 12), min_size=0, max_size=3))
        sources = tuple(
            source(f"v{n}", room * block, block, nodes=[draw(st.integers(2, 3))],
                   has=room * block + draw(st.sampled_from([0, block])))
            for n, room in enumerate(rooms)
        )  # fmt: skip
        found.append(
            Victim(
                GuestId(f"g{number}"), f"g{number}", draw(st.integers(0, 2000)) * MIB,
                draw(st.integers(0, 20)) * block * MIB,
                draw(st.none() | st.integers(0, 1500).map(lambda mib: mib * MIB)),
                draw(st.booleans()), block * MIB, sources, "",
            )
        )  # fmt: skip
    return found


@settings(max_examples=examples(100), deadline=None)
@given(size=st.integers(1, 3000), found=victims(), detach=st.booleans())
def test_no_byte_is_counted_twice_and_none_is_lost(size, found, detach):
    claim = Claim(size=size * MIB, node=2, detach=detach, deadline_s=30.0)
    plan = plan_reclaim(claim, found)
    sizes = {(v.guest, s.alias): 0 for v in found for s in v.sources}
    for part in plan.parts:
        assert part.size > 0
        sizes[part.guest, part.alias] += part.size
    for one in found:
        own = sum(sizes[one.guest, s.alias] for s in one.sources)
        # never a device that cannot give it, nor a part of a block
        for s in one.sources:
            assert sizes[one.guest, s.alias] <= s.room
            assert sizes[one.guest, s.alias] % s.block == 0
        gift = plan.gift(one.guest)
        assert gift == own + plan.given.get(one.guest, 0)
        assert gift <= one.most
        assert plan.given.get(one.guest, 0) <= one.given
        spare = sum(
            p.size for p in plan.parts if p.guest == one.guest and p.push is Push.SPARE
        ) + plan.given.get(one.guest, 0)
        if one.spare is not None:
            assert spare <= max(one.given, one.spare)
        if not one.presses:
            assert spare == gift
        emptied = {s.alias for s in one.sources if sizes[one.guest, s.alias] == s.has > 0}
        leaving = {p.alias for p in plan.parts if p.guest == one.guest and p.detach}
        wanted = {s.alias for s in one.sources if 2 in s.nodes} if detach else set()
        assert leaving == emptied & wanted
    assert plan.planned == sum(plan.gift(v.guest) for v in found)
    coarsest = max(v.granule for v in found)
    assert plan.planned < claim.size + coarsest
    assert plan.short == max(0, claim.size - plan.planned)
    if plan.short:  # then nobody who may be asked has a whole granule left
        for one in found:
            left = min(
                one.most - plan.gift(one.guest),
                sum(s.room - sizes[one.guest, s.alias] for s in one.sources),
            )
            if one.presses or one.spare is None:
                assert left < one.granule


@settings(max_examples=examples(100), deadline=None)
@given(parts=st.lists(st.integers(1, 64), min_size=1, max_size=4), whole=st.floats(1, 600))
def test_time_of_a_guest_is_shared_and_none_of_it_is_made_up(parts, whole):
    plan = reclaim(sum(parts), victim(ONE, 999, *(
        source(f"v{n}", size, 1) for n, size in enumerate(parts)
    ), granule=1), deadline_s=whole)  # fmt: skip
    times = [part.deadline_s for part in plan.parts]
    assert all(time >= min(whole, LEAST_WAIT_S) for time in times)
    assert sum(times) <= whole + LEAST_WAIT_S * (len(times) - 1) + 1e-6


@settings(max_examples=examples(100), deadline=None)
@given(
    devices=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=1, max_size=4),
    wanted=st.integers(0, 64),
)
def test_devices_give_nothing_below_where_they_stuck(devices, wanted):
    made = tuple(
        VirtioMem(f"v{n}", 0, Bytes(GIB), Bytes(2 * MIB), Bytes(has * 2 * MIB), Bytes(0))
        for n, (has, _) in enumerate(devices)
    )
    least = {f"v{n}": stuck * 2 * MIB for n, (_, stuck) in enumerate(devices)}
    total = sum(int(d.requested) for d in made)
    target = max(0, total - wanted * 2 * MIB)
    sizes = spread_virtio_mem(made, target, least)
    for device, size in zip(made, sizes, strict=True):
        assert min(int(device.requested), least[device.alias]) <= size <= device.requested
    most = sum(max(0, int(d.requested) - least[d.alias]) for d in made)
    assert total - sum(sizes) == min(most, total - target)


# -- with the arbiter ---------------------------------------------------------------------------


def small_host(*, escalate=Escalation.PRESS, web=Escalation.PRESS, **fields):
    """`batch` (10) and `web` (50) have 512 MiB above their floors, `db` (90) wants."""

    def full(uuid, priority):
        device = VirtioMem("ua-v", 0, Bytes(512 * MIB), Bytes(2 * MIB), *[Bytes(512 * MIB)] * 2)
        return ah.guest(
            uuid, priority, virtio_mem=(device,), memory_current=Bytes(640 * MIB),
            memory={"escalate": escalate if uuid == ah.BATCH else web},
        )  # fmt: skip

    return ah.host(
        (full(ah.BATCH, 10), 1000, 640), (full(ah.WEB, 50), 1000, 640),
        (ah.guest(ah.DB, 90), 1000, 128), memory=640 * 2 + 128 + 30, **fields,
    )  # fmt: skip


@settings(max_examples=examples(60), deadline=None)
@given(
    want=st.integers(1, 256).map(lambda n: 2 * n),
    batch=st.none() | st.integers(0, 700),
    web=st.none() | st.integers(0, 700),
    escalate=st.tuples(*[st.sampled_from(Escalation)] * 2),
)
def test_victims_pay_exactly_what_the_planner_says(want, batch, web, escalate):
    snapshot = small_host(escalate=escalate[0], web=escalate[1])
    request = ah.ask(ah.DB, memory=want)
    first = choose_allocation(snapshot, request)
    assert isinstance(first, Decision), first
    told = {ah.BATCH: batch, ah.WEB: web}
    reports = {g: None if m is None else MemoryReport(m * MIB) for g, m in told.items()}
    claims = [Claim(key, size) for key, size in memory_paid(first).items()]
    plans = plan_payment(snapshot, first, reports, {}, claims)
    answer = choose_allocation(snapshot, request, caps=limits_of(first, plans, {}))
    (plan,) = plans
    if plan.short:
        assert not isinstance(answer, Decision)
        return
    assert isinstance(answer, Decision), answer
    paid = {take.victim: take.amounts[MEMORY_KEY] for take in answer.takes}
    assert sum(paid.values()) == want * MIB
    assert paid == {g: plan.gift(g) for g in (ah.BATCH, ah.WEB) if plan.gift(g)}
    for one in sum_up(answer, {}, {}):
        assert (one.asked, one.freed, one.out) == (paid[one.guest], paid[one.guest], 0)


@settings(max_examples=examples(50), deadline=None)
@given(st.dictionaries(st.sampled_from([ah.BATCH, ah.WEB]), st.integers(0, 512), min_size=1))
def test_partial_results_sum_up(stopped):
    """What is asked of a guest is what came and what is out, whoever made up for it."""
    snapshot = small_host()
    decision = ah.granted(snapshot, ah.ask(ah.DB, memory=400))
    notes = {(guest, MEMORY_KEY): (mib * MIB, "it kept it") for guest, mib in stopped.items()}
    told = sum_up(decision, notes, {ah.BATCH: "batch"})
    assert len({one.guest for one in told}) == len(told)
    for one in told:
        assert one.asked == one.freed + one.out
        assert bool(one.why) == (one.guest in stopped)
    assert sum(one.freed for one in told) == memory_paid(decision)[MEMORY_KEY]


# -- what of a guest can give -------------------------------------------------------------------


def test_balloon_is_a_source_only_where_it_may_be_and_can_free():
    balloon = ah.guest(
        ah.BATCH, 10, virtio_mem=(), mechanism=BALLOON, boot_memory=Bytes(512 * MIB),
        memory_current=Bytes(512 * MIB), memory_max=Bytes(512 * MIB),
    )  # fmt: skip
    function = GuestDevice(PciAddress("0000:01:00.0"), "hostdev0", managed=True)
    for state, lends, found in (
        (balloon, True, ["balloon"]),
        (balloon, False, []),
        (replace(balloon, devices=(function,)), True, []),
        (replace(balloon, mechanism=MemoryMechanism.FIXED), True, []),
    ):
        snapshot = ah.host((state, 1000, 512), lend_ballooned=lends)
        got = sources_of(state, MEMORY_KEY, snapshot, {})
        assert [one.mechanism.value for one in got] == found


def test_device_that_stuck_can_give_nothing_more():
    snapshot = small_host()
    recall = Recall(stuck={(ah.BATCH, "ua-v"): 500 * MIB})
    (one,) = sources_of(snapshot.guests[ah.BATCH], MEMORY_KEY, replace(snapshot, recall=recall), {})
    assert (one.room, one.has) == (12 * MIB, 512 * MIB)


def test_what_is_asked_back_already_counts_as_given_though_some_of_it_sticks():
    snapshot = small_host()
    state = snapshot.guests[ah.BATCH]
    (device,) = state.virtio_mem
    sticks = replace(device, requested=Bytes(200 * MIB), current=Bytes(204 * MIB))
    one = victim_of(replace(state, virtio_mem=(sticks,)), MEMORY_KEY, snapshot, None)
    assert (one.given, one.sources[0].room) == (312 * MIB, 200 * MIB)


@pytest.mark.parametrize(
    ("report", "asked_it", "spare"),
    [
        (None, False, None), (None, True, 0), (MemoryReport(MARGIN), True, 0),
        (MemoryReport(MARGIN + GIB), True, GIB),
    ],
)  # fmt: skip
def test_what_a_guest_that_is_not_to_be_pressed_can_spare(report, asked_it, spare):
    snapshot = small_host(escalate=Escalation.NO)
    state = snapshot.guests[ah.BATCH]
    one = victim_of(state, MEMORY_KEY, snapshot, report, asked=asked_it)
    assert (one.spare, one.most) == (spare, 512 * MIB)


def test_steps_of_one_guest_share_its_time():
    steps = [
        ResizeVirtioMem(guest=ah.BATCH, alias=a, before=size * MIB, after=0)
        for a, size in (("v0", 300), ("v1", 100))
    ]
    assert [s.deadline_s for s in share_time(steps, 20.0)] == [15.0, 5.0]
    assert share_time([], 20.0) == []
