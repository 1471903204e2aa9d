"""Sessions: who is let in, and what becomes of bytes that somebody meddled with."""

import ssl

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trust_data import CARD, HOST, credentials, end, exchange, hello, links, pair

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.conversation import MAX_OUTGOING
from virtfabric.protocol.messages import Heartbeat, ImageData, InventoryRequest, Role
from virtfabric.trust.authority import Credentials
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity, identity_of
from virtfabric.trust.link import Link
from virtfabric.trust.session import MAX_PENDING


def test_both_ends_know_who_the_other_is():
    card, host = pair(serial="C-1")
    exchange(card, host)
    assert (card.is_open, host.is_open) == (True, True)
    assert (card.peer, host.peer) == (HOST, CARD)
    host.send(b"x" * 100_000)
    assert exchange(card, host)[0] == b"x" * 100_000
    card.send(b"answer")
    assert exchange(card, host)[1] == b"answer"


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
@settings(max_examples=15, deadline=None)
def test_any_split_of_the_bytes_will_do(sizes):
    card, host = pair()
    turn = 0
    while True:
        pieces = [(card, host.outgoing()), (host, card.outgoing())]
        if not any(data for _, data in pieces):
            break
        for to, data in pieces:
            while data:
                size = sizes[turn % len(sizes)]
                turn += 1
                to.receive(data[:size])
                data = data[size:]
    assert card.is_open
    assert host.is_open


@pytest.mark.parametrize(
    ("who", "why"),
    [
        (credentials(HOST, "another authority"), "certificate verify failed"),
        (credentials(HOST, ago=5), "certificate verify failed"),
        (credentials(HOST, days=9, ago=-5), "certificate verify failed"),
        (credentials(CARD), "card C-1 is there, not host"),
    ],
    ids=["another authority", "expired", "not yet valid", "a card's certificate"],
)
def test_a_card_lets_in_hosts_of_its_authority_only(who, why):
    mine = Credentials(who.certificate, who.key, credentials(HOST).authority)
    card, host = end(CARD), end(HOST, credentials_=mine)
    exchange(card, host)
    assert not card.is_open
    assert why in card.ended_by
    with pytest.raises(InvalidValueError):
        card.send(b"secret")


def test_a_host_without_a_certificate_is_not_let_in():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=credentials(HOST).authority.decode())
    card, host = end(CARD), end(HOST, context=context)
    exchange(card, host)
    assert "did not return a certificate" in card.ended_by
    assert "certificate required" in host.ended_by, "the host is told why"


@pytest.mark.parametrize(
    ("who", "serial", "why"),
    [
        (credentials(CARD, "another authority"), "", "certificate verify failed"),
        (credentials(HOST), "", "host host-a is there, not card"),
        (credentials(CARD), "C-2", "card C-1 is there, not card C-2"),
    ],
    ids=["another authority", "a host's certificate", "another card"],
)
def test_a_host_talks_to_the_card_it_meant_only(who, serial, why):
    mine = Credentials(who.certificate, who.key, credentials(CARD).authority)
    card, host = end(CARD, credentials_=mine), end(HOST, serial=serial)
    exchange(card, host)
    assert not host.is_open
    assert why in host.ended_by


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
def test_older_tls_is_refused_by_either_side(version):
    for old in (CARD, HOST):
        context = make_context(credentials(old), server=old is CARD)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        ends = [end(who, context=context if who is old else None) for who in (CARD, HOST)]
        exchange(*ends)
        assert not any(one.is_open for one in ends)
        assert "version" in ends[0].ended_by + ends[1].ended_by


def recorded():
    """Two open ends, and what the host would send next."""
    card, host = pair()
    exchange(card, host)
    host.send(b"give me everything")
    return card, host, host.outgoing()


def test_a_replayed_record_ends_the_session():
    card, _, data = recorded()
    assert card.receive(data) == b"give me everything"
    assert card.receive(data) == b""
    assert "bad record mac" in card.ended_by
    assert not card.is_open


def test_a_replayed_session_is_no_session():
    card, host = pair()
    heard = []
    while (from_host := host.outgoing()) + (from_card := card.outgoing()):
        heard.append(from_host)
        card.receive(from_host)
        host.receive(from_card)
    host.send(b"again")
    heard.append(host.outgoing())
    assert card.receive(heard[-1]) == b"again"
    other = end(CARD)
    assert b"".join(other.receive(piece) for piece in heard) == b""
    assert not other.is_open
    assert other.ended_by


def test_a_record_of_another_session_is_worth_nothing():
    _, _, data = recorded()
    card, _, _ = recorded()
    assert card.receive(data) == b""
    assert "bad record mac" in card.ended_by


@given(st.integers(0, 10_000), st.integers(1, 255))
@example(3, 1)
@settings(max_examples=30, deadline=None)
def test_a_changed_byte_ends_the_session(place, change):
    card, _, data = recorded()
    wrong = bytearray(data)
    wrong[place % len(data)] ^= change
    assert card.receive(bytes(wrong)) == b""
    # where the length was changed it waits for more, and finds out then
    assert card.receive(data + bytes(1 << 15)) == b""
    assert not card.is_open


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_truncated_record_says_nothing_and_is_noticed(cut):
    card, _, data = recorded()
    assert card.receive(data[:-cut]) == b""
    assert card.is_open, "the rest may still come"
    card.receive_end()
    assert card.ended_by == "cut off"


def test_a_goodbye_is_not_a_cut():
    card, host, data = recorded()
    host.close()
    assert card.receive(data + host.outgoing()) == b"give me everything"
    card.receive_end()
    assert card.ended_by == "the other end closed it"


def test_a_transport_that_ends_in_the_handshake_is_noticed():
    card, host = pair()
    card.receive(host.outgoing()[:50])
    card.receive_end()
    assert card.ended_by == "cut off"
    assert not card.is_open


@given(st.binary(min_size=1, max_size=3000))
@settings(max_examples=50, deadline=None)
def test_noise_is_not_let_in(noise):
    card = end(CARD)
    card.receive(noise)
    assert not card.is_open
    assert card._in.pending <= MAX_PENDING


def test_a_handshake_without_end_is_not_held():
    card = end(CARD)
    # a ClientHello that announces 16 MiB
    header = b"\x16\x03\x01\x40\x00" + b"\x01\xff\xff\xff" + bytes((1 << 14) - 4)
    for _ in range(2000):
        card.receive(header)
    assert card.ended_by
    assert card._in.pending <= MAX_PENDING


def test_links_carry_messages():
    card, host = links()
    exchange(card, host)
    assert card.is_open
    assert host.is_open
    assert host.peer.serial == "C-1"
    number = host.send(InventoryRequest())
    got, _ = exchange(card, host)
    assert [(r.message, r.number) for r in got] == [(InventoryRequest(), number)]
    card.close()
    exchange(card, host)
    assert host.ended_by == "the other end closed it"


def test_a_greeting_in_another_name_ends_the_link():
    card, host = pair()
    card = Link(card, hello(CARD))
    host = Link(host, hello(Identity.of(Role.HOST, "host-b")))
    exchange(card, host)
    assert "identity-mismatch" in card.ended_by
    assert "identity-mismatch" in host.ended_by, "the liar is told"


def test_a_peer_who_does_not_read_cannot_fill_the_memory_of_a_link():
    card, host = links()
    exchange(card, host)
    for number in range(100):
        if not host.ended_by:
            host.send(ImageData("s", number, bytes(200_000)))
        assert host._session.waiting + len(host._talk._outgoing) <= 3 * MAX_OUTGOING
    assert "does not read" in host.ended_by
    with pytest.raises(InvalidValueError):
        host.send(Heartbeat(1))


def test_what_waited_goes_out_when_there_is_room():
    card, host = links()
    exchange(card, host)
    for number in range(12):
        host.send(ImageData("s", number, bytes(200_000)))
    got, _ = exchange(card, host)
    assert [r.message.offset for r in got] == list(range(12))
    host.send(Heartbeat(1))
    assert len(exchange(card, host)[0]) == 1


@pytest.mark.parametrize(
    "names",
    [
        (), (("DNS", "card"),), (("URI", "urn:virtfabric:card:"),),
        (("URI", "urn:virtfabric:king:K-1"),), (("URI", "urn:virtfabric:card:a/b"),),
        (("URI", "urn:virtfabric:card:A"), ("URI", "urn:virtfabric:card:B")),
    ],
)  # fmt: skip
def test_a_certificate_names_exactly_one(names):
    with pytest.raises(InvalidValueError):
        identity_of({"subjectAltName": names})


def test_credentials_that_cannot_be_used_say_so():
    mine = credentials(CARD)
    for wrong in (
        Credentials(b"no", mine.key, mine.authority),
        Credentials(mine.certificate, credentials(HOST).key, mine.authority),
        Credentials(mine.certificate, mine.key, b"no"),
    ):
        with pytest.raises(InvalidValueError, match="credentials"):
            make_context(wrong, server=True)


def test_a_key_is_never_shown():
    assert "PRIVATE" not in repr(credentials(CARD))
