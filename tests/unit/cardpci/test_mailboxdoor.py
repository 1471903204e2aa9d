"""The agent's link through a card's mailbox: the function is real, sysfs is files."""

import dataclasses
import subprocess
import sys
import time

import pytest
from card_rig import Rig
from card_wires import QUICK
from mailbox_driver import READY, STATUS
from slice_world import AES
from sysfs_function import SysfsFunction
from trust_data import HOST, credentials

from tests.contract.card_contract import News, spec
from virtfabric.adapters.cardlink import mailboxbridge
from virtfabric.adapters.cardlink.doors import MailboxDoor
from virtfabric.adapters.cardlink.link import WitnessedCard
from virtfabric.adapters.cardlink.streamwire import StreamWire
from virtfabric.model.adapter import AdapterId
from virtfabric.model.card import CardCondition, CardNewsKind
from virtfabric.model.device import PciAddress
from virtfabric.protocol.messages import Hello, Role
from virtfabric.trust.context import make_context

ADDRESS = PciAddress("0000:01:00.0")
PATIENT = dataclasses.replace(QUICK, heartbeat_s=1.0, answer_s=10.0)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def function(rig, tmp_path):
    client = rig.connect("management")
    client.region_info(2)
    function = SysfsFunction(tmp_path / "sys" / str(ADDRESS), client, client.fds[0])
    yield function
    function.close()


@pytest.fixture
def meet(tmp_path):
    cards = []

    def begin(serial="C-1"):
        hello = Hello(Role.HOST, HOST.serial, "test 1", "boot", ())
        context = make_context(credentials(HOST), server=False)
        wire = StreamWire(
            MailboxDoor(ADDRESS, serial, tmp_path / "sys"), serial, context, hello, PATIENT
        )
        card, news = WitnessedCard(AdapterId(serial), wire), News()
        cards.append(card)
        card.watch(news)
        return card, news

    yield begin
    for card in cards:
        card.close()


def test_a_slice_is_made_through_the_mailbox(meet, rig, function):
    card, news = meet()
    news.wait(CardNewsKind.CONNECTED)
    promise = card.reserve(spec(cores=2, capability=AES, units=1), request="r-1")
    made = card.commit(promise)
    assert rig.runner.ask(lambda: rig.bench.card.books.slices[made.id]) == made
    card.close()
    deadline = time.monotonic() + 10
    while function.get(STATUS) != READY:
        assert time.monotonic() < deadline, "the session stays open"


def test_who_uses_it_when_it_is_pulled_out_lives(meet, function):
    card, news = meet()
    news.wait(CardNewsKind.CONNECTED)
    function.pull_out()
    assert (
        news.wait(CardNewsKind.LOST)[0].detail == f"mailbox {ADDRESS}: its function was pulled out"
    )
    news.wait(CardNewsKind.LOST, count=2)
    assert card.view().why == f"mailbox {ADDRESS}: no such function"
    assert card.view().condition is CardCondition.LOST


@pytest.mark.usefixtures("function")
def test_another_card_in_that_place_is_told(meet):
    _, news = meet("C-2")
    assert "it is that of card C-1" in news.wait(CardNewsKind.LOST)[0].detail


def test_two_do_not_share_a_mailbox(meet, function):
    _, news = meet()
    news.wait(CardNewsKind.CONNECTED)
    argv = [sys.executable, "-I", "-S", mailboxbridge.__file__, str(function.directory), "C-1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "another process uses it\n")


def test_a_ring_that_cannot_be_ends_the_link(meet, function):
    _, news = meet()
    news.wait(CardNewsKind.CONNECTED)
    function.ended.set()
    function.thread.join()
    function.put(0x38, 0xFFFF_FFFF)
    assert "its ring cannot be" in news.wait(CardNewsKind.LOST)[0].detail
