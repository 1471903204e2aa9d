"""The wire over a socket, with cards that hang, replay, forge, downgrade or are somebody else."""

import contextlib
import threading
import time
from itertools import pairwise

import pytest
from card_process import Served, write_card
from card_wires import QUICK, card_adapter, link_to, start_brain
from line import Line
from rogue import RogueCard, smuggle
from trust_data import CARD, credentials

from tests.contract.card_contract import News, spec
from virtfabric.adapters.cardlink.link import WitnessedCard
from virtfabric.adapters.cardlink.streamwire import Timing
from virtfabric.model.card import CardCondition, CardNewsKind
from virtfabric.model.errors import CardDistrustedError, CardError, CardLostError
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import encode
from virtfabric.protocol.frames import Frame
from virtfabric.protocol.messages import Hello, Role
from virtfabric.trust.context import make_context
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session

SLOW = Timing(heartbeat_s=60, greeting_s=5, answer_s=5, backoff_s=(0.02, 0.1))


@pytest.fixture
def honest(tmp_path):
    """Answers as a card does."""
    brain = start_brain(tmp_path)

    def answer(link, received):
        if isinstance(received.message, m.Heartbeat) and received.about:
            return
        for found in brain.firmware.handle(received.message):
            link.send(found, received.number)

    yield answer
    brain.close()


@pytest.fixture
def meet(tmp_path):
    """Start a card that answers as told, and a link to it: card, news."""
    made = []

    def begin(answer, timing=SLOW, wait="connected", **rogue):
        rogue = RogueCard(tmp_path / "sock", answer, **rogue)
        card, news = link_to(tmp_path / "sock", "host-a", timing=timing), News()
        made.append((card, rogue))
        card.watch(news)
        news.wait(wait)
        return card, news

    yield begin
    for card, rogue in made:
        card.close()
        rogue.close()


def but(honest, kind, do):
    """As an honest card, but for one kind of message."""
    return lambda link, got: (do if isinstance(got.message, kind) else honest)(link, got)


def test_a_card_that_hangs_is_cut_off_and_tried_again(meet, honest):
    hanging = but(honest, m.AllocationRequest, lambda *_: None)
    card, news = meet(hanging, timing=SLOW)
    card._wire.ask(m.InventoryRequest())
    began = time.monotonic()
    with pytest.raises(CardLostError, match=r"did not answer within 0\.3 s"):
        card._wire.ask(m.AllocationRequest("r-1", spec()), deadline_s=0.3)
    assert time.monotonic() - began < 3
    assert "did not answer" in news.wait(CardNewsKind.LOST)[0].detail
    news.wait(CardNewsKind.CONNECTED, count=2)


def test_a_card_without_a_pulse_is_lost(meet, honest):
    pulse = but(honest, m.Heartbeat, lambda *_: None)
    timing = Timing(heartbeat_s=0.05, answer_s=0.2, backoff_s=(0.02, 0.1))
    _, news = meet(pulse, timing=timing)
    assert news.wait(CardNewsKind.LOST)[0].detail == "it did not answer within 0.2 s"


def test_many_ask_at_once_and_the_slow_answer_goes_to_who_asked(meet, honest):
    card, _ = meet(honest, timing=QUICK)
    found = {}

    def ask(number):
        found[number] = card._wire.ask(m.AllocationRequest(f"r-{number}", spec(keys=1)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {n: answer.slice.request for n, answer in found.items()} == {
        n: f"r-{n}" for n in range(8)
    }


def test_a_replayed_frame_ends_the_link_and_is_told(meet, honest):
    def replay(link, got):
        answer = encode(m.Done(), link._talk._sent + 1, got.number)
        smuggle(link, answer, answer)

    card, news = meet(but(honest, m.Assign, replay))
    with contextlib.suppress(CardError):  # the first copy is a right answer
        card.assign("slice-1", "")
    assert "replayed or lost" in news.wait(CardNewsKind.LOST)[0].detail


def test_a_replayed_record_ends_the_session(meet, honest, tmp_path):
    """As somebody on the line would, who has no keys: the same bytes twice."""
    served = Served(write_card(tmp_path))
    pipe = Line(tmp_path / "line", served.socket)
    card, news = link_to(tmp_path / "line", "host-a", timing=SLOW), News()
    try:
        card.watch(news)
        news.wait("connected")
        pipe.replay = True
        with contextlib.suppress(CardLostError):  # the first copy is a right answer
            card.refresh()
        assert "bad record mac" in news.wait(CardNewsKind.LOST)[0].detail
    finally:
        card.close()
        pipe.close()
        served.stop()


def test_a_frame_cut_short_is_a_link_that_was_cut_off(tmp_path):
    served = Served(write_card(tmp_path))
    pipe = Line(tmp_path / "line", served.socket)
    card, news = link_to(tmp_path / "line", "host-a", timing=SLOW), News()
    try:
        card.watch(news)
        news.wait("connected")
        pipe.cut = True
        with pytest.raises(CardLostError, match="cut off"):
            card.refresh()
        news.wait(CardNewsKind.LOST)
    finally:
        card.close()
        pipe.close()
        served.stop()


def test_a_frame_of_a_downgraded_version_is_refused_and_told(meet, honest):
    def downgrade(link, got):
        frame = bytearray(encode(m.Done(), link._talk._sent + 1, got.number))
        frame[2] = 0
        smuggle(link, bytes(frame))
        link.send(m.Error(m.ErrorCode.INTERNAL, "and now the truth"), got.number)

    card, news = meet(but(honest, m.Assign, downgrade))
    with pytest.raises(CardError, match="and now the truth"):
        card.assign("slice-1", "")
    (refused,) = news.wait(CardNewsKind.REFUSED)
    assert refused.detail == "unsupported-version: version 0; agreed was 1"
    assert card.view().is_usable


class Deaf(RogueCard):
    """Once greeted it asks for answers without end, and reads none."""

    def _serve(self, connection):
        session = Session(make_context(self.mine, server=True), server=True, peer_role=Role.HOST)
        link = Link(session, Hello(Role.CARD, self.serial, "rogue 1", f"boot-{self.met}", ()))
        with contextlib.suppress(OSError):
            while not self.is_greeted:
                for received in link.receive(connection.recv(1 << 16)):
                    self.answer(link, received)
                    self.is_greeted |= isinstance(received.message, m.InventoryRequest)
                connection.sendall(link.outgoing())
            while True:
                for _ in range(1000):
                    frame = Frame(1, 0xEE, link._talk._sent + 1).encode()
                    smuggle(link, frame)
                connection.sendall(link.outgoing())

    is_greeted = False


def test_a_card_that_asks_and_does_not_read_is_cut_off(tmp_path, honest):
    rogue = Deaf(tmp_path / "sock", honest)
    card, news = link_to(tmp_path / "sock", "host-a", timing=SLOW), News()
    card.watch(news)
    try:
        assert "does not read" in news.wait(CardNewsKind.LOST)[0].detail
    finally:
        card.close()
        rogue.close()


def test_a_card_that_speaks_no_version_of_ours(meet, honest):
    hello = m.Hello(m.Role.CARD, "C-1", "rogue 2", "boot-1", (2,))
    card, news = meet(honest, wait="lost", greeting=encode(hello, 1))
    assert "no-common-version: none of version 2" in news.wait(CardNewsKind.LOST)[0].detail
    assert not card.view().is_usable


@pytest.mark.parametrize(
    "forged",
    [
        lambda link, one: link.send(m.Grant(one, 9)),
        lambda link, one: link.send(m.Decision("reservation-9", one, (), 1000)),
        lambda link, one: link.send(m.Done(), 2),
    ],
    ids=["grant", "decision", "second answer"],
)
def test_a_forged_decision_is_a_lie(meet, honest, forged):
    def forge(link, got):
        honest(link, got)
        forged(link, promise.slice)

    card, news = meet(but(honest, m.Assign, forge))
    promise = card.reserve(spec(), request="r-1")
    with contextlib.suppress(CardError):  # the right answer comes first
        card.assign(promise.slice.id, "g")
    news.wait(CardNewsKind.DISTRUSTED)
    assert card.view().condition is CardCondition.DISTRUSTED
    with pytest.raises(CardDistrustedError):
        card.refresh()


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ({"serial": "C-2"}, "card C-2 is there, not card C-1"),
        ({"mine": credentials(CARD, "another authority")}, "certificate verify failed"),
        ({"mine": credentials(CARD, days=1, ago=3)}, "certificate verify failed"),
    ],
    ids=["another card", "another authority", "expired"],
)
def test_a_wrong_identity_gets_no_link(meet, honest, mine, words):
    card, news = meet(honest, wait="lost", **mine)
    assert words in news.wait(CardNewsKind.LOST)[0].detail
    assert not card.view().is_usable
    with pytest.raises(CardLostError):
        card.refresh()


def test_a_card_that_says_nothing_is_not_waited_for_for_ever(meet, honest):
    timing = Timing(greeting_s=0.2, backoff_s=(0.02, 0.1))
    card, news = meet(honest, wait="lost", silent=True, timing=timing)
    assert "did not greet within 0.2 s" in news.wait(CardNewsKind.LOST)[0].detail
    card.close()


def test_a_lost_card_is_told_of_once_and_found_when_it_comes(tmp_path):
    card, news = link_to(tmp_path / "C-1.sock", "host-a"), News()
    card.watch(news)
    try:
        assert "No such file" in news.wait(CardNewsKind.LOST)[0].detail
        served = Served(write_card(tmp_path))
        news.wait(CardNewsKind.CONNECTED)
        served.stop()
        news.wait(CardNewsKind.LOST, count=2)
        served = Served(write_card(tmp_path))
        news.wait(CardNewsKind.CONNECTED, count=2)
        told = [n.detail for n in news.wait(CardNewsKind.LOST)]
        assert all(one != other for one, other in pairwise(told)), told
    finally:
        card.close()
        served.stop()


def test_a_card_that_comes_and_goes_at_once_is_met_ever_more_seldom(meet, honest):
    def leave(link, got):
        honest(link, got)
        link.close()

    timing = Timing(heartbeat_s=60, backoff_s=(0.01, 60))
    _, news = meet(leave, timing=timing, wait="lost")
    began = time.monotonic()
    news.wait(CardNewsKind.CONNECTED, count=6)
    assert time.monotonic() - began > 0.01 + 0.02 + 0.04 + 0.08


def test_a_defect_of_ours_does_not_leave_a_card_for_good(meet, honest, monkeypatch):
    struck = []

    def break_once(self, message):
        if not struck:
            struck.append(message)
            raise RuntimeError("a defect")

    def with_event(link, got):
        link.send(m.Event(m.EventKind.STATE_RESTORED, 0, "x"))
        honest(link, got)

    monkeypatch.setattr(WitnessedCard, "told", break_once)
    _, news = meet(with_event, wait="lost")
    assert "internal error" in news.wait(CardNewsKind.LOST)[0].detail
    news.wait(CardNewsKind.CONNECTED)
    assert struck


def test_a_lie_ends_the_tries_until_an_operator_says_so(meet, honest):
    lying = threading.Event()
    lying.set()

    def lie(link, got):
        if lying.is_set():
            link.send(m.Inventory(card_adapter("C-9"), (), (), 0), got.number)
        else:
            honest(link, got)

    card, news = meet(but(honest, m.InventoryRequest, lie), wait="distrusted")
    assert "inventory is of 'C-9'" in card.view().why
    lying.clear()
    card.trust()
    news.wait(CardNewsKind.CONNECTED)
    assert card.view().is_usable
