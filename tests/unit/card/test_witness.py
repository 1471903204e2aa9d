"""A card that lies: what no honest card could say ends the link, and is told of as a lie."""

from dataclasses import replace

import pytest
from card_wires import power_on, simulated_card, start_brain

from virtfabric.adapters.clock import SystemClock
from virtfabric.model.adapter import Extent, SliceSpec
from virtfabric.model.card import CardCondition, CardNewsKind
from virtfabric.model.errors import CardDistrustedError
from virtfabric.model.image import Phase
from virtfabric.model.units import MIB, Bytes
from virtfabric.protocol import messages as m


class Bed:
    def __init__(self, place):
        self.place = place
        self.brain = start_brain(place)
        self.card, self.wire = simulated_card(self.brain)
        self.news = []
        self.card.watch(self.news.append)

    def spec(self, **more):
        return SliceSpec(**{"cores": 1, **more}).check()

    def make(self, request, **more):
        promise = self.card.reserve(self.spec(**more), request=request)
        return self.card.commit(promise)

    def lie_about(self, kind, change):
        """From now on each answer of this kind is changed."""
        self.wire.mangle = lambda _asked, answer: (
            change(answer) if isinstance(answer, kind) else answer
        )

    def must_catch(self, work, words):
        with pytest.raises(CardDistrustedError) as error:
            work()
        assert words in str(error.value), error.value
        view = self.card.view()
        assert (view.condition, view.is_usable) == (CardCondition.DISTRUSTED, False)
        assert words in view.why
        assert [n.kind for n in self.news].count(CardNewsKind.DISTRUSTED) == 1
        self.wire.mangle = lambda _asked, answer: answer
        with pytest.raises(CardDistrustedError):  # what it says now is not believed either
            self.card.refresh()


@pytest.fixture
def bed(tmp_path):
    bed = Bed(tmp_path)
    yield bed
    bed.brain.close()


def of_slice(**change):
    return lambda answer: replace(answer, slice=replace(answer.slice, **change))


def seat(**change):
    return lambda answer: replace(
        answer, slice=replace(answer.slice, seat=replace(answer.slice.seat, **change))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (seat(cores=(0, 1)), "has other amounts"),
        (seat(cores=(99,)), "has core 99"),
        (seat(cores=(5,)), "otherwise than it had promised"),
        (seat(keys=(9,)), "otherwise than it had promised"),
        (of_slice(holder="someone"), "otherwise than it had promised"),
        (of_slice(id="slice-77"), "otherwise than it had promised"),
        (lambda grant: replace(grant, generation=0), "did not grow"),
        (lambda _: m.Done(), "answered Commit with Done"),
    ],
)
def test_a_grant_outside_its_promise(bed, change, words):
    promise = bed.card.reserve(bed.spec(), request="r-1")
    bed.lie_about(m.Grant, change)
    words = words if "has " not in words else "otherwise than it had promised"
    bed.must_catch(lambda: bed.card.commit(promise), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (seat(cores=(0, 1)), "has other amounts than it is to have"),
        (seat(cores=(99,)), "has core 99"),
        (seat(memory=(Extent(1 << 45, 16 * MIB),)), "which the adapter"),
        (of_slice(request="r-2"), "asked for r-1, it answered about 'r-2'"),
        (of_slice(spec=SliceSpec(cores=2).check()), "other amounts than were asked for"),
        (seat(capability="net.vf"), "accelerators for 'net.vf'"),
        (lambda d: replace(d, victims=("slice-9",)), "slice-9 would end, a slice that it never"),
        (lambda d: replace(d, victims=("slice-1", "slice-1")), "slice-1 is there twice"),
        (of_slice(id="slice-1"), "is or was somebody's"),
        (lambda _: m.Progress("slice-1", Phase.READY, 0, 0), "with Progress"),
    ],
)
def test_a_promise_that_cannot_be(bed, change, words):
    bed.make("r-0", priority=90)
    bed.lie_about(m.Decision, change)
    if "which the adapter" in words:
        words = "what it promised cannot be"

    def ask():
        wanted = bed.spec(capability="crypto.aes", units=1, memory=Bytes(16 * MIB))
        bed.card.reserve(wanted, request="r-1")

    if "slice-9" in words:  # shows when the inventory says the same
        honest = bed.wire.mangle
        bed.wire.mangle = lambda asked, answer: (
            replace(answer, reservations=tuple(
                replace(r, victims=("slice-9",)) for r in answer.reservations))
            if isinstance(answer, m.Inventory) else honest(asked, answer)
        )  # fmt: skip
    bed.must_catch(ask, words)


def test_a_victim_of_no_lower_priority(bed):
    equal = bed.make("r-0", cores=4, priority=50)
    bed.wire.mangle = lambda _asked, answer: (
        replace(answer, victims=(equal.id,)) if isinstance(answer, m.Decision)
        else replace(answer, reservations=tuple(
            replace(r, victims=(equal.id,)) for r in answer.reservations))
        if isinstance(answer, m.Inventory) else answer
    )  # fmt: skip
    bed.must_catch(
        lambda: bed.card.reserve(bed.spec(priority=50), request="r-1"),
        "(priority 50) would end for priority 50",
    )


def test_victims_where_nobody_was_to_make_way(bed):
    low = bed.make("r-0", priority=1)
    bed.lie_about(m.Decision, lambda d: replace(d, victims=(low.id,)))
    bed.must_catch(
        lambda: bed.card.reserve(bed.spec(priority=90), request="r-1", reclaim=False),
        "would end that were not to",
    )


def test_a_slice_granted_that_it_never_had(bed):
    def forge(asked, answer):
        if isinstance(asked, m.AllocationRequest) and isinstance(answer, m.Decision):
            return m.Grant(answer.slice, 9)
        return answer

    bed.wire.mangle = forge
    bed.must_catch(lambda: bed.card.reserve(bed.spec(), request="r-1"), "a slice that it never had")


def report(**change):
    return lambda told: replace(
        told, slices=tuple(replace(r, slice=replace(r.slice, **change)) for r in told.slices)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: replace(i, generation=i.generation - 1), "its generation went back"),
        (lambda i: replace(i, slices=i.slices * 2), "slice slice-1 is there twice"),
        (lambda i: replace(i, slices=()), "changed without a new generation"),
        (report(holder="someone"), "changed without a new generation"),
        (lambda i: replace(i, adapter=replace(i.adapter, serial="C-2")), "inventory is of 'C-2'"),
        (lambda i: replace(i, adapter=replace(i.adapter, cores=1)), "has core"),
        (
            lambda i: replace(i, adapter=replace(i.adapter, cores=99), generation=99),
            "other parts than before",
        ),
        (lambda _: m.Done(), "answered InventoryRequest with Done"),
    ],
)
def test_an_inventory_that_cannot_be(bed, change, words):
    bed.make("r-1", cores=4)
    bed.make("r-2", cores=4)
    bed.lie_about(m.Inventory, change)
    bed.must_catch(bed.card.refresh, words)


def badges(*codes):
    return lambda told: replace(
        told,
        slices=tuple(replace(r, badge=c) for r, c in zip(told.slices, codes, strict=True)),
    )


def test_badges(bed):
    bed.make("r-1")
    bed.make("r-2")
    first, second = bed.card.view().badges.values()
    assert first != second
    bed.lie_about(m.Inventory, badges(first, first))
    bed.must_catch(bed.card.refresh, f"badge {first} is there twice")


def test_a_badge_that_becomes_another(bed):
    bed.make("r-1")
    bed.lie_about(m.Inventory, badges("0" * 32))
    bed.must_catch(bed.card.refresh, "slice-1 has another badge than before")


def test_badges_are_other_ones_when_the_card_starts_anew(bed):
    bed.make("r-1")
    before = bed.card.view().badges
    bed.wire.lose("power")
    bed.brain.close()
    bed.brain = start_brain(bed.place)
    power_on(bed.wire, bed.brain)
    assert bed.card.view().is_usable
    assert bed.card.view().badges != before


def test_two_slices_that_share_a_core(bed):
    bed.make("r-1")
    bed.make("r-2")

    def share(told):
        first, second = told.slices
        both = replace(second.slice, seat=replace(second.slice.seat, cores=(0,)))
        return replace(told, slices=(first, replace(second, slice=both)))

    bed.lie_about(m.Inventory, share)
    bed.must_catch(bed.card.refresh, "share core 0")


def test_a_slice_that_ended_and_is_there_again(bed):
    one = bed.make("r-1")
    kept = bed.wire.ask(m.InventoryRequest()).slices
    bed.lie_about(m.Inventory, lambda i: replace(i, slices=(*i.slices, *kept)))
    bed.must_catch(lambda: bed.card.release(one.id), "slice-1 ended, and is there again")


def test_a_promise_that_becomes_another(bed):
    bed.card.reserve(bed.spec(), request="r-1")

    def other(told):
        (promise,) = told.reservations
        moved = replace(promise.slice, seat=replace(promise.slice.seat, cores=(7,)))
        return replace(told, reservations=(replace(promise, slice=moved),), generation=9)

    bed.lie_about(m.Inventory, other)
    bed.must_catch(bed.card.refresh, "is not what was promised any more")


@pytest.mark.parametrize("kind", [m.Done(), m.InventoryRequest(), m.Commit("reservation-1")])
def test_what_no_card_says_by_itself(bed, kind):
    bed.wire.tell(kind)
    assert bed.card.view().condition is CardCondition.DISTRUSTED
    assert "nobody had asked for" in bed.card.view().why


def test_a_forged_decision_and_grant_out_of_the_blue(bed):
    promise = bed.card.reserve(bed.spec(), request="r-1")
    bed.wire.tell(m.Grant(promise.slice, 5))
    assert bed.card.view().condition is CardCondition.DISTRUSTED
    with pytest.raises(CardDistrustedError):
        bed.card.commit(promise)


def test_generations_do_not_go_back_over_a_restart_either(bed, tmp_path):
    bed.make("r-1")
    (tmp_path / "other").mkdir()
    bed.wire.lose("power")
    power_on(bed.wire, start_brain(tmp_path / "other"))  # its flash was wiped
    assert bed.card.view().condition is CardCondition.DISTRUSTED
    assert "went back" in bed.card.view().why


def test_an_operators_word_makes_it_believed_again(bed, tmp_path):
    bed.make("r-1")
    (tmp_path / "other").mkdir()
    bed.wire.lose("power")
    power_on(bed.wire, start_brain(tmp_path / "other"))
    bed.card.trust()
    assert bed.card.view().is_usable
    assert bed.card.view().books.slices == {}
    assert bed.make("r-2").id == "slice-1"


def test_a_card_may_have_grown_when_it_starts_anew(bed, tmp_path):
    one = bed.make("r-1")
    bed.wire.lose("power")
    bed.brain.close()
    bed.brain = start_brain(tmp_path, clock=SystemClock(), cores=16)
    power_on(bed.wire, bed.brain)
    assert bed.card.view().is_usable
    assert bed.card.view().books.adapter.cores == 16
    assert one.id in bed.card.view().books.slices


def test_honest_errors_are_no_lies(bed):
    bed.lie_about(
        m.Decision, lambda _: m.Error(m.ErrorCode.REFUSED, "no", reason="no-capacity")
    )  # fmt: skip
    assert bed.card.reserve(bed.spec(), request="r-1").detail == "card C-1: no"
    assert bed.card.view().is_usable
