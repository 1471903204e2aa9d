"""What every card keeps that an agent has, whatever its wire.

A test module provides a fixture `bed` (`CardBed`) and inherits `CardContract`.
"""

from __future__ import annotations

import threading

import pytest

from virtfabric.model.adapter import Reservation, Slice, SliceSpec
from virtfabric.model.card import CardCondition, CardNewsKind, SignedImage
from virtfabric.model.errors import CardLostError, Reason, Refusal, StepCancelledError
from virtfabric.model.image import Phase
from virtfabric.model.units import GIB, MIB, Bytes

AES = "crypto.aes"
WAIT_S = 10


class Context:
    """A `StepContext` that remembers."""

    def __init__(self):
        self.cancelled = threading.Event()
        self.reports = []

    def progress(self, fraction, text):
        assert 0 <= fraction <= 1
        self.reports.append(fraction)


class News:
    """Hears a card."""

    def __init__(self):
        self.heard = []
        self._changed = threading.Condition()

    def __call__(self, news):
        with self._changed:
            self.heard.append(news)
            self._changed.notify_all()

    def wait(self, kind, what="", count=1):
        def found():
            return [n for n in self.heard if n.kind == kind and what in ("", n.what)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, WAIT_S), self.heard
            return found()


class CardBed:
    """A card of 8 cores, 4 GiB, 16 lanes, 4 units of AES, and the link to it."""

    card = None
    news = None

    def other_host(self):
        """Another host's `ports.Card` of the same card."""
        raise NotImplementedError

    def signed(self, data, **more):
        """Manifest and signature of an image that the card takes."""
        raise NotImplementedError

    def cut_power(self):
        """The card ends without a word."""
        raise NotImplementedError

    def power_on(self):
        """It starts anew, with what it kept."""
        raise NotImplementedError


def spec(**more):
    return SliceSpec(**{"cores": 1, "keys": 1, **more}).check()


def made(card, request, wanted=None, **more):
    promise = card.reserve(wanted or spec(), request=request, **more)
    assert isinstance(promise, Reservation), promise
    one = card.commit(promise)
    assert isinstance(one, Slice), one
    return one


class CardContract:
    def test_it_says_what_it_has(self, bed):
        view = bed.card.view()
        assert (view.condition, view.why) == (CardCondition.CONNECTED, "")
        assert view.is_usable
        assert view.books.adapter.accelerators == {AES: 4}
        assert view.books.adapter.serial == bed.card.serial == view.serial
        assert view.boot

    def test_promise_commit_assign_release(self, bed):
        promise = bed.card.reserve(spec(cores=2, memory=Bytes(GIB)), request="r-1", holder="g")
        assert bed.card.view().books.reservations == {promise.id: promise}
        one = bed.card.commit(promise)
        assert one == promise.slice
        assert bed.card.view().books.slices == {one.id: one}
        assert bed.card.assign(one.id, "") is None
        assert bed.card.assign(one.id, "h") is None
        assert bed.card.assign(one.id, "g").reason is Reason.DEVICE_IN_USE
        assert bed.card.view().books.slices[one.id].holder == "h"
        assert bed.card.release(one.id) is None
        assert bed.card.release(one.id).reason is Reason.UNKNOWN_ID
        assert bed.card.view().books.slices == {}

    def test_a_request_is_answered_once(self, bed):
        promise = bed.card.reserve(spec(), request="r-1")
        assert bed.card.reserve(spec(), request="r-1") == promise
        one = bed.card.commit(promise)
        assert bed.card.reserve(spec(), request="r-1") == one
        assert bed.card.reserve(spec(cores=3), request="r-1").reason is Reason.INVALID_ARGUMENT

    def test_withdrawing_leaves_nothing_of_a_request(self, bed):
        kept = made(bed.card, "r-0")
        bed.card.withdraw("r-1")
        bed.card.reserve(spec(), request="r-1")
        bed.card.withdraw("r-1")
        made(bed.card, "r-1")
        bed.card.withdraw("r-1")
        bed.card.withdraw("r-1")
        books = bed.card.view().books
        assert (set(books.slices), books.reservations) == ({kept.id}, {})

    def test_a_refusal_says_why_and_what_would_fit(self, bed):
        refusal = bed.card.reserve(spec(cores=9), request="r-1")
        assert isinstance(refusal, Refusal)
        assert refusal.reason is Reason.NO_CAPACITY
        assert refusal.detail.startswith(f"card {bed.card.serial}: ")
        assert refusal.would_fit["cores"] == 8

    def test_other_amounts_for_a_slice(self, bed):
        one = made(bed.card, "r-1", holder="g")
        promise = bed.card.reserve(spec(cores=4), request="r-2", change=one.id)
        changed = bed.card.commit(promise)
        assert (changed.id, len(changed.seat.cores), changed.holder) == (one.id, 4, "g")

    def test_what_another_host_does_shows_and_is_no_lie(self, bed):
        other = bed.other_host()
        low = made(other, "o-1", spec(cores=8, priority=10))
        promise = bed.card.reserve(spec(cores=2, priority=60), request="r-1")
        assert promise.victims == (low.id,)
        bed.card.commit(promise)
        (event,) = bed.news.wait(CardNewsKind.EVENT, "slice-reclaimed")
        assert event.slice == low.id
        assert low.id not in other.refresh().books.slices
        assert made(other, "o-2").id in bed.card.refresh().books.slices

    def test_an_image_is_loaded_and_runs(self, bed):
        one = made(bed.card, "r-1", spec(capability=AES, units=1))
        data, context = bytes(range(256)) * 4096, Context()
        manifest, signature = bed.signed(data)
        image = SignedImage(manifest, signature, data)
        assert bed.card.program(one.id, image, context, deadline_s=WAIT_S) is None
        program = bed.card.view().programs[one.id]
        assert (program.phase, program.image) == (Phase.READY, manifest.name)
        assert context.reports == sorted(context.reports)
        assert len(context.reports) >= 4

    @pytest.mark.parametrize("wrong", ["bytes", "signature", "end", "capability"])
    def test_a_bad_image_is_refused_and_nothing_runs(self, bed, wrong):
        one = made(bed.card, "r-1", spec(capability=AES, units=1))
        data = bytes(1000)
        more = {"end": {"not_after": 1}, "capability": {"capability": "net.vf"}}.get(wrong, {})
        manifest, signature = bed.signed(data, **more)
        if wrong == "bytes":
            data = b"\x01" + data[1:]
        if wrong == "signature":
            signature = "0" * 128
        image = SignedImage(manifest, signature, data)
        refusal = bed.card.program(one.id, image, Context(), deadline_s=WAIT_S)
        assert refusal.reason is Reason.IMAGE_REFUSED
        assert bed.card.refresh().programs[one.id].phase is Phase.BLANK

    def test_programming_can_be_cancelled(self, bed):
        one = made(bed.card, "r-1", spec(capability=AES, units=1))
        data = bytes(1000)
        image, context = SignedImage(*bed.signed(data), data), Context()
        context.cancelled.set()
        with pytest.raises(StepCancelledError):
            bed.card.program(one.id, image, context, deadline_s=WAIT_S)

    def test_a_lost_card_is_told_of_and_what_it_had_stays_known(self, bed):
        one = made(bed.card, "r-1")
        bed.cut_power()
        bed.news.wait(CardNewsKind.LOST)
        view = bed.card.view()
        assert view.condition is CardCondition.LOST
        assert view.why
        assert not view.is_usable
        assert set(view.books.slices) == {one.id}
        for call in (bed.card.refresh, lambda: bed.card.release(one.id)):
            with pytest.raises(CardLostError, match=bed.card.serial):
                call()

    def test_a_card_that_comes_back_has_started_anew_and_is_read_again(self, bed):
        one = made(bed.card, "r-1")
        promise = bed.card.reserve(spec(cores=2), request="r-2")
        bed.cut_power()
        bed.news.wait(CardNewsKind.LOST)
        before = bed.card.view().boot
        bed.power_on()
        bed.news.wait(CardNewsKind.CONNECTED, count=2)
        assert bed.news.wait(CardNewsKind.RESTARTED)
        view = bed.card.view()
        assert view.boot != before
        assert set(view.books.slices) == {one.id}
        assert bed.card.commit(promise).request == "r-2"  # promises outlive a loss of power

    def test_memory_adds_up(self, bed):
        sizes = [256 * MIB, GIB]
        for number, size in enumerate(sizes):
            made(bed.card, f"r-{number}", spec(memory=Bytes(size)))
        slices = bed.card.view().books.slices.values()
        assert sorted(sum(p.size for p in s.seat.memory) for s in slices) == sizes

    def test_closing_twice_is_safe(self, bed):
        bed.card.close()
        bed.card.close()
        with pytest.raises(CardLostError):
            bed.card.refresh()
