"""The whole way without a transport: a host's bytes, TLS, conversation, firmware, and back."""

import sys
from pathlib import Path
from uuid import UUID

import pytest
from card_bed import BITS, Bench, signed
from slice_world import AES, spec

from virtfabric.model.amounts import Amounts
from virtfabric.model.host import Capacity, HostTopology
from virtfabric.model.ids import GuestId, HostId
from virtfabric.model.ledger import Books, HostSnapshot, Residue
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import encode
from virtfabric.protocol.frames import Frame
from virtfabric.shim.firmware.desk import Desk
from virtfabric.shim.firmware.hostdesk import HostDesk
from virtfabric.trust.link import Link

sys.path.insert(0, str(Path(__file__).parents[1] / "trust"))
from trust_data import CARD, HOST, context_of, credentials, end, hello


class Host:
    """A host at a desk."""

    def __init__(self, desk, identity=HOST, **ends):
        self.desk = desk
        self.at = desk.open()
        self.link = Link(end(identity, **ends), hello(identity))
        self.got = []
        self.exchange()

    def exchange(self, size=1 << 20):
        while (out := self.link.outgoing()) + (back := self.at.outgoing()):
            for first in range(0, len(out), size):
                self.desk.receive(self.at, out[first : first + size])
            for first in range(0, len(back), size):
                self.got += self.link.receive(back[first : first + size])

    def ask(self, message, size=1 << 20):
        number = self.link.send(message)
        self.exchange(size)
        (answer,) = (r.message for r in self.got if r.about == number)
        return answer

    def smuggle(self, *frames):
        """Send bytes that the conversation would not have said; it counts them as its own."""
        for frame in frames:
            self.link._talk._sent += 1
            self.link._session.send(frame)
        self.exchange()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, serial="C-1")


@pytest.fixture
def desk(bench):
    return Desk(bench.card, context_of(credentials(CARD), True), boot="boot-1")


@pytest.mark.parametrize("size", [1 << 20, 7])
def test_a_slice_from_wish_to_image(desk, bench, size):
    host = Host(desk)
    assert host.link.peer.boot == "boot-1"
    wanted = spec(cores=2, capability=AES, units=1, lanes=4)
    decision = host.ask(m.AllocationRequest("r-1", wanted, "guest"), size)
    grant = host.ask(m.Commit(decision.reservation), size)
    name = grant.slice.id
    assert host.ask(m.Configure(name, *signed())).phase == "loading"
    for first in range(0, len(BITS), 200_000):
        progress = host.ask(m.ImageData(name, first, BITS[first : first + 200_000]))
    assert progress.phase == "programming"
    bench.clock.advance(5)
    desk.tick()
    host.exchange()
    told = [r.message for r in host.got if not r.about]
    assert [t.phase for t in told if isinstance(t, m.Progress)] == ["ready"]
    assert [t.readings[0].subject for t in told if isinstance(t, m.Telemetry)] == ["adapter"]
    (report,) = host.ask(m.InventoryRequest()).slices
    assert (report.slice, report.phase, report.image) == (grant.slice, "ready", "aes-1")


def test_events_reach_every_host_and_one_that_is_gone_harms_nobody(desk, bench):
    first, second, gone = Host(desk), Host(desk), Host(desk)
    low = first.ask(m.AllocationRequest("r-1", spec(cores=4, priority=10)))
    first.ask(m.Commit(low.reservation))
    desk.receive(gone.at, b"\x17\x03\x03\x00\x10" + bytes(16))
    assert gone.at.ended_by
    high = second.ask(m.AllocationRequest("r-2", spec(cores=1, priority=90)))
    second.ask(m.Commit(high.reservation))
    desk.tick()
    for host in (first, second):
        host.exchange()
        (event,) = (r.message for r in host.got if isinstance(r.message, m.Event))
        assert (event.what, event.slice) == ("slice-reclaimed", low.slice.id)
    assert len(desk._links) == 2


def test_a_stranger_never_reaches_the_firmware(desk, bench):
    mine = credentials(HOST, "another authority")
    stranger = Host(desk, credentials_=mine)
    assert stranger.at.ended_by
    assert not stranger.link.is_open
    assert desk._links == []


def test_what_a_host_may_not_say_is_refused_and_the_link_lives(desk):
    host = Host(desk)
    assert host.ask(m.Heartbeat(5)) == m.Heartbeat(5)
    for frame, code in (
        (Frame(1, 0x7E, 3, 0, b"{}"), "unknown-message"),
        (Frame(9, 0x10, 4, 0, b"{}"), "unsupported-version"),
        (Frame(1, 0x22, 5, 0, b"{}"), "invalid-message"),
    ):
        host.smuggle(frame.encode())
        assert host.got[-1].message.code == code
    assert isinstance(host.ask(m.InventoryRequest()), m.Inventory)


def test_a_forged_decision_of_a_host_is_refused(desk, bench):
    host = Host(desk)
    decision = host.ask(m.AllocationRequest("r-1", spec(cores=1)))
    host.smuggle(encode(decision, 3))
    assert host.got[-1].message.code == "unexpected-message"
    assert bench.card.books.slices == {}


def test_a_message_that_the_firmware_fails_at_costs_its_answer_only(desk, monkeypatch):
    """What a host shows of itself is worked on as it is: nobody else's card may end by it."""

    def fail(*_more, **_named):
        raise KeyError("guest")

    host, other = Host(desk), Host(desk)
    monkeypatch.setitem(HostDesk._HANDLERS, m.HostRequest, fail)
    request = m.HostRequest("p", "r", GuestId(UUID(int=1)), None, None, None, False, {})
    answer = host.ask(request)
    assert (answer.code, answer.detail) == ("internal", "KeyError: 'guest'")
    for one in (host, other):
        assert isinstance(one.ask(m.InventoryRequest()), m.Inventory)


def test_a_picture_in_parts_is_not_more_than_a_card_holds(desk, bench, monkeypatch):
    monkeypatch.setattr("virtfabric.protocol.hostpicture.MAX_PICTURE", 3000)
    host = Host(desk)
    sizes = {}, Bytes(0), Bytes(0)
    empty = HostSnapshot(
        1, HostTopology(HostId("h"), {}, {}, Bytes(0)), Capacity(CpuSet(), CpuSet(), *sizes), {},
        Books(), Amounts({}), frozenset(),
    )  # fmt: skip
    books = Books(residues=(Residue(GuestId(UUID(int=1)), "x" * 100, 0, 0.0),) * 5)
    parts = [m.HostPicture("p", n, 20, None if n else empty, (), books) for n in range(20)]
    answers = [host.ask(part) for part in parts]
    refused = [n for n, answer in enumerate(answers) if isinstance(answer, m.Error)]
    assert (answers[refused[0]].field, answers[refused[0]].reason) == ("parts", "invalid-argument")
    assert refused == [*range(refused[0], 20)], "and what follows is of no picture"
    assert bench.card.hosts._frames["host-a"]._parts == []


def test_a_host_that_asks_more_than_it_reads_is_not_worked_for(desk, bench, monkeypatch):
    monkeypatch.setattr("virtfabric.protocol.conversation.MAX_OUTGOING", 8 << 10)
    monkeypatch.setattr("virtfabric.trust.link.MAX_OUTGOING", 8 << 10)
    host = Host(desk)
    asked = []
    handle = bench.card.handle
    monkeypatch.setattr(bench.card, "handle", lambda *args: asked.append(1) or handle(*args))
    host.link._session.send(b"".join(encode(m.InventoryRequest(), n) for n in range(2, 1002)))
    desk.receive(host.at, host.link.outgoing())
    assert host.at.ended_by == "the peer does not read, or too much was said"
    assert len(asked) < 100


def test_what_a_host_said_before_it_went_counts(desk, bench):
    host = Host(desk)
    decision = host.ask(m.AllocationRequest("r-1", spec(cores=1)))
    host.link.send(m.Commit(decision.reservation))
    host.link.close()
    desk.receive(host.at, host.link.outgoing())
    assert host.at.ended_by
    assert bench.card.books.slices.keys() == {decision.slice.id}


def test_a_replayed_frame_within_a_session_ends_it(desk, bench):
    host = Host(desk)
    decision = host.ask(m.AllocationRequest("r-1", spec(cores=1)))
    commit = encode(m.Commit(decision.reservation), 3)
    host.smuggle(commit, commit)
    assert "out-of-order" in host.at.ended_by
    assert "out-of-order" in host.link.ended_by
    assert len(bench.card.books.slices) == 1


def test_an_answer_to_a_heartbeat_is_not_answered(desk):
    host = Host(desk)
    host.link.send(m.Heartbeat(1), about=1)
    host.exchange()
    assert host.got == []


def test_a_restarted_card_is_told_apart_by_its_boot(desk, bench):
    decision = Host(desk).ask(m.AllocationRequest("r-1", spec(cores=1)))
    bench.cut_power()
    again = Host(Desk(bench.card, context_of(credentials(CARD), True), boot="boot-2"))
    assert again.link.peer.boot == "boot-2"
    assert isinstance(again.ask(m.Commit(decision.reservation)), m.Grant)
