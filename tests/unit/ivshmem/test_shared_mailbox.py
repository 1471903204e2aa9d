"""The card's mailbox through memory that is shared, with bells: TLS, abuse, hosts that go."""

import os
import random

import pytest
from card_rig import Rig
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ivshmem_client import (
    BROKEN,
    ENDED,
    OPEN,
    READY,
    RX_HEAD,
    RX_TAIL,
    SESSION,
    STATUS,
    TX_HEAD,
    TX_TAIL,
    WANTED,
    IvshmemClient,
    SharedDriver,
)
from mailbox_driver import MailboxDriver
from mailbox_host import Host
from slice_world import spec
from trust_data import HOST, credentials

from virtfabric.protocol import messages as m


@pytest.fixture(scope="module")
def long_rig(tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("card"))
    yield rig
    rig.close()


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def connect(rig):
    yield from connecting(rig)


@pytest.fixture
def mailbox(connect):
    return connect()


def connecting(rig):
    clients = []

    def connect():
        clients.append(IvshmemClient(rig.runner.device.ivshmem))
        return SharedDriver(clients[-1])

    yield connect
    for client in clients:
        client.close()


def is_served(driver):
    """Whether a host comes through."""
    return isinstance(Host(driver).ask(m.InventoryRequest()), m.Inventory)


def let_it_hear(connect):
    """Bells that have rung are heard before those of who comes now."""
    assert is_served(connect())


def test_a_card_says_who_it_is(mailbox):
    assert mailbox.client.size == 0x40000
    assert mailbox.memory[0x20000:0x20008] == b"VFCM\x00\x00\x01\x00"
    assert mailbox.memory[0x20040:0x20080] == b"C-1" + bytes(61)
    assert (mailbox.status, mailbox.get(SESSION), mailbox.get(0x20008) > 0) == (READY, 0, True)
    assert (mailbox.tx, mailbox.rx) == ((0, 0x10000), (0x10000, 0x10000))


def test_a_session_of_tls_goes_through_the_rings(rig, mailbox):
    host = Host(mailbox)
    assert host.link.peer.boot == "boot-1"
    wanted = spec(cores=2, memory=1)
    decision = host.ask(m.AllocationRequest("r-1", wanted, "guest"))
    name = host.ask(m.Commit(decision.reservation)).slice.id
    assert rig.runner.ask(lambda: rig.bench.card.books.slices[name].holder) == "guest"
    for beat in range(300):
        assert host.ask(m.Heartbeat(beat)) == m.Heartbeat(beat)
    assert mailbox.head > 2 * mailbox.tx[1] // 8
    assert isinstance(host.ask(m.Release(name)), m.Done)


def test_rings_go_round_more_than_once(rig, mailbox):
    for number in range(6):
        rig.make(f"r-{number}", spec(cores=1))
    host = Host(mailbox)
    while mailbox.tail < 3 * mailbox.rx[1]:
        assert len(host.ask(m.InventoryRequest()).slices) == 6


def test_what_the_card_has_to_say_rings(rig, mailbox):
    host = Host(mailbox)
    while mailbox.client.rung(0.2) or host.step():
        pass
    rig.runner.ask(lambda: rig.bench.clock.advance(20))
    told = []

    def heard():
        host.step()
        told[:] = [r.message for r in host.got if isinstance(r.message, m.Telemetry)]
        return told

    mailbox.until(heard)


def test_one_firmware_behind_both_transports(rig, mailbox):
    over_vfio_user = Host(MailboxDriver(rig.connect("management")))
    decision = over_vfio_user.ask(m.AllocationRequest("r-1", spec(cores=1), "guest"))
    over_vfio_user.ask(m.Commit(decision.reservation))
    (seen,) = Host(mailbox).ask(m.InventoryRequest()).slices
    assert seen.slice.request == "r-1"


def test_nothing_happens_until_the_bell(rig, mailbox):
    mailbox.put(WANTED, 7)
    rig.runner.ask(lambda: None)
    assert mailbox.get(SESSION) == 0
    assert not mailbox.client.rung(0)
    mailbox.client.ring()
    assert mailbox.client.rung(), "the card's bell, when it has happened"
    assert mailbox.get(SESSION) == 7
    mailbox.memory[0:5] = b"\x16\x03\x01\x00\x05"
    mailbox.put(TX_HEAD, 5)
    rig.runner.ask(lambda: None)
    assert mailbox.get(TX_TAIL) == 0
    assert not mailbox.client.rung(0)
    mailbox.client.ring()
    assert mailbox.client.rung()
    assert mailbox.get(TX_TAIL) == 5


def test_two_hosts_have_a_session_and_memory_each(rig, connect):
    drivers = connect(), connect()
    hosts = [Host(driver) for driver in drivers]
    for beat, host in enumerate(hosts * 3):
        assert host.ask(m.Heartbeat(beat)) == m.Heartbeat(beat)
    assert len(rig.desk._links) == 2
    drivers[0].memory[:0x20000] = os.urandom(0x20000)
    assert hosts[1].ask(m.Heartbeat(9)) == m.Heartbeat(9)


def test_a_host_that_dies_ends_its_session_only(rig, connect):
    dying, other = connect(), connect()
    Host(dying)
    host = Host(other)
    dying.client.close()
    other.until(lambda: host.ask(m.Heartbeat(1)) and len(rig.desk._links) == 1)
    assert is_served(connect())
    assert not rig.told


def test_a_new_session_ends_the_one_before(rig, mailbox):
    Host(mailbox)
    second = Host(mailbox)
    assert (mailbox.get(SESSION), second.ask(m.Heartbeat(5))) == (2, m.Heartbeat(5))
    mailbox.until(lambda: len(rig.desk._links) == 1)
    mailbox.want(0)
    assert (mailbox.status, mailbox.get(TX_TAIL), mailbox.get(RX_HEAD)) == (READY, 0, 0)
    assert not any(mailbox.memory[:0x20000]), "nothing of it stays in the rings"
    mailbox.until(lambda: not rig.desk._links)
    assert is_served(mailbox)


def test_a_guest_that_boots_again_gets_a_session(rig, mailbox):
    """Nobody tells the card; what the driver of before has written is still there."""
    Host(mailbox).ask(m.InventoryRequest())
    again = SharedDriver(mailbox.client)
    assert again.get(TX_HEAD) > 0
    assert is_served(again)
    again.until(lambda: len(rig.desk._links) == 1)


def test_a_stranger_ends_the_session_and_the_mailbox_lives(rig, mailbox):
    stranger = Host(mailbox, credentials_=credentials(HOST, "another authority"))
    mailbox.until(lambda: stranger.step() or mailbox.status == READY | ENDED)
    stranger.step()
    assert stranger.link.ended_by
    assert rig.desk._links == []
    assert is_served(mailbox)


def test_junk_is_no_tls(mailbox):
    mailbox.open()
    mailbox.send(b"\x16\x03\x01\x00\x05hello")
    mailbox.until(lambda: mailbox.status == READY | ENDED)
    assert mailbox.receive()[:1] == b"\x15", "an alert"


@pytest.mark.parametrize(("register", "value"), [
    (TX_HEAD, 0x10001), (TX_HEAD, 0xFFFFFFFF), (RX_TAIL, 1), (RX_TAIL, 0xFFFEFFFF),
])  # fmt: skip
def test_an_impossible_index_ends_the_session(rig, connect, mailbox, register, value):
    mailbox.open()
    mailbox.put(register, value)
    mailbox.client.ring()
    mailbox.until(lambda: mailbox.status == READY | BROKEN)
    mailbox.until(lambda: rig.desk._links == [])
    mailbox.put(TX_HEAD, 5)
    mailbox.client.ring()
    let_it_hear(connect)
    assert (mailbox.status, mailbox.get(TX_TAIL)) == (READY | BROKEN, 0)
    assert is_served(mailbox)


def test_a_driver_that_died_before_it_rang(mailbox):
    """It left a WANTED that the card has not seen."""
    mailbox.open()
    mailbox.put(WANTED, 2)
    assert is_served(SharedDriver(mailbox.client))
    assert mailbox.get(SESSION) == 3


def test_the_card_restores_its_registers_at_the_bell(mailbox):
    mailbox.open()
    for at in (STATUS, SESSION, TX_TAIL, RX_HEAD):
        mailbox.put(at, 77)
    mailbox.client.ring()
    mailbox.until(lambda: mailbox.get(SESSION) == 1)
    assert [mailbox.get(at) for at in (STATUS, TX_TAIL, RX_HEAD)] == [READY | OPEN, 0, 0]


def test_indices_without_a_session_say_nothing(connect, mailbox):
    mailbox.open()
    mailbox.send(b"\x16\x03\x01\x00\x05hello")
    mailbox.until(lambda: mailbox.status == READY | ENDED)
    answer = mailbox.get(RX_HEAD)
    mailbox.put(TX_HEAD, 0xFFFFFFFF)
    mailbox.client.ring()
    let_it_hear(connect)
    assert (mailbox.status, mailbox.get(RX_HEAD)) == (READY | ENDED, answer)
    assert is_served(mailbox)


def test_a_host_that_does_not_read_keeps_its_bytes_to_itself(rig, connect):
    mailbox = connect()
    host = Host(mailbox)
    (link,) = rig.desk._links
    for number in range(4):
        rig.make(f"r-{number}", spec(cores=1))
    while not link.ended_by:
        for _ in range(100):
            host.link.send(m.InventoryRequest())
        mailbox.send(host.link.outgoing())
    assert link.ended_by == "the peer does not read, or too much was said"
    assert (mailbox.get(RX_HEAD) - mailbox.tail) % 2**32 == mailbox.rx[1], "a full ring"
    assert is_served(connect())


def test_the_memory_cannot_be_cut_short(mailbox):
    """It would kill the card by SIGBUS."""
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(mailbox.client.memory_fd, size)


def test_a_card_that_stops_says_so(rig, mailbox):
    Host(mailbox)
    rig.runner.close()
    mailbox.until(lambda: mailbox.status == 0)
    assert mailbox.client.take() == (0, None)
    assert mailbox.client.ends()
    assert not rig.runner.device.ivshmem.exists()


PLACES = st.one_of(
    st.integers(0, 0x3FFFC // 4).map(lambda word: 4 * word),
    st.sampled_from(range(0x20000, 0x20080, 4)),
    st.sampled_from([WANTED, TX_HEAD, RX_TAIL, TX_HEAD, RX_TAIL]),
)  # fmt: skip
VALUES = st.one_of(
    st.integers(0, 3), st.sampled_from([0xFFFF, 0x10000, 0x10001, 2**31, 2**32 - 1]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
ABUSE = st.lists(
    st.one_of(
        st.tuples(st.just("put"), PLACES, VALUES),
        st.tuples(st.just("ring"), st.just(0), st.just(0)),
        st.tuples(st.just("open"), st.just(0), st.just(0)),
        st.tuples(st.just("noise"), st.sampled_from([0, 0x10000]), st.integers(0, 0x10000)),
    ),
    max_size=30,
)  # fmt: skip


@settings(
    max_examples=examples(60), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(ABUSE)
def test_whatever_a_host_writes_harms_only_itself(long_rig, abuse):
    connecting_ = connecting(long_rig)
    connect = next(connecting_)
    honest, mailbox = connect(), connect()
    host = Host(honest)
    for what, at, value in abuse:
        match what:
            case "put":
                mailbox.put(at, value)
            case "noise":
                mailbox.memory[at : at + value] = random.Random(value).randbytes(value)
            case "open":
                mailbox.put(WANTED, (mailbox.get(WANTED) + 1) % 2**32)
                mailbox.client.ring()
            case _:
                mailbox.client.ring()
    assert host.ask(m.Heartbeat(3)) == m.Heartbeat(3)
    mailbox.put(SESSION, 2**32 - 1)
    mailbox.want(0)
    assert is_served(mailbox), "and it may begin anew"
    connecting_.close()
    assert long_rig.told == []
