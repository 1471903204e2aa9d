"""Slices that nobody uses: noticed, shown, and ended for whoever waits; no others, and no more."""

import agent_world as aw
import pytest
from card_agent import CardWorld, slice_file

from virtfabric.model.errors import RefusedError

FOR_S = 600


@pytest.fixture
def world(tmp_path):
    made = CardWorld(tmp_path, settings={"idle_after_s": FOR_S})
    yield made
    made.close()


class Clock:
    """The time of the watch over idle slices alone: all else goes by the machine's."""

    def __init__(self):
        self.at = 0.0

    def monotonic(self):
        return self.at


@pytest.fixture
def watch(world):
    watch = world.agent.agent._cards.idle
    watch._clock = Clock()
    return watch


def wait(watch, seconds=FOR_S):
    watch.look()
    watch._clock.at += seconds
    watch.look()


def names(world):
    return sorted(one.part.name for one in world.books.slices.values())


def test_what_nobody_holds_is_noticed_once_and_shown(world, watch):
    world.create(slice_file("old", cores=2))
    wait(watch, FOR_S - 1)
    assert watch.idle() == {}
    wait(watch, 1)
    wait(watch, 60)
    (record,) = world.audited("slice.idle")
    assert (record.body["part"]["name"], record.body["idle_s"]) == ("old", FOR_S)
    assert world.agent.agent.slices(aw.ROOT)[0]["idle_s"] == FOR_S + 60


def test_who_waits_gets_it(world, watch):
    world.create(slice_file("old", cores=8, priority=80))
    world.create(slice_file("other", cores=8, priority=90))
    with pytest.raises(RefusedError):
        world.create(slice_file("new", cores=4, priority=10))
    wait(watch)
    job = world.create(slice_file("new", cores=4, priority=10))
    assert job["state"] == "done", job
    assert job["result"]["steps"][0].startswith("card C-1: end slice old")
    assert names(world) == ["new", "other"], "one of them was enough, and the lower priority"
    world.check()


def test_no_more_than_it_takes(world, watch):
    for number in range(4):
        world.create(slice_file(f"old-{number}", cores=4, priority=number))
    wait(watch)
    job = world.create(slice_file("new", cores=7))
    assert job["state"] == "done"
    # two on one card, and of those the ones that are needed: not the cheapest of each card
    assert len([n for n in names(world) if n.startswith("old")]) == 2
    world.check()


def test_what_has_a_holder_or_is_not_to_be_reclaimed_stays(world, watch):
    world.create(slice_file("held", cores=8), guest="web")
    world.create(
        slice_file("kept", cores=8).replace("[slice.qos]", "[slice.qos]\nreclaimable=false")
    )
    wait(watch)
    assert watch.takeable() == ()
    with pytest.raises(RefusedError):
        world.create(slice_file("new", cores=4, priority=1))
    assert names(world) == ["held", "kept"]


def test_a_held_slice_is_idle_when_its_dma_stands_still(world, watch):
    world.create(slice_file("held", cores=1), guest="web")
    (held,) = world.books.slices.values()
    firmware = world.brains[held.card].firmware
    wait(watch)
    assert watch.idle() == {}, "a card that counts nothing says nothing"
    for count in (64, 128):
        firmware.measure(held.slice, {"dma_read": count, "dma_written": 0})
        world.pass_time(2)
        wait(watch)
    assert watch.idle() == {held.key: FOR_S}
    assert world.audited("slice.idle")[0].body["holder"] == held.holder
    firmware.measure(held.slice, {"dma_read": 129, "dma_written": 0})
    world.pass_time(2)
    watch.look()
    assert watch.idle() == {}
    assert watch.takeable() == ()


def test_a_slice_over_two_cards_goes_whole(world, watch):
    world.create(slice_file("wide", cores=14))
    wait(watch)
    job = world.create(slice_file("new", cores=8))
    assert job["state"] == "done", job
    assert names(world) == ["new"]
    world.check()


def test_what_fails_leaves_the_idle_ones(world, watch):
    world.create(slice_file("old", cores=8), slice_file("more", cores=8))
    wait(watch)

    def refuse(message):
        if type(message).__name__ == "Commit":
            world.wires["C-1"].lose("pulled")

    world.wires["C-1"].before = world.wires["C-2"].before = refuse
    job = world.create(slice_file("new", cores=12))
    assert job["state"] == "failed", job
    for wire in world.wires.values():
        wire.before = lambda _message: None
        wire.return_()
    world.settle()
    world.pass_time(31)
    world.settle()
    assert names(world) == ["more", "old"]
    world.check()


def test_nothing_is_idle_where_it_is_switched_off(tmp_path):
    world = CardWorld(tmp_path, settings={"idle_after_s": 0.0})
    try:
        watch = world.agent.agent._cards.idle
        watch._clock = Clock()
        world.create(slice_file("old", cores=8))
        wait(watch, 10**6)
        assert watch.idle() == {}
        assert watch.takeable() == ()
    finally:
        world.close()


def test_what_a_guest_holds_is_not_ended_for_another_s_function(tmp_path):
    world = CardWorld(
        tmp_path, {"C-1": {}}, functions=True, settings={"idle_after_s": FOR_S}
    )  # fmt: skip
    try:
        watch = world.agent.agent._cards.idle
        watch._clock = Clock()
        world.create(slice_file("old", units=0, cores=8))
        world.create(slice_file("full", units=4, cores=0, priority=1), guest="batch")
        refused = world.agent.allocate("database", **{"device:crypto.aes": "1"})
        assert refused["state"] == "refused"
        wait(watch)
        again = world.agent.allocate("database", **{"device:crypto.aes": "1"})
        assert again["state"] == "refused", "the one that is in its way has a holder"
    finally:
        world.close()
