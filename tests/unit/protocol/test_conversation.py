"""Two ends of a link: versions, numbers, and polite answers."""

import pytest
from wire_data import hello

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.codec import decode, encode
from virtfabric.protocol.conversation import MAX_OUTGOING, Conversation, State
from virtfabric.protocol.frames import Frame, FrameDecoder
from virtfabric.protocol.messages import (
    Commit,
    Done,
    Error,
    ErrorCode,
    Heartbeat,
    ImageData,
    InventoryRequest,
    Role,
)


def pair(card=(1,), host=(1,)):
    """A card and a host; and what each got of the other's greeting."""
    ends = (
        Conversation(hello(Role.CARD, "C-1"), versions=card),
        Conversation(hello(Role.HOST, "H-1"), versions=host),
    )
    exchange(*ends)
    return ends


def exchange(a, b):
    """Until nobody has anything to say. What each received."""
    got = ([], [])
    while (from_a := a.outgoing()) + (from_b := b.outgoing()):
        got[1].extend(b.receive(from_a))
        got[0].extend(a.receive(from_b))
    return got


def answer_to(card, data):
    """What a card says to bytes, and that it is still there."""
    received = list(card.receive(data))
    answers = FrameDecoder().feed(card.outgoing())
    return received, [(answer.about, decode(answer)) for answer in answers]


def frame(kind, number, body=b"{}", version=1, about=0):
    return Frame(version, kind, number, about, body).encode()


def test_ends_agree_on_the_highest_version_of_both():
    card, host = pair((1, 2, 3), (2, 1))
    assert (card.state, host.state) == (State.OPEN, State.OPEN)
    assert (card.version, host.version) == (2, 2)
    assert host.peer.serial == "C-1"
    number = host.send(Heartbeat(3))
    (received,), _ = exchange(card, host)
    assert (received.message, received.number, received.about) == (Heartbeat(3), number, 0)
    card.send(Heartbeat(3), about=number)
    _, (answer,) = exchange(card, host)
    assert answer.about == number


def test_no_common_version_is_said_before_the_end():
    card, host = pair((1,), (9,))
    assert (card.state, host.state) == (State.CLOSED, State.CLOSED)
    assert "no-common-version" in card.ended_by
    assert "no-common-version" in host.ended_by
    with pytest.raises(InvalidValueError, match="state"):
        card.send(Done())


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_frame_of_another_version_is_refused_and_the_link_lives(version):
    card, _ = pair()
    received, answers = answer_to(card, frame(0x22, 2, b"anything", version))
    assert received == []
    ((to, error),) = answers
    assert (to, error.code, error.versions) == (2, ErrorCode.UNSUPPORTED_VERSION, (1,))
    assert not error.fatal
    received, _ = answer_to(card, frame(0x10, 3))
    assert [r.message for r in received] == [InventoryRequest()]


def test_a_version_that_was_not_agreed_on_is_a_downgrade():
    card, host = pair((1, 2), (1, 2))
    assert host.version == 2
    _, ((_, error),) = answer_to(card, frame(0x10, 2, version=1))
    assert error.code == ErrorCode.UNSUPPORTED_VERSION


@pytest.mark.parametrize(
    ("data", "code", "field"),
    [
        (frame(0x7F, 2), ErrorCode.UNKNOWN_MESSAGE, ""),
        (frame(0x01, 2), ErrorCode.UNEXPECTED_MESSAGE, ""),
        (frame(0x24, 2), ErrorCode.UNEXPECTED_MESSAGE, ""),
        (frame(0x22, 2), ErrorCode.INVALID_MESSAGE, "reservation"),
        (frame(0x22, 2, b'{"reservation":"r"}', about=99), ErrorCode.INVALID_MESSAGE, "about"),
        (frame(0x22, 2, b"{{{"), ErrorCode.INVALID_MESSAGE, "body"),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_link_lives(data, code, field):
    card, _ = pair()
    received, ((about, error),) = answer_to(card, data)
    assert received == []
    assert (about, error.code, error.field, error.fatal) == (2, code, field, False)
    received, _ = answer_to(card, frame(0x10, 3))
    assert [r.message for r in received] == [InventoryRequest()]


@pytest.mark.parametrize("number", [1, 3, 0])
def test_a_replayed_or_lost_frame_ends_it(number):
    card, _ = pair()
    received, ((_, error),) = answer_to(card, frame(0x10, number))
    assert received == []
    assert error.code == ErrorCode.OUT_OF_ORDER
    assert error.fatal
    assert card.is_closed
    assert list(card.receive(frame(0x10, 2))) == []


def test_broken_framing_ends_it_after_what_was_whole():
    card, _ = pair()
    received, ((_, error),) = answer_to(card, frame(0x10, 2) + b"garbage")
    assert [r.message for r in received] == [InventoryRequest()]
    assert error.code == ErrorCode.BROKEN_FRAMING
    assert error.fatal
    assert card.is_closed


def test_an_error_is_never_answered_by_an_error():
    card, _ = pair()
    assert answer_to(card, frame(0x03, 2, b"not json")) == ([], [])
    assert answer_to(card, frame(0x03, 3, version=9)) == ([], [])
    assert card.state == State.OPEN


def test_a_fatal_error_is_handed_on_and_ends_it():
    card, host = pair()
    host.send(Error(ErrorCode.INTERNAL, "on fire", fatal=True))
    (received,), _ = exchange(card, host)
    assert received.message.detail == "on fire"
    assert card.is_closed
    assert "on fire" in card.ended_by


@pytest.mark.parametrize(
    "peer", [(Role.HOST, "H-2"), (Role.CARD, "H-1")], ids=["serial", "role"]
)  # fmt: skip
def test_a_greeting_must_be_of_who_was_proved(peer):
    card = Conversation(hello(Role.CARD, "C-1"), peer=peer)
    host = Conversation(hello(Role.HOST, "H-1"))
    exchange(card, host)
    assert "identity-mismatch" in card.ended_by
    assert host.is_closed


def test_two_cards_have_nothing_to_say():
    ends = [Conversation(hello(Role.CARD, name)) for name in ("C-1", "C-2")]
    exchange(*ends)
    assert all(end.is_closed for end in ends)


def test_the_first_frame_has_to_be_a_greeting():
    card = Conversation(hello(Role.CARD))
    _, answers = answer_to(card, frame(0x10, 1))
    assert answers[-1][1].code == ErrorCode.UNEXPECTED_MESSAGE
    assert card.is_closed


def test_a_peer_who_does_not_read_cannot_fill_the_memory():
    card, _ = pair()
    flood = b"".join(frame(0x7F, number) for number in range(2, 60_000))
    assert list(card.receive(flood)) == []
    assert card.is_closed
    assert len(card.outgoing()) <= MAX_OUTGOING


def test_a_message_too_large_for_a_frame_is_not_half_sent():
    card, host = pair()
    with pytest.raises(InvalidValueError, match="tail"):
        host.send(ImageData("s", 0, bytes(1 << 20)))
    assert host.outgoing() == b""
    number = host.send(Commit("r"))
    (received,), _ = exchange(card, host)
    assert received.number == number


def test_numbers_follow_each_other_whoever_speaks():
    _, host = pair()
    assert [host.send(Heartbeat(n)) for n in range(3)] == [2, 3, 4]
    sent = b"".join(encode(Heartbeat(n), n + 2) for n in range(3))
    assert host.outgoing() == sent
