"""The mailbox: TLS and the card protocol through registers and a window of memory."""

import os

import pytest
from card_bed import BITS, signed
from card_rig import Rig
from mailbox_driver import (
    BROKEN,
    CONTROL,
    ENDED,
    IRQ_MASK,
    IRQ_STATUS,
    READY,
    RX_HEAD,
    RX_TAIL,
    SESSION,
    TX_HEAD,
    MailboxDriver,
)
from mailbox_host import Host
from slice_world import AES, spec
from trust_data import HOST, credentials, end, hello
from vfio_client import RESET

from virtfabric.protocol import messages as m
from virtfabric.trust.link import Link


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def mailbox(rig):
    return MailboxDriver(rig.connect("management"))


def test_a_card_says_who_it_is(rig):
    client = rig.connect("management")
    assert client.read(0, 0, 8) == b"VFCM\x00\x00\x01\x00"
    assert client.read(0, 0x40, 64) == b"C-1" + bytes(61)
    assert (client.config(2), client.get(0x0C), client.get(0x14)) == (0x0C01, READY, 0)
    assert client.region_info(2)[:2] == (7, 0x20000)
    assert [client.get(at) for at in (0x20, 0x24, 0x30, 0x34)] == [0, 0x10000, 0x10000, 0x10000]
    assert client.config(client.capability(0x10) + 0x12) >> 4 & 0x3F == 16


def test_from_wish_to_a_function_that_is_programmed(rig, mailbox):
    host = Host(mailbox)
    assert host.link.peer.boot == "boot-1"
    wanted = spec(cores=2, capability=AES, units=1, lanes=4)
    decision = host.ask(m.AllocationRequest("r-1", wanted, "guest"))
    name = host.ask(m.Commit(decision.reservation)).slice.id
    assert host.ask(m.Configure(name, *signed())).phase == "loading"
    for first in range(0, len(BITS), 200_000):
        progress = host.ask(m.ImageData(name, first, BITS[first : first + 200_000]))
    assert progress.phase == "programming"
    mailbox.until(lambda: name in rig.runner.device.sockets)
    client = rig.connect(name)
    rig.runner.ask(lambda: rig.bench.clock.advance(5))
    told = []

    def ready():
        host.step()
        told[:] = [r.message for r in host.got if isinstance(r.message, m.Progress)]
        return told and told[-1].phase == "ready"

    mailbox.until(ready)
    assert client.get(0x0C) == 3


def test_interrupts_say_that_bytes_came_and_were_taken(rig, mailbox):
    client = mailbox.client
    event = client.eventfd()
    client.enable()
    client.put(IRQ_MASK, 7)
    mailbox.open()
    assert event.wait() == 1
    assert client.get(IRQ_STATUS) == 4
    client.put(IRQ_STATUS, 4)
    link = Link(end(HOST), hello(HOST))
    client.put(IRQ_MASK, 1)
    mailbox.send(link.outgoing())
    assert event.wait() == 1
    mailbox.until(lambda: client.get(IRQ_STATUS) == 3)
    assert mailbox.receive()
    rig.runner.ask(lambda: None)
    assert event.wait(0) == 0, "once, until it is cleared"


def test_a_stranger_ends_the_session_and_the_mailbox_lives(rig, mailbox):
    stranger = Host(mailbox, credentials_=credentials(HOST, "another authority"))
    mailbox.until(lambda: stranger.step() or mailbox.status == READY | ENDED)
    stranger.step()
    assert stranger.link.ended_by
    assert rig.desk._links == []
    assert isinstance(Host(mailbox).ask(m.InventoryRequest()), m.Inventory)


def test_a_new_session_ends_the_one_before(rig, mailbox):
    Host(mailbox)
    second = Host(mailbox)
    assert mailbox.client.get(SESSION) == 2
    assert second.ask(m.Heartbeat(5)) == m.Heartbeat(5)
    mailbox.until(lambda: len(rig.desk._links) == 1)


@pytest.mark.parametrize("how", ["close", "reset", "client"])
def test_an_end_by_the_host_is_heard(rig, mailbox, how):
    Host(mailbox)
    match how:
        case "close":
            mailbox.client.put(CONTROL, 2)
        case "reset":
            mailbox.client.ask(RESET)
        case "client":
            mailbox.client.close()
    mailbox.until(lambda: rig.desk._links == [])
    if how != "client":
        assert mailbox.status == READY
        assert mailbox.client.get(TX_HEAD) == 0
        assert not any(mailbox.window[:]), "nothing of it stays in the window"


@pytest.mark.parametrize(("register", "value"), [
    (TX_HEAD, 0x10001), (TX_HEAD, 0xFFFFFFFF), (RX_TAIL, 1), (RX_TAIL, 0xFFFEFFFF),
])  # fmt: skip
def test_an_impossible_index_ends_the_session(rig, mailbox, register, value):
    mailbox.open()
    mailbox.client.put(register, value)
    assert mailbox.status == READY | BROKEN
    mailbox.until(lambda: rig.desk._links == [])
    mailbox.client.put(TX_HEAD, 5)
    assert isinstance(Host(mailbox).ask(m.InventoryRequest()), m.Inventory)


def test_junk_is_no_tls(mailbox):
    mailbox.open()
    mailbox.send(b"\x16\x03\x01\x00\x05hello")
    mailbox.until(lambda: mailbox.status == READY | ENDED)
    assert mailbox.receive()[:1] == b"\x15", "an alert"


def test_a_host_that_does_not_read_keeps_its_bytes_to_itself(rig, mailbox):
    """What it does not take waits in its link, whose limit ends it; other hosts go on."""
    host = Host(mailbox)
    (link,) = rig.desk._links
    for number in range(4):
        rig.make(f"r-{number}", spec(cores=1))
    while not link.ended_by:
        for _ in range(100):
            host.link.send(m.InventoryRequest())
        mailbox.send(host.link.outgoing())
    assert link.ended_by == "the peer does not read, or too much was said"
    assert (mailbox.client.get(RX_HEAD) - mailbox.tail) % 2**32 == mailbox.rx[1], "a full ring"
    mailbox.until(lambda: not mailbox.receive() and mailbox.status == READY | ENDED)
    assert isinstance(Host(mailbox).ask(m.InventoryRequest()), m.Inventory)


def test_the_window_cannot_be_cut_short(mailbox):
    """It would kill the card by SIGBUS."""
    mailbox.client.region_info(2)
    (fd,) = mailbox.client.fds
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_the_window_also_works_without_mapping_it(mailbox):
    client = mailbox.client
    client.write(2, 0x1FFF0, b"0123456789abcdef")
    assert client.read(2, 0x1FFF8, 8) == b"89abcdef" == mailbox.window[0x1FFF8:]
