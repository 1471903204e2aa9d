"""The security cases of docs/card.md, from the attack to the agent's audit record.

Each over a real socket where the attack is on the link. Guests keep what they have in all of them,
and the link to an honest card is there again afterwards.
"""

import contextlib
import sys
from pathlib import Path

import agent_world as aw
import pytest
from card_agent import CardWorld, slice_file

sys.path.insert(0, str(Path(__file__).parents[1] / "card"))
from card_bed import NEVER, signed
from card_process import Served, SocketHost, write_card
from card_wires import QUICK, link_to, start_brain
from line import Line
from rogue import RogueCard, smuggle
from trust_data import CARD, HOST, credentials

from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.model.amounts import Amounts
from virtfabric.model.card import Carded
from virtfabric.model.errors import CardError
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import encode
from virtfabric.protocol.imagefile import format_manifest
from virtfabric.trust.images import make_signer


class Linked:
    """An agent whose only card is behind this socket."""

    def __init__(self, path, carded=None):
        self.path = path
        self.agent = aw.AgentWorld(
            make_cards=self._fleet, cores=6, settings={"carded": carded}
        ).start()
        self.before = self.agent.frozen()

    def _fleet(self, _host):
        fleet = CardFleet("host-a", [link_to(self.path, "host-a", timing=QUICK)])
        fleet.start()
        return fleet

    def audited(self, kind, words):
        """Wait for the record; guests are as they were."""

        def found():
            return [
                record for record in self.agent.audit.read()
                if record.kind == kind and words in str(record.body)
            ]  # fmt: skip

        aw.eventually(found, lambda: str([(r.kind, r.body) for r in self.agent.audit.read()]))
        assert self.agent.frozen() == self.before
        return found()[0]

    def say_something(self):
        with contextlib.suppress(CardError):  # whether the answer counts is not the question
            self.link().measured({"host": {"load": 1}}, deadline_s=1)

    def link(self):
        return self.agent.agent._world.cards.find("C-1")


@pytest.fixture
def linked(tmp_path):
    made = []

    def make(path, **more):
        made.append(Linked(path, **more))
        return made[-1]

    yield make
    for one in made:
        one.agent.close()


@pytest.fixture
def served(tmp_path):
    card = Served(write_card(tmp_path))
    yield card
    card.stop()


@pytest.fixture
def rogue(tmp_path):
    """A card that is honest but for one kind of message."""
    brain, made = start_brain(tmp_path), []

    def make(kind, do, **more):
        def answer(link, got):
            if isinstance(got.message, kind):
                do(link, got)
            elif not (isinstance(got.message, m.Heartbeat) and got.about):
                for found in brain.firmware.handle(got.message, "host-a"):
                    link.send(found, got.number)

        made.append(RogueCard(tmp_path / "sock", answer, **more))
        return tmp_path / "sock"

    yield make
    for card in made:
        card.close()
    brain.close()


# -- the link -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ({"mine": credentials(CARD, "another authority")}, "certificate verify failed"),
        ({"mine": credentials(CARD, days=1, ago=3)}, "certificate verify failed"),
        ({"serial": "C-2"}, "card C-2 is there, not card C-1"),
    ],
    ids=["wrong key", "expired", "another card"],
)
def test_a_card_with_the_wrong_key(linked, rogue, mine, words):
    world = linked(rogue(m.Assign, lambda *_: None, **mine))
    world.audited("card.lost", words)
    assert not world.link().view().is_usable


def test_a_host_with_the_wrong_key_is_not_let_in(served):
    stranger = SocketHost(served.socket, mine=credentials(HOST, "another authority"))
    try:
        stranger.until(lambda: stranger.link.ended_by)
        assert not stranger.link.is_open
    finally:
        stranger.close()


def test_a_replayed_frame(linked, rogue):
    """By the card itself: who has no keys gets no further than a record."""

    def replay(link, got):
        answer = encode(m.Done(), link._talk._sent + 1, got.number)
        smuggle(link, answer, answer)

    world = linked(rogue(m.Telemetry, replay))
    aw.eventually(lambda: world.link().view().is_usable, "no link")
    world.say_something()
    world.audited("card.lost", "replayed or lost")
    aw.eventually(lambda: world.link().view().is_usable, "no link afterwards")


def test_a_replayed_record(linked, served, tmp_path):
    line = Line(tmp_path / "line", served.socket)
    world = linked(tmp_path / "line")
    aw.eventually(lambda: world.link().view().is_usable, "no link")
    line.replay = True
    world.audited("card.lost", "bad record mac")
    line.replay = False
    aw.eventually(lambda: world.link().view().is_usable, "no link afterwards")
    line.close()


def test_a_truncated_frame(linked, served, tmp_path):
    line = Line(tmp_path / "line", served.socket)
    world = linked(tmp_path / "line")
    aw.eventually(lambda: world.link().view().is_usable, "no link")
    line.cut = True
    world.audited("card.lost", "cut off")
    line.cut = False
    aw.eventually(lambda: world.link().view().is_usable, "no link afterwards")
    line.close()


def test_a_downgraded_version(linked, rogue):
    def downgrade(link, got):
        frame = bytearray(encode(m.Done(), link._talk._sent + 1, got.number))
        frame[2] = 0
        smuggle(link, bytes(frame))
        link.send(m.Done(), got.number)

    world = linked(rogue(m.Telemetry, downgrade))
    aw.eventually(lambda: world.link().view().is_usable, "no link")
    world.say_something()
    world.audited("card.refused", "unsupported-version: version 0; agreed was 1")
    assert world.link().view().is_usable


# -- decisions ----------------------------------------------------------------------------------


def test_a_forged_decision_about_the_host(linked, rogue):
    """Everybody's CPU for one guest, as an answer; nothing of it is done."""

    def forge(link, got):
        asked = got.message
        much = m.HostDecision(asked.picture, asked.request, Amounts.of(cpu=4000), ())
        link.send(much, got.number)

    world = linked(rogue(m.HostRequest, forge), carded=Carded("C-1"))
    aw.eventually(lambda: world.agent.agent._arbitration.is_deciding, "no link")
    plan = world.agent.agent.plan(aw.ROOT, "web", {"cpu": "+1"})
    assert plan["decision"]["delta"] == {"cpu": 1000}
    assert plan["decision"]["by"].startswith("the agent (card C-1 decided what cannot be")
    world.audited("decision.rejected", "would get 4 of cpu; asked for was 1")


def test_a_decision_that_nobody_asked_for(linked, rogue):
    def push(link, got):
        link.send(m.HostDecision("p", "req-1", Amounts.of(cpu=4000), ()))
        link.send(m.Done(), got.number)

    world = linked(rogue(m.Telemetry, push))
    aw.eventually(lambda: world.link().view().is_usable, "no link")
    world.say_something()
    world.audited("card.distrusted", "HostDecision that nobody had asked for")


# -- images, keys, DMA --------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    made = CardWorld(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (signed(not_after=1), "past its end date"),
        (signed(key=make_signer()[0]), "not signed by anybody"),
        (signed(name="aes-2", not_after=NEVER - 1), "not signed by anybody"),
    ],
    ids=["expired", "another signer", "another manifest's signature"],
)
def test_an_image_that_is_not_to_be_believed(world, tmp_path, image, words):
    world.create(slice_file("aes", units=1))
    manifest, signature = image
    if manifest.name == "aes-2":
        signature = signed()[1]
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 4096)
    path.with_name("image.manifest").write_text(format_manifest(manifest, signature))
    job = world.agent.finish(world.agent.agent.slice_program(aw.ROOT, "aes", str(path))["job"])
    assert job["error"]["reason"] == "image-refused", job
    assert words in world.audited("slice.not-programmed")[0].body["why"]
    assert world.agent.agent.slices(aw.ROOT)[0]["phase"] == "blank"


def event_of(world, what):
    world.pass_time(1)
    world.settle()
    return [r.body for r in world.audited("card.event") if r.body["what"] == what]


def test_an_access_with_the_wrong_protection_key(world):
    """`tests/unit/cardpci` has the ring of a guest; here what comes of it."""
    world.create(slice_file("one", memory="1MiB"), slice_file("two", memory="1MiB"))
    card = next(b.firmware for b in world.brains.values() if len(b.firmware.books.slices) == 2)
    one, two = card.books.slices.values()
    fault = card.access(one.seat.keys[0], two.seat.memory[0].start, 16)
    assert fault is not None
    (told,) = event_of(world, "access-fault")
    assert told["slice"] == one.id


def test_dma_outside_of_the_memory_of_the_host(world):
    world.create(slice_file("one", memory="1MiB"))
    card = next(b.firmware for b in world.brains.values() if b.firmware.books.slices)
    (name,) = card.books.slices
    card.measure(name, {"dma_read": 64, "dma_written": 0, "dma_refused": 2})
    card.measure(name, {"dma_read": 64, "dma_written": 0, "dma_refused": 5})
    (told,) = event_of(world, "dma-refused")
    assert (told["slice"], told["detail"].split()[0]) == (name, "5")
    card.measure(name, {"dma_read": 64, "dma_written": 0, "dma_refused": 5})
    assert len(event_of(world, "dma-refused")) == 1, "told once"
