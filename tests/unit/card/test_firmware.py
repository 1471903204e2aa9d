"""The firmware on a bench: slices, promises, images, faults, and power that goes."""

import pytest
import slice_reference as reference
from card_bed import BITS, Bench, signed
from slice_world import AES, ZSTD, spec

from virtfabric.model.errors import Reason
from virtfabric.model.image import Phase
from virtfabric.model.units import MIB
from virtfabric.protocol import messages as m
from virtfabric.shim.firmware.firmware import PROMISE_S
from virtfabric.shim.firmware.programming import PATIENCE_S
from virtfabric.shim.firmware.statelog import StateDamagedError, StateLog
from virtfabric.trust.images import make_signer


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def events(told, what):
    return [t for t in told if isinstance(t, m.Event) and t.what == what]


def test_a_slice_is_promised_granted_and_kept(bench):
    decision = bench.wish("r-1", spec(cores=2, memory=3, lanes=2), holder="guest")
    assert decision.expires_ms == PROMISE_S * 1000
    assert bench.ask(m.InventoryRequest()).slices == ()
    grant = bench.ask(m.Commit(decision.reservation))
    assert grant.slice == decision.slice
    inventory = bench.ask(m.InventoryRequest())
    assert [r.slice for r in inventory.slices] == [grant.slice]
    assert inventory.generation == grant.generation
    bench.cut_power()
    assert bench.ask(m.InventoryRequest()) == inventory
    assert events(bench.card.tick(), "state-restored")


def test_a_repeated_request_is_answered_as_the_first_was(bench):
    wanted = spec(cores=2)
    decision = bench.wish("r-1", wanted)
    assert bench.wish("r-1", wanted) == decision
    bench.cut_power()
    assert bench.wish("r-1", wanted) == decision
    grant = bench.ask(m.Commit(decision.reservation))
    assert bench.wish("r-1", wanted).slice == grant.slice
    assert bench.wish("r-1", spec(cores=1)).reason == Reason.INVALID_ARGUMENT
    assert len(bench.card.books.slices) == 1


def test_a_refusal_says_what_is_short_and_what_would_fit(bench):
    refusal = bench.wish("r-1", spec(cores=9))
    assert refusal.code == m.ErrorCode.REFUSED
    assert refusal.reason == Reason.NO_CAPACITY
    assert "cores 9 wanted, 4 free" in refusal.detail
    assert refusal.would_fit["cores"] == 4
    assert bench.wish("r-2", spec(capability="fpga.sort", units=1)).reason == (
        Reason.UNKNOWN_CAPABILITY
    )


def test_a_promise_nobody_commits_ends_by_itself(bench):
    decision = bench.wish("r-1", spec(cores=4))
    assert bench.wish("r-2", spec(cores=1)).reason == Reason.NO_CAPACITY
    bench.cut_power()
    assert not events(bench.pass_time(PROMISE_S - 1), "reservation-expired")
    assert len(events(bench.pass_time(1), "reservation-expired")) == 1
    assert bench.ask(m.Commit(decision.reservation)).reason == Reason.UNKNOWN_ID
    bench.make("r-2", spec(cores=1))


def test_a_higher_priority_takes_the_lowest_at_commit_only(bench):
    low = bench.make("r-1", spec(cores=2, priority=10), holder="batch")
    mid = bench.make("r-2", spec(cores=2, priority=40), holder="web")
    decision = bench.wish("r-3", spec(cores=1, priority=80), holder="db")
    assert decision.victims == (low.id,)
    assert set(bench.card.books.slices) == {low.id, mid.id}
    bench.ask(m.Abort(decision.reservation))
    assert set(bench.card.books.slices) == {low.id, mid.id}
    db = bench.make("r-3", spec(cores=1, priority=80), holder="db")
    assert set(bench.card.books.slices) == {mid.id, db.id}
    assert bench.card.books.slices[mid.id] == mid
    (event,) = events(bench.card.tick(), "slice-reclaimed")
    assert event.slice == low.id


def test_a_change_does_not_move_what_is_in_use(bench):
    one = bench.make("r-1", spec(cores=1, memory=1), holder="guest")
    other = bench.make("r-2", spec(cores=1, memory=1), holder="guest-2")
    grown = bench.make("r-3", spec(cores=3, memory=4), slice=one.id)
    assert grown.id == one.id
    assert grown.holder == "guest"
    assert set(one.seat.cores) < set(grown.seat.cores)
    assert bench.card.books.slices[other.id] == other
    assert reference.judge(bench.card.books) == []
    assert bench.wish("r-4", spec(cores=3, lanes=1), slice=one.id).reason == Reason.DEVICE_IN_USE


# -- images -----------------------------------------------------------------------------------


def with_slice(bench, **more):
    return bench.make("r-aes", spec(cores=1, capability=AES, units=1), **more).id


def test_the_capability_is_there_only_after_programming(bench):
    name = with_slice(bench, holder="guest")
    assert bench.card.phase(name) == Phase.BLANK
    manifest, signature = signed()
    assert bench.ask(m.Configure(name, manifest, signature)).phase == Phase.LOADING
    half = len(BITS) // 2
    progress = bench.ask(m.ImageData(name, 0, BITS[:half]))
    assert (progress.phase, progress.done, progress.total) == (Phase.LOADING, half, len(BITS))
    assert bench.ask(m.ImageData(name, half, BITS[half:])).phase == Phase.PROGRAMMING
    (early,) = (t for t in bench.pass_time(0.001) if isinstance(t, m.Progress))
    assert 0 < early.done < early.total
    assert bench.card.phase(name) == Phase.PROGRAMMING
    (late,) = (t for t in bench.pass_time(1) if isinstance(t, m.Progress))
    assert late.phase == Phase.READY
    bench.cut_power()
    (report,) = bench.ask(m.InventoryRequest()).slices
    assert (report.phase, report.image) == (Phase.READY, "aes-1")


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (signed(key=make_signer()[0]), "not signed by anybody"),
        ((signed()[0], "00" * 64), "not signed by anybody"),
        ((signed(name="aes-2")[0], signed()[1]), "not signed by anybody"),
        (signed(not_after=1_700_000_000), "past its end date"),
        (signed(capability=ZSTD), f"is for {ZSTD}"),
        (signed(data=bytes((64 << 20) + 1)), "a bank holds"),
    ],
    ids=["stranger", "no signature", "another's signature", "expired", "capability", "too large"],
)
def test_an_image_that_is_not_right_is_not_begun(bench, image, problem):
    name = with_slice(bench)
    refusal = bench.ask(m.Configure(name, *image))
    assert refusal.reason == Reason.IMAGE_REFUSED
    assert problem in refusal.detail
    assert bench.card.phase(name) == Phase.BLANK


def test_an_image_ends_at_its_date_and_not_before(bench):
    name = with_slice(bench)
    image = signed(not_after=int(bench.clock.now()) + 10)
    bench.pass_time(9)
    assert bench.program(name, image).phase == Phase.READY
    bench.pass_time(5)
    assert "end date" in bench.ask(m.Configure(name, *image)).detail


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (BITS[:-1] + b"?", "not those that were signed"),
        (BITS + b"?" * 300_000, "more than the"),
    ],
)
def test_bytes_that_are_not_the_image_roll_back(bench, data, problem):
    name = with_slice(bench)
    answer = bench.load(name, data=data, step=250_000)
    assert problem in answer.detail
    assert answer.phase == Phase.BLANK
    assert bench.program(name).phase == Phase.READY


def test_bytes_out_of_order_roll_back(bench):
    name = with_slice(bench)
    bench.ask(m.Configure(name, *signed()))
    answer = bench.ask(m.ImageData(name, 5, b"x"))
    assert "bytes from 5 came, not from 0" in answer.detail
    assert bench.ask(m.ImageData(name, 0, b"x")).reason == Reason.UNKNOWN_ID


def test_programming_that_fails_leaves_what_ran_before(bench):
    name = with_slice(bench)
    bench.program(name)
    bench.port.fails_at = 1000
    image = signed(name="aes-2")
    answer = bench.program(name, image)
    assert "bank error" in answer.detail
    assert answer.phase == Phase.READY
    (report,) = bench.ask(m.InventoryRequest()).slices
    assert report.image == "aes-1"
    bench.port.fails_at = None
    assert bench.program(name, image).detail == ""
    (report,) = bench.ask(m.InventoryRequest()).slices
    assert report.image == "aes-2"


@pytest.mark.parametrize("when", ["loading", "programming"])
def test_power_lost_while_programming_leaves_what_ran_before(bench, when):
    name = with_slice(bench)
    bench.program(name)
    image = signed(name="aes-2")
    if when == "loading":
        bench.ask(m.Configure(name, *image))
        bench.ask(m.ImageData(name, 0, BITS[:1000]))
    else:
        bench.load(name, image)
        bench.pass_time(0.001)
    bench.cut_power()
    (report,) = bench.ask(m.InventoryRequest()).slices
    assert (report.phase, report.image) == (Phase.READY, "aes-1")
    assert bench.ask(m.ImageData(name, 1000, BITS[1000:2000])).reason == Reason.UNKNOWN_ID


def test_an_image_whose_bytes_stop_coming_is_dropped(bench):
    name = with_slice(bench)
    bench.ask(m.Configure(name, *signed()))
    bench.pass_time(PATIENCE_S)
    bench.ask(m.ImageData(name, 0, BITS[:1000]))
    bench.pass_time(PATIENCE_S)
    assert bench.card.phase(name) == Phase.LOADING
    told = bench.pass_time(1)
    (progress,) = (t for t in told if isinstance(t, m.Progress))
    assert "stopped coming" in progress.detail
    assert bench.card.phase(name) == Phase.BLANK


def test_a_slice_that_works_is_not_programmed_under_its_holder(bench):
    name = with_slice(bench, holder="guest")
    bench.program(name)
    assert bench.ask(m.Configure(name, *signed())).reason == Reason.DEVICE_IN_USE
    bench.ask(m.Assign(name, ""))
    bench.ask(m.Configure(name, *signed()))
    assert bench.ask(m.Configure(name, *signed())).reason == Reason.BUSY
    assert bench.wish("r-9", spec(cores=2), slice=name).reason == Reason.BUSY


def test_a_slice_that_ends_takes_its_image_along(bench):
    name = with_slice(bench)
    bench.program(name)
    bench.ask(m.Configure(name, *signed()))
    assert isinstance(bench.ask(m.Release(name)), m.Done)
    assert bench.ask(m.ImageData(name, 0, b"x")).reason == Reason.UNKNOWN_ID
    again = bench.make("r-new", spec(cores=1, capability=AES, units=1)).id
    assert again != name
    assert bench.card.phase(again) == Phase.BLANK


def test_other_units_have_nothing_programmed(bench):
    name = with_slice(bench)
    bench.program(name)
    bench.make("r-2", spec(cores=2, capability=AES, units=1), slice=name)
    assert bench.card.phase(name) == Phase.READY
    bench.make("r-3", spec(cores=2, capability=AES, units=2), slice=name)
    assert bench.card.phase(name) == Phase.BLANK


# -- isolation --------------------------------------------------------------------------------


def test_a_key_opens_its_own_memory_and_no_other(bench):
    one = bench.make("r-1", spec(memory=2))
    other = bench.make("r-2", spec(memory=2))
    for mine, foreign in ((one, other), (other, one)):
        (key,), (piece,) = mine.seat.keys, mine.seat.memory
        start = foreign.seat.memory[0].start
        assert bench.card.access(key, piece.start, piece.size) is None
        assert bench.card.access(key, piece.end - 1, 1) is None
        assert bench.card.access(key, start, 1).slice == mine.id
        assert bench.card.access(key, piece.start, piece.size + 1) is not None
        assert bench.card.access(key, piece.start - 1, 2) is not None
        assert bench.card.access(key, piece.start, 0) is not None
    assert bench.card.access(0, 0, 1).slice == ""
    assert bench.card.access(4, 0, 1).slice == ""


def test_faults_are_told_once_a_tick_with_their_number(bench):
    one = bench.make("r-1", spec(memory=2))
    for _ in range(1000):
        bench.card.access(one.seat.keys[0], 5 * MIB, 16)
    (event,) = events(bench.card.tick(), "access-fault")
    assert event.slice == one.id
    assert "999 more" in event.detail
    assert not events(bench.card.tick(), "access-fault")


def test_memory_in_pieces_is_one_to_its_key(bench):
    names = [bench.make(f"r-{n}", spec(memory=2)) for n in range(3)]
    bench.ask(m.Release(names[1].id))
    grown = bench.make("r-grow", spec(memory=4), slice=names[0].id)
    (key,) = grown.seat.keys
    assert bench.card.access(key, 0, 4 * MIB) is None
    assert bench.card.access(key, 4 * MIB, 1) is not None


# -- the flash --------------------------------------------------------------------------------


def test_power_lost_in_mid_write_is_before_or_after_never_between(bench):
    bench.make("r-1", spec(cores=1, priority=10))
    before = bench.ask(m.InventoryRequest())
    start = bench.path.stat().st_size
    decision = bench.wish("r-2", spec(cores=4, priority=90))
    middle = bench.path.stat().st_size
    bench.ask(m.Commit(decision.reservation))
    after = bench.ask(m.InventoryRequest())
    data = bench.path.read_bytes()
    seen = set()
    for length in range(start, len(data) + 1, 7):
        bench.path.write_bytes(data[:length])
        bench.cut_power()
        now = bench.ask(m.InventoryRequest())
        if length < middle:
            assert now == before
        elif length < len(data):
            assert now.slices == before.slices
            assert [r.id for r in now.reservations] == [decision.reservation]
        seen.add(now.generation)
    bench.path.write_bytes(data)
    bench.cut_power()
    assert bench.ask(m.InventoryRequest()) == after
    assert len(seen) >= 2


def test_what_cannot_be_kept_has_not_happened(bench):
    decision = bench.wish("r-1", spec(cores=1))
    bench.log.close()
    answer = bench.ask(m.Commit(decision.reservation))
    assert answer.code == m.ErrorCode.INTERNAL
    assert bench.card.books.slices == {}
    bench.cut_power()
    assert isinstance(bench.ask(m.Commit(decision.reservation)), m.Grant)


def test_the_flash_of_another_card_is_refused(bench, tmp_path):
    bench.make("r-1", spec(cores=1))
    bench.log.close()
    with pytest.raises(StateDamagedError, match=r"adapter\.serial"):
        Bench(tmp_path, serial="card-7")
    with pytest.raises(StateDamagedError, match="core 0, which the adapter does not"):
        Bench(tmp_path, cores=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda s: s["slices"].append({**s["slices"][0], "id": "slice-9"}), "share core 0"),
        (lambda s: s["slices"][0]["seat"].update(keys=[0]), "key 0"),
        (lambda s: s["slices"][0]["seat"].update(memory=[[0, 1 << 40]]), "has memory"),
        (lambda s: s["slices"][0]["spec"].update(cores=2), "other amounts"),
        (lambda s: s.update(generation="x"), "generation"),
        (lambda s: s.update(images={"slice-99": "x"}), "slice-99"),
    ],
)
def test_a_state_that_cannot_be_is_refused(bench, wrong, says):
    bench.make("r-1", spec(cores=1, memory=1))
    state = StateLog(bench.path).state
    wrong(state)
    bench.log.append(state)
    bench.log.close()
    with pytest.raises(StateDamagedError, match=says):
        bench.power_on()
