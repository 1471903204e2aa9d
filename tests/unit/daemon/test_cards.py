"""The agent and its offload cards: slices over one and several, and what becomes of them."""

import agent_world as aw
import pytest
from card_agent import HOST, CardWorld, slice_file
from card_bed import NEVER, SIGNER

from virtfabric.adapters.simulated.faults import SimulatedCrash
from virtfabric.model.errors import CardLostError, InvalidValueError, RefusedError
from virtfabric.protocol import messages as m
from virtfabric.protocol.imagefile import format_manifest
from virtfabric.trust.images import describe_image, sign_image


@pytest.fixture
def world(tmp_path):
    world = CardWorld(tmp_path)
    yield world
    world.close()


def test_what_there_is_shows(world):
    first, second = world.agent.agent.cards(aw.ROOT)
    assert (first["serial"], first["condition"], first["slices"]) == ("C-1", "connected", 0)
    assert first["free"]["cores"] == 8
    assert first["free"]["accelerators"] == {"crypto.aes": 4}
    assert second["adapter"]["site"] == "node:1"
    assert [c["serial"] for c in world.agent.agent.status(aw.ROOT)["cards"]] == ["C-1", "C-2"]
    assert world.agent.agent.slices(aw.ROOT) == []


def test_a_slice_of_one_card(world):
    job = world.create(slice_file("aes", cores=2, units=1), guest="web")
    assert job["state"] == "done", job
    (held,) = world.books.slices.values()
    assert (held.part.name, held.holder) == ("aes", aw.uuid_of(50))
    (shown,) = world.agent.agent.slices(aw.ROOT)
    assert (shown["wish"], shown["holder_name"], shown["phase"]) == (held.wish, "web", "blank")
    assert job["result"]["slices"][0]["key"] == held.key
    assert job["result"]["steps"] == [
        "card C-1: reserve slice aes (2 cores, 1 crypto.aes, priority 50)",
        "card C-1: grant slice aes (2 cores, 1 crypto.aes, priority 50)",
    ]
    world.check()


def test_a_slice_over_two_cards_and_its_end(world):
    job = world.create(slice_file("big", cores=14))
    assert job["state"] == "done", job
    assert {one.card for one in world.books.slices.values()} == {"C-1", "C-2"}
    assert len({one.wish for one in world.books.slices.values()}) == 1
    world.check()
    assert world.destroy("big")["state"] == "done"
    assert world.on_cards() == {"C-1": [], "C-2": []}
    world.check()


def test_several_slices_of_a_file_or_none(world):
    job = world.create(slice_file("a", cores=8), slice_file("b", cores=8))
    assert job["state"] == "done"
    with pytest.raises(RefusedError, match="slice d: 2 adapters"):
        world.create(slice_file("c", cores=0, units=1), slice_file("d", cores=1))
    assert len(world.books.slices) == 2
    world.check()


def test_a_dry_run_prints_the_steps_and_changes_nothing(world):
    plan = world.agent.agent.slices_plan(aw.ROOT, slice_file(cores=10), {})
    assert [step["data"]["after"] for step in plan["steps"]] == ["promised"] * 2 + ["granted"] * 2
    assert world.promises() == 0


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("version = 1", {}, InvalidValueError),
        (slice_file(cores=-1), {}, InvalidValueError),
        (slice_file(), {"colour": "red"}, InvalidValueError),
        (slice_file(), {"reclaim": "maybe"}, InvalidValueError),
        (slice_file(), {"guest": "nobody"}, RefusedError),
        (slice_file(cores=17), {}, RefusedError),
    ],
)
def test_what_cannot_be_made(world, text, options, error):
    with pytest.raises(error):
        world.agent.agent.slices_create(aw.ROOT, text, options)
    assert world.promises() == 0


def test_a_name_must_mean_one_slice(world):
    world.create(slice_file("x"))
    world.create(slice_file("x"))
    with pytest.raises(RefusedError, match="several slices are called 'x'"):
        world.agent.agent.slice_destroy(aw.ROOT, "x")
    one = min(world.books.slices.values(), key=lambda held: held.slice)
    assert world.destroy(f"{one.card}/{one.slice}")["state"] == "done"
    assert world.destroy("x")["state"] == "done"
    with pytest.raises(RefusedError, match="has no slice 'x'; it has: none"):
        world.agent.agent.slice_destroy(aw.ROOT, "x")


def test_a_slice_that_a_running_guest_has_is_not_ended(world):
    world.create(slice_file("x"), guest="web")
    with pytest.raises(RefusedError, match="web has it, and runs"):
        world.agent.agent.slice_destroy(aw.ROOT, "x")


def test_only_who_may_changes_cards(world):
    for call in (
        lambda who: world.agent.agent.slices_create(who, slice_file(), {}),
        lambda who: world.agent.agent.slice_destroy(who, "x"),
        lambda who: world.agent.agent.slice_program(who, "x", "/x"),
        lambda who: world.agent.agent.card_trust(who, "C-1"),
    ):
        with pytest.raises(RefusedError, match="may not cards"):
            call(aw.NOBODY)
    assert len(world.audited("access.denied")) == 4


# -- priorities -------------------------------------------------------------------------------


def test_a_higher_priority_takes_from_a_lower_one(world):
    world.create(slice_file("low", cores=16, priority=10), guest="batch")
    job = world.create(slice_file("high", cores=12, priority=80))
    assert job["state"] == "done", job
    assert {one.part.name for one in world.books.slices.values()} == {"high"}
    assert "from 00000000-0000-4000-8000-000000000010 to nobody" in job["result"]["steps"][0]
    world.settle()
    world.check()
    assert not world.audited("slice.lost")  # it was decided here


def test_a_slice_that_loses_a_part_ends_whole(world):
    world.create(slice_file("low", cores=10, priority=10), guest="batch")
    assert len(world.books.slices) == 2
    job = world.create(slice_file("high", cores=8, priority=80))
    assert job["state"] == "done", job
    assert {one.part.name for one in world.books.slices.values()} == {"high"}
    assert sum(map(len, world.on_cards().values())) == 1
    world.check()


def test_a_slice_that_another_host_uses_is_left_alone(world):
    for serial, brain in world.brains.items():
        decision = brain.firmware.handle(
            m.AllocationRequest(f"host-b/{serial}", _spec(cores=8, priority=1), "their guest")
        )[0]
        brain.firmware.handle(m.Commit(decision.reservation))
    world.agent.agent._cards.desk._cards.reach("C-1").refresh()
    world.agent.agent._cards.desk._cards.reach("C-2").refresh()
    with pytest.raises(RefusedError, match="no-capacity"):
        world.create(slice_file(cores=2, priority=90))
    assert world.promises() == 0


def _spec(**more):
    from virtfabric.model.adapter import SliceSpec

    return SliceSpec(**more).check()


def test_victims_get_their_slices_back_when_it_fails_after_all(world):
    world.create(slice_file("low", cores=16, priority=10), guest="batch")
    before = set(world.books.slices)

    def fail(message):
        if isinstance(message, m.Commit) and world.brains["C-1"].firmware.books.slices:
            world.wires["C-2"].lose("gone in mid-plan")

    world.wires["C-1"].after = fail
    job = world.create(slice_file("high", cores=16, priority=80))
    assert job["state"] == "failed", job
    assert "card C-2" in job["error"]["detail"]
    world.wires["C-1"].after = lambda _message: None
    world.wires["C-2"].return_()
    world.pass_time(31)
    world.settle()
    assert set(world.books.slices) == before
    world.check()
    assert {one.holder for one in world.books.slices.values()} == {aw.uuid_of(10)}


def test_a_card_that_fails_its_commit_leaves_nothing_on_the_others(world):
    """At once, by the undo: nobody comes back whose return would be an occasion to settle."""
    world.create(slice_file("low", cores=16, priority=10), guest="batch")
    before = set(world.books.slices)
    struck = []

    def fail_once(asked, answer):
        if not isinstance(asked, m.Commit) or struck:
            return answer
        struck.append(asked)  # it did happen; the card says that it did not
        return m.Error(m.ErrorCode.INTERNAL, "the flash is full")

    world.wires["C-2"].mangle = fail_once
    job = world.create(slice_file("high", cores=16, priority=80))
    assert job["state"] == "failed", job
    assert "the flash is full" in job["error"]["detail"]
    assert world.promises() == 0
    assert sum(map(len, world.on_cards().values())) == 2
    assert set(world.books.slices) == before
    world.settle()  # cards have the victims under other ids now
    world.check()


# -- cards that fail --------------------------------------------------------------------------


def test_a_lost_card_takes_nothing_from_anybody(world):
    world.create(slice_file("x", cores=10), guest="web")
    live = world.agent.frozen()
    world.cut_power("C-1")
    world.settle()
    (alert,) = world.alerts()
    assert alert == "card C-1 is lost: the card is gone; guests keep what they have"
    assert world.agent.agent.cards(aw.ROOT)[0]["condition"] == "lost"
    assert len(world.books.slices) == 2
    assert world.agent.frozen() == live
    with pytest.raises(RefusedError):
        world.create(slice_file("y", cores=10))
    world.power_on("C-1")
    world.settle()
    assert world.alerts() == []
    assert [r.body["card"] for r in world.audited("card.lost")] == ["C-1"]
    world.check()


def test_a_card_that_lies_is_audited_and_nothing_is_asked_of_it(world):
    world.create(slice_file("x", cores=10), guest="web")
    live = world.agent.frozen()
    world.wires["C-1"].tell(m.Done())
    world.settle()
    (record,) = world.audited("card.distrusted")
    assert record.body["detail"] == "it sent a Done that nobody had asked for"
    (alert,) = world.alerts()
    assert "virtfabric card trust C-1" in alert
    job = world.create(slice_file("y", cores=4))
    assert job["state"] == "done"
    assert [one.card for one in world.books.slices.values() if one.part.name == "y"] == ["C-2"]
    assert world.agent.frozen() == live
    shown = world.agent.agent.card_trust(aw.ROOT, "C-1")
    assert shown["condition"] == "connected"
    world.settle()
    assert world.alerts() == []
    assert world.audited("card.trusted")[0].body["was"] == record.body["detail"]
    world.check()


def replace_card(world, serial, tmp_path, **amounts):
    """Another card comes, with the same certificate and an empty flash."""
    world.cut_power(serial)
    (tmp_path / f"{serial}.flash").unlink()
    world.amounts[serial] = amounts
    world.power_on(serial)


def test_slices_are_made_anew_on_a_card_that_was_replaced(world, tmp_path):
    world.create(slice_file("x", cores=10), guest="web")
    before = set(world.books.slices)
    replace_card(world, "C-1", tmp_path)
    world.settle()
    world.agent.agent.card_trust(aw.ROOT, "C-1")
    world.settle()
    assert set(world.books.slices) == before
    assert world.audited("slice.remade")[0].body["card"] == "C-1"
    assert any("made anew, without its image" in text for text in world.alerts())
    world.check()


def test_slices_for_which_a_replaced_card_has_no_room_are_lost_and_told_of(world, tmp_path):
    world.create(slice_file("x", cores=10), guest="web")
    replace_card(world, "C-1", tmp_path, cores=1)
    world.settle()
    assert world.audited("card.distrusted")
    world.agent.agent.card_trust(aw.ROOT, "C-1")
    world.settle()
    assert [one.card for one in world.books.slices.values()] == ["C-2"]
    (lost,) = world.audited("slice.lost")
    assert lost.body["card"] == "C-1"
    assert any("slice x (slice-1 of card C-1) is gone, which" in text for text in world.alerts())
    world.check()


def test_a_card_that_floods_does_not_fill_the_audit_log(world):
    for number in range(500):
        world.wires["C-1"].tell(m.Event(m.EventKind.ACCESS_FAULT, number, "again"))
    world.settle()
    records = world.audited("card.event")
    assert 32 <= len(records) < 50
    told = sum(record.body.get("dropped", 0) for record in records)
    flood = world.agent.agent._cards.watch._floods["C-1"]
    assert len(records) + told + flood.dropped == 500
    assert world.create(slice_file("x"))["state"] == "done"


def test_what_was_reclaimed_by_another_host_leaves_the_books(world):
    world.create(slice_file("low", cores=8, priority=1))
    (held,) = world.books.slices.values()
    brain = world.brains[held.card].firmware
    decision = brain.handle(m.AllocationRequest("host-b/1", _spec(cores=4, priority=90)))[0]
    brain.handle(m.Commit(decision.reservation))
    world.pass_time(1)
    world.settle()
    assert world.books.slices == {}
    assert world.audited("slice.lost")
    assert [r.body["what"] for r in world.audited("card.event")] == ["slice-reclaimed"]


def test_a_promise_that_names_others_than_planned_is_planned_anew(world):
    """Another host was faster: who would end now was not meant to."""
    world.create(slice_file("mine", cores=8, priority=1))
    struck = []

    def sneak(message):
        # between the plan and the promise another host fills the other card, and ours is taken
        if isinstance(message, m.AllocationRequest) and not struck:
            struck.append(message)
            for serial in ("C-1", "C-2"):
                brain = world.brains[serial].firmware
                asked = m.AllocationRequest(f"host-b/{serial}", _spec(cores=8, priority=5))
                (answer,) = brain.handle(asked)
                if isinstance(answer, m.Decision) and not answer.victims:
                    brain.handle(m.Commit(answer.reservation))
                elif isinstance(answer, m.Decision):
                    brain.handle(m.Abort(answer.reservation))

    for wire in world.wires.values():
        wire.before = sneak
    job = world.create(slice_file("new", cores=4, priority=60))
    assert struck
    assert job["state"] in ("done", "refused"), job
    world.settle()
    world.check()
    assert world.promises() == 0


# -- images ----------------------------------------------------------------------------------


def write_image(place, data, **more):
    path = place / "aes.img"
    path.write_bytes(data)
    manifest = describe_image("aes-1", "crypto.aes", data, more.get("not_after", NEVER))
    signature = more.get("signature") or sign_image(SIGNER, manifest)
    (place / "aes.img.manifest").write_text(format_manifest(manifest, signature))
    return str(path)


def programmed(world, path):
    """The job, while time passes on the cards."""
    heard = []
    stop = world.agent.agent.subscribe(heard.append)
    job = world.agent.agent.slice_program(aw.ROOT, "aes", path)["job"]

    def ended():
        world.pass_time(0.05)
        return world.agent.agent._jobs.get(job).ended.is_set()

    aw.eventually(ended, "never programmed")
    stop()
    texts = [n.body["text"] for n in heard if n.kind == "job.progress" and n.body["job"] == job]
    return world.agent.agent.job(aw.ROOT, job), texts


def test_a_slice_over_two_cards_is_programmed_with_live_progress(world, tmp_path):
    world.create(slice_file("aes", cores=10, units=6))
    job, texts = programmed(world, write_image(tmp_path, bytes(1_000_000)))
    assert job["state"] == "done", job
    assert job["result"] == {"slice": "aes", "image": "aes-1", "parts": 2}
    assert texts[0] == "card C-1: slice-1: loading, 262144 of 1000000 bytes"
    shown = world.agent.agent.slices(aw.ROOT)
    assert [(one["phase"], one["image"]) for one in shown] == [("ready", "aes-1")] * 2
    (record,) = world.audited("slice.programmed")
    assert record.body["image"] == "aes-1"


@pytest.mark.parametrize(
    ("more", "words"),
    [({"not_after": 1}, "past its end date"), ({"signature": "0" * 128}, "not signed by anybody")],
    ids=["expired", "badly signed"],
)
def test_a_bad_image_is_refused_and_audited(world, tmp_path, more, words):
    world.create(slice_file("aes", units=1))
    job, _ = programmed(world, write_image(tmp_path, bytes(1000), **more))
    assert (job["state"], job["error"]["reason"]) == ("refused", "image-refused")
    assert words in job["error"]["detail"]
    (record,) = world.audited("slice.not-programmed")
    assert words in record.body["why"]
    assert world.agent.agent.slices(aw.ROOT)[0]["phase"] == "blank"


def test_an_image_that_a_lost_link_cuts_off_is_audited(world, tmp_path):
    world.create(slice_file("aes", units=1))
    (one,) = world.books.slices.values()
    wire = world.wires[one.card]
    wire.before = lambda message: isinstance(message, m.ImageData) and wire.lose("pulled")
    job, _ = programmed(world, write_image(tmp_path, bytes(1000)))
    assert job["state"] == "failed", job
    (record,) = world.audited("slice.not-programmed")
    assert (record.body["card"], record.body["why"]) == (one.card, f"card {one.card}: pulled")


def test_a_file_that_is_no_image_is_not_begun(world, tmp_path):
    world.create(slice_file("aes", units=1))
    world.create(slice_file("plain", cores=1))
    path = write_image(tmp_path, bytes(1000))
    program = world.agent.agent.slice_program
    for wrong in ("aes.img", str(tmp_path / "none"), str(tmp_path), "/dev/zero"):
        with pytest.raises(InvalidValueError):
            program(aw.ROOT, "aes", wrong)
    with pytest.raises(RefusedError, match="has no accelerators"):
        program(aw.ROOT, "plain", path)
    (tmp_path / "aes.img").write_bytes(bytes(999) + b"x")
    with pytest.raises(InvalidValueError, match="is not what its manifest was made for"):
        program(aw.ROOT, "aes", path)
    (tmp_path / "link.img").symlink_to("/etc/shadow")
    (tmp_path / "link.img.manifest").write_text((tmp_path / "aes.img.manifest").read_text())
    with pytest.raises(InvalidValueError, match="cannot be read"):
        program(aw.ROOT, "aes", str(tmp_path / "link.img"))


# -- crashes ----------------------------------------------------------------------------------

KINDS = (m.AllocationRequest, m.Commit, m.Assign)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("card", ["C-1", "C-2"])
def test_a_kill_at_any_boundary_leaves_all_or_nothing(world, kind, when, card):
    world.create(slice_file("low", cores=16, priority=10), guest="batch")
    before = set(world.books.slices)

    def crash(message):
        if isinstance(message, kind):
            raise SimulatedCrash

    setattr(world.wires[card], when, crash)
    text = slice_file("high", cores=16, priority=80)
    world.agent.agent.slices_create(aw.ROOT, text, {})
    aw.eventually(lambda: world.agent._process._killed, "nobody crashed")
    world.restart_agent()
    world.pass_time(31)
    world.settle()
    assert set(world.books.slices) == before
    assert world.promises() == 0
    world.check()
    assert world.create(text.replace("high", "again"))["state"] == "done"
    world.check()


def test_a_card_that_is_away_does_not_keep_an_agent_from_starting(world):
    def crash(message):
        if isinstance(message, m.Commit):
            raise SimulatedCrash

    world.wires["C-2"].after = crash
    world.agent.agent.slices_create(aw.ROOT, slice_file("big", cores=16), {})
    aw.eventually(lambda: world.agent._process._killed, "nobody crashed")
    made = world._fleet

    def without_one(host):
        fleet = made(host)
        world.wires["C-2"].lose("still away")
        return fleet

    world.agent.make_cards = without_one
    world.restart_agent()
    assert world.books.slices == {}
    assert world.on_cards()["C-1"] == []
    assert len(world.on_cards()["C-2"]) == 1  # nobody can tell it yet
    world.wires["C-2"].return_()
    world.settle()
    assert world.on_cards()["C-2"] == []
    (record,) = world.audited("slice.withdrawn")
    assert record.subjects[0].startswith(f"{HOST}/")


def test_who_asks_for_a_lost_card_is_told_at_once(world):
    world.cut_power("C-1")
    with pytest.raises(CardLostError, match="card C-1 is lost: the card is gone"):
        world.agent.agent._cards.desk._cards.reach("C-1")


def test_two_slices_for_which_the_same_one_ends(world):
    world.create(slice_file("old", cores=8, priority=10))
    world.create(slice_file("kept", cores=8, priority=90))
    job = world.create(
        slice_file("left", cores=4, priority=50), slice_file("right", cores=4, priority=50)
    )
    assert job["state"] == "done", job
    assert sorted(one.part.name for one in world.books.slices.values()) == [
        "kept", "left", "right",
    ]  # fmt: skip
    assert world.audited("card.distrusted") == []
    world.check()


def in_firmware(world, card, *messages):
    """What another host, or nobody, has a card do: the agent hears of it by its inventory."""
    for message in messages:
        (answer,) = world.brains[card].firmware.handle(message)
    return answer


def refresh(world, *cards):
    for card in cards:
        world.agent.agent._world.cards.reach(card).refresh()


def own(world, card):
    return next(one for one in world.books.slices.values() if one.card == card)


def test_a_card_that_comes_back_while_another_is_settled_loses_nothing(world):
    world.create(slice_file("x", cores=8), slice_file("y", cores=8))
    lost, other = own(world, "C-1"), own(world, "C-2")
    world.wires["C-1"].lose("pulled")
    in_firmware(world, "C-1", m.Release(lost.slice))
    in_firmware(world, "C-2", m.Assign(other.slice, "somebody"))

    def come_back(message):
        if isinstance(message, m.Assign):
            world.wires["C-1"].return_()

    refresh(world, "C-2")
    world.wires["C-2"].before = come_back
    world.agent.agent._cards.watch.settle()
    world.settle()
    assert set(world.books.slices) == {lost.key, other.key}
    assert len(world.audited("slice.remade")) == 1
    assert world.audited("slice.lost") == []
    world.check()


def test_a_slice_is_told_of_as_made_anew_when_it_is(world):
    """The card is lost again as it makes it."""
    world.create(slice_file("x", cores=8))
    (one,) = world.books.slices.values()
    wire = world.wires[one.card]
    wire.lose("pulled")
    in_firmware(world, one.card, m.Release(one.slice))
    wire.before = lambda message: isinstance(message, m.Commit) and wire.lose("pulled again")
    wire.return_()
    world.settle()
    assert world.audited("slice.remade") == []
    assert set(world.books.slices) == {one.key}
    wire.before = lambda _message: None
    wire.return_()
    world.settle()
    assert len(world.audited("slice.remade")) == 1
    world.check()


def test_a_card_that_does_not_let_go_keeps_no_other_from_being_settled(world):
    world.create(slice_file("x", cores=8), slice_file("y", cores=8))
    mine = own(world, "C-2")
    world.destroy(own(world, "C-1").wish.rpartition(".")[0] + ".0")
    promise = in_firmware(world, "C-1", m.AllocationRequest("host-a/stray/0", _spec(cores=1)))
    in_firmware(world, "C-1", m.Commit(promise.reservation))
    in_firmware(world, "C-2", m.Release(mine.slice))

    def refuse(asked, answer):
        if isinstance(asked, m.Release):
            return m.Error(m.ErrorCode.INTERNAL, "the flash is full")
        return answer

    world.wires["C-1"].mangle = refuse
    refresh(world, "C-1", "C-2")
    world.agent.agent._cards.watch.settle()
    assert world.on_cards()["C-2"] == [mine.key]
    assert len(world.audited("slice.remade")) == 1


def test_a_slice_made_for_a_guest_that_is_nowhere_leaves_the_books(tmp_path):
    world = CardWorld(tmp_path, {"C-1": {}}, functions=True)
    try:
        world.agent.allocate("web", **{"device:crypto.aes": "1"})
        replace_card(world, "C-1", tmp_path)
        world.agent.settle()
        world.agent.agent.card_trust(aw.ROOT, "C-1")
        world.settle()
        assert world.books.slices == {}
        world.check()
    finally:
        world.close()


def test_a_slice_that_a_faster_host_takes_before_the_end_is_told_of(world):
    """Between its grant on one card and the end of the plan on the other."""
    struck = []

    def sneak(message):
        if isinstance(message, m.Commit) and not struck:
            struck.append(message)
            asked = m.AllocationRequest("host-b/1", _spec(cores=8, priority=99))
            promise = in_firmware(world, "C-1", asked)
            in_firmware(world, "C-1", m.Commit(promise.reservation))
            refresh(world, "C-1")

    world.wires["C-2"].after = sneak
    job = world.create(slice_file("wide", cores=14, priority=50))
    assert struck
    assert job["state"] == "failed", job
    assert "card C-1" in job["error"]["detail"], job
    world.settle()
    assert world.books.slices == {}
    world.check()
