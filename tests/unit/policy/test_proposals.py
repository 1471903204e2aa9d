"""What a card would have: done as it is where it may be, else not at all.

The card's arbiter sees a picture of the host that went over the wire; it must decide on that as it
would on the host itself, and what it decides must be found right. A card that says anything else is
judged by sums over the books, not by what the check itself looks at.
"""

from collections import Counter
from dataclasses import replace

import pytest
import tier_lives
from arbiter_host import BATCH, DB, OTHER, WEB, ask, committed, granted, guest, host, three
from arbiter_strategies import any_case, cpu_bounds, hopeful_cases, memory_bounds
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.model.amounts import CPU_KEY, MEMORY_KEY, Amounts, Key
from virtfabric.model.decision import Decision, Proposal, Take
from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.ids import GuestId
from virtfabric.model.policy import Placement
from virtfabric.model.units import MIB
from virtfabric.policy.arbiter import choose_allocation
from virtfabric.policy.proposals import check_proposal
from virtfabric.policy.standing import free
from virtfabric.protocol.codec import decode, encode
from virtfabric.protocol.frames import FrameDecoder
from virtfabric.protocol.hostpicture import PictureFrame, split_picture

QUICK = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip


def over_the_wire(snapshot):
    """The host as a card has it."""
    frame, wire = PictureFrame(), FrameDecoder()
    for number, part in enumerate(split_picture(snapshot), 1):
        (read,) = wire.feed(encode(part, number))
        frame.add(decode(read))
    return frame.whole


def proposed(decision):
    return Proposal("card C-1", decision.delta, decision.takes)


def agrees(snapshot, request, caps=None):
    """What the card decides is what the agent would, and passes its check."""
    own = choose_allocation(snapshot, request, caps=caps)
    answer = choose_allocation(over_the_wire(snapshot), request, caps=caps)
    assert answer == own
    if isinstance(own, Decision):
        found = check_proposal(snapshot, request, proposed(answer), caps=caps)
        assert isinstance(found, Decision), found
        # a victim of whole blocks gives more than is needed: less is then free capacity's to pay
        assert found.from_free.fits_in(own.from_free)
        assert replace(found, from_free=own.from_free) == own
    return own


@given(any_case())
@QUICK
def test_a_card_decides_as_the_agent_would(case):
    agrees(*case)


@given(hopeful_cases(), st.integers(0, 3000), st.integers(0, 300))
@QUICK
def test_with_what_guests_can_spare(case, cpu, memory):
    snapshot, request = case
    caps = {guest: Amounts.of(cpu=cpu, memory=memory * MIB) for guest in snapshot.guests}
    agrees(snapshot, request, caps)


def test_with_memory_of_two_kinds_loans_and_functions(monkeypatch):
    decided = []

    def decide(snapshot, request, **more):
        if request.devices:  # functions are the agent's
            return choose_allocation(snapshot, request, **more)
        answer = agrees(snapshot, request, more.get("caps"))
        decided.append(answer)
        return answer

    monkeypatch.setattr(tier_lives, "choose_allocation", decide)
    seen = Counter()
    for seed in range(examples(15)):
        tier_lives.live(seed, seen)
    assert sum(isinstance(one, Decision) for one in decided) > len(decided) // 8


def test_a_loan_goes_home_whoever_decides():
    crowd, _ = committed(three(), granted(three(), ask(DB, cpu=1000)))
    decision = agrees(crowd, ask(DB, cpu=-400))
    assert [(back.victim, back.amounts.cpu) for back in decision.returns] == [(BATCH, 400)]
    kept = check_proposal(crowd, ask(DB, cpu=-400), Proposal("card C-1", Amounts.of(cpu=-400)))
    assert kept.returns == decision.returns, "a card cannot keep what was lent"


# -- a card that says anything ---------------------------------------------------------------------


@st.composite
def lies(draw, case):
    """Anything at all, or what is right with something moved."""
    snapshot, request = case
    names = [*snapshot.guests, GuestId("00000000-0000-4000-8000-0000deadbeef")]
    amounts = st.builds(
        lambda cpu, memory: Amounts.of(cpu=cpu, memory=memory * MIB),
        st.sampled_from([0, 1, 100, 333, 1000, 1000, 5000]),
        st.sampled_from([0, 1, 2, 8, 64, 128, 4096]),
    )
    right = choose_allocation(snapshot, request)
    delta, takes = Amounts(), {}
    if isinstance(right, Decision) and draw(st.integers(0, 3)):
        delta, takes = right.delta, {take.victim: take.amounts for take in right.takes}
    for _ in range(draw(st.integers(0, 2))):
        victim, more = draw(st.sampled_from(names)), draw(amounts)
        takes[victim] = draw(st.sampled_from([more, takes.get(victim, Amounts()) + more]))
    if takes and draw(st.integers(0, 2)) == 0:
        del takes[draw(st.sampled_from(sorted(takes)))]
    sign = draw(st.sampled_from([1, 1, -1]))
    if draw(st.integers(0, 2)) == 0:
        more = draw(amounts)
        delta = delta + (more if sign > 0 else -more)
    if draw(st.integers(0, 9)) == 0:
        delta = delta.with_value(Key.parse("device.net.vf"), 1)
    return Proposal("card C-1", delta, tuple(Take(g, a) for g, a in takes.items() if a))


def judge(snapshot, request, decision):
    """What no decision may break, by sums; nothing of `policy.proposals` is used."""
    lend, before = snapshot.lend_ballooned, snapshot.books.holdings
    after = {g: h.amounts for g, h in before.items()} | dict(decision.holdings)
    borrower = snapshot.guests[request.guest]
    assert set(decision.delta) <= {CPU_KEY, MEMORY_KEY}
    for uuid, amounts in after.items():
        held, guest = before[uuid].amounts, snapshot.guests[uuid]
        for key, bounds in (
            (CPU_KEY, cpu_bounds(guest)), (MEMORY_KEY, memory_bounds(guest, lend=lend)),
        ) if guest.policy else ():  # fmt: skip
            assert amounts[key] >= min(bounds.floor, held[key]), "below what is its own"
            if amounts[key] > held[key]:
                assert uuid == request.guest or decision.returns
                assert amounts[key] <= bounds.ceiling, "above its limit"
            if amounts[key] < held[key] and uuid != request.guest:
                assert guest.policy.priority < borrower.policy.priority
                assert uuid not in snapshot.busy
                assert guest.job is None
        if guest.policy is None:
            assert amounts == held, "an unmanaged guest was touched"
        if guest.policy and guest.policy.cpu.placement is Placement.DEDICATED:
            assert amounts.cpu % 1000 == 0 or amounts.cpu == held.cpu
    room = free(snapshot)
    books = replace(snapshot.books, holdings={
        g: replace(h, amounts=after[g]) for g, h in before.items()
    })  # fmt: skip
    left = free(replace(snapshot, books=books))
    for key in (CPU_KEY, MEMORY_KEY):
        assert left[key] >= min(0, room[key]), "more is granted than there is"


@given(st.data())
@settings(QUICK, max_examples=examples(150))
def test_no_card_can_break_an_invariant(data):
    snapshot, request = case = data.draw(hopeful_cases() | any_case())
    proposal = data.draw(lies(case))
    answer = check_proposal(snapshot, request, proposal)
    if isinstance(answer, Refusal):
        assert answer.reason is Reason.DECISION_REJECTED
        assert answer.detail.startswith("card C-1 decided what cannot be: ")
    else:
        judge(snapshot, request, answer)


# -- single cases, in words ------------------------------------------------------------------------


def rejected(snapshot, request, delta, *takes, **more):
    answer = check_proposal(snapshot, request, Proposal("card C-1", delta, takes), **more)
    assert isinstance(answer, Refusal), answer
    assert answer.reason is Reason.DECISION_REJECTED
    return answer.detail


def take(victim, cpu=0, memory=0):
    return Take(victim, Amounts.of(cpu=cpu, memory=memory * MIB))


MORE = Amounts.of(cpu=1000)


@pytest.mark.parametrize(
    ("delta", "takes", "words"),
    [
        (Amounts.of(cpu=1000), (), "would come from free capacity, which has 0"),
        (Amounts.of(cpu=1000), (take(OTHER, 1000),), "unknown, or does not run"),
        (Amounts.of(cpu=1000), (take(BATCH, 2000),), "batch would pay 2 of cpu; it can give 1.9"),
        (Amounts.of(cpu=1000), (take(BATCH, 1500),), "0.5 of cpu more would be taken than is"),
        (Amounts.of(cpu=1000), (take(BATCH, 1000, 8),), "batch would pay memory, which nobody"),
        (Amounts.of(cpu=2000), (take(BATCH, 1900), take(WEB, 100)), "would get 2 of cpu; asked"),
        (Amounts.of(cpu=500), (take(BATCH, 500),), "would get 0.5 of cpu; asked for was 1"),
        (Amounts.of(cpu=-500), (), "would get -0.5 of cpu; asked for was 1"),
        (Amounts(), (), "db would get nothing"),
        (Amounts.of(cpu=1000, memory=MIB), (take(BATCH, 1000),), "memory of db would change"),
    ],
)
def test_what_is_wrong_is_said(delta, takes, words):
    assert words in rejected(three(), ask(DB, cpu=1000), delta, *takes)


def test_only_lower_priorities_pay():
    detail = rejected(three(), ask(WEB, cpu=500), Amounts.of(cpu=500), take(DB, 500))
    assert "db would pay 0.5 of cpu, and cannot: priority-not-lower" in detail


def test_nobody_without_a_policy_pays_and_nobody_at_work():
    crowd = host((guest(DB, 90), 1000, 200), (guest(BATCH, None), 1000, 200),
                 (guest(WEB, 10), 1000, 200), cpus=2, busy=frozenset({WEB}))  # fmt: skip
    assert "unmanaged" in rejected(crowd, ask(DB, cpu=500), Amounts.of(cpu=500), take(BATCH, 500))
    assert "busy" in rejected(crowd, ask(DB, cpu=500), Amounts.of(cpu=500), take(WEB, 500))


def test_a_guest_that_is_not_there_or_at_its_limit_or_at_its_floor():
    assert "there is no guest" in rejected(three(), ask(OTHER, cpu=1000), MORE)
    assert "above its limit" in rejected(three(cpus=9), ask(DB, cpu=4000), Amounts.of(cpu=4000))
    down = ask(DB, memory=-200)
    assert "below its floor" in rejected(three(), down, Amounts.of(memory=-200 * MIB))


def test_what_a_guest_cannot_spare_is_not_taken():
    caps = {BATCH: Amounts.of(cpu=300)}
    detail = rejected(three(), ask(DB, cpu=1000), MORE, take(BATCH, 1000), caps=caps)
    assert "it can give 0.3" in detail


def test_another_choice_within_the_rules_is_the_card_s_to_make():
    """Its arbiter may have another order in which guests pay, or spare free capacity."""
    crowd = three(cpus=4)
    own = granted(crowd, ask(DB, cpu=1000))
    assert [take.victim for take in own.takes] == [BATCH]
    other = Proposal("card C-1", MORE, (take(BATCH, 500), take(WEB, 500)))
    decision = check_proposal(crowd, ask(DB, cpu=1000), other)
    assert decision.holdings[WEB].cpu == 500
    assert decision.holdings[BATCH].cpu == 1500
    roomy = check_proposal(three(cpus=9), ask(DB, cpu=1000), other)
    assert roomy.takes == other.takes
