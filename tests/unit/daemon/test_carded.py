"""*Carded* mode: a card decides about a simulated host, and all that it may do wrong.

Whatever the card does, guests keep what they have, and the books stay right.
"""

import sys
from dataclasses import replace
from pathlib import Path

import agent_world as aw
import pytest
from card_agent import CardWorld

sys.path.insert(0, str(Path(__file__).parents[1] / "card"))
from card_process import Served, write_card
from card_wires import QUICK, link_to
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.model.amounts import Amounts
from virtfabric.model.card import Carded, Fallback
from virtfabric.model.decision import Take
from virtfabric.model.ids import GuestId
from virtfabric.model.units import MIB
from virtfabric.protocol import messages as m

CORES = 6
BATCH, WEB, DATABASE = aw.uuid_of(10), aw.uuid_of(50), aw.uuid_of(90)


def kinds(agent):
    return [record.kind for record in agent.audit.read()]


def bodies(agent, kind):
    return [record.body for record in agent.audit.read() if record.kind == kind]


def decided(agent, deciding=True):
    """Wait until the agent knows whether the card decides."""
    view = agent.agent._arbitration.view
    aw.eventually(lambda: view()["deciding"] == deciding, lambda: str(view()))


# -- over a socket ---------------------------------------------------------------------------------


class Socketed:
    """A card on a socket that can be stopped and started, and an agent that it decides for."""

    def __init__(self, place, **carded):
        self.place = place
        self.card = Served(write_card(place))
        self.agent = aw.AgentWorld(
            make_cards=self._fleet,
            sample_interval_s=0.2,
            settings={"carded": Carded("C-1", **carded)},
            cores=CORES,
        ).start()
        decided(self.agent)

    def _fleet(self, _host):
        fleet = CardFleet("host-a", [link_to(self.card.socket, "host-a", timing=QUICK)])
        fleet.start()
        return fleet

    @property
    def hosts(self):
        return self.card.card.firmware.hosts

    def restart_card(self):
        self.card.stop()
        decided(self.agent, deciding=False)
        self.card = Served(write_card(self.place))

    def close(self):
        self.agent.close()
        self.card.stop()


@pytest.fixture
def socketed(tmp_path):
    made = []

    def make(**carded):
        made.append(Socketed(tmp_path, **carded))
        return made[-1]

    yield make
    for world in made:
        world.close()


def test_the_card_decides_and_the_agent_does_it(socketed):
    world = socketed()
    agent = world.agent
    job = agent.allocate("database", cpu="+1", memory="+256M")
    assert job["state"] == "done", job
    assert job["result"]["decided_by"] == "card C-1"
    assert agent.guest("database")["cpu"]["grant"] == 2000
    (begun,) = [b for b in bodies(agent, "plan.begun") if b.get("decision", {})["by"]]
    assert begun["decision"]["by"] == "card C-1"
    story = agent.agent.explain(aw.ROOT, job["result"]["request"])
    assert any("decided by card C-1: cpu 1, memory 256MiB" in line for line in story["lines"])
    counts = world.hosts.counts
    aw.eventually(lambda: counts["done"] == 1 and counts["decided"] >= 1, lambda: str(counts))


def test_the_card_takes_from_lower_priorities(socketed):
    world = socketed()
    job = world.agent.allocate("database", memory="+640M")
    assert job["result"]["decided_by"] == "card C-1"
    assert {paid["name"] for paid in job["result"]["paid"]} <= {"batch", "web"}
    assert job["result"]["paid"], job
    before = world.agent.guest("batch")["memory"]["grant"]
    released = world.agent.finish(
        world.agent.agent.release(aw.ROOT, job["result"]["grant"])["job"]
    )  # fmt: skip
    assert released["state"] == "done"
    assert world.agent.guest("batch")["memory"]["grant"] > before, "the loan went home"


def test_a_refusal_is_the_card_s(socketed):
    world = socketed()
    job = world.agent.allocate("web", cpu="+90")
    assert job["state"] == "refused"
    assert job["error"]["detail"].startswith("card C-1: web: cpu: ")
    assert world.hosts.counts["refused"] == 1


def test_dry_run_status_and_cards_say_who_decides(socketed):
    world = socketed()
    agent = world.agent.agent
    assert agent.plan(aw.ROOT, "web", {"cpu": "+1"})["decision"]["by"] == "card C-1"
    assert agent.status(aw.ROOT)["arbiter"] == {
        "mode": "carded", "card": "C-1", "fallback": "own", "deciding": True, "why": "",
    }  # fmt: skip
    (card,) = agent.cards(aw.ROOT)
    assert card["arbiter"]
    assert card["deciding"]


def test_the_card_hears_what_is_measured(socketed):
    world = socketed()
    aw.eventually(lambda: world.hosts.measured.get("host-a"), "nothing was told")
    told = world.hosts.measured["host-a"]
    assert set(told) == {"host", BATCH, WEB, DATABASE}
    assert told[WEB]["vcpu.maximum"] == 4


def test_a_lost_card_costs_nobody_anything(socketed):
    world = socketed()
    agent = world.agent
    agent.allocate("web", cpu="+1")
    before = agent.frozen()
    world.card.stop()
    decided(agent, deciding=False)
    assert agent.frozen() == before
    job = agent.allocate("database", cpu="+1")
    assert job["state"] == "done", job
    assert job["result"]["decided_by"].startswith("the agent (card C-1 is lost: ")
    (alert,) = [a for a in agent.agent.health(aw.ROOT)["alerts"] if "does not decide" in a]
    assert alert.endswith(": the agent decides by itself")
    assert "arbiter.away" in kinds(agent)


def test_without_a_fallback_nobody_else_decides(socketed):
    world = socketed(fallback=Fallback.REFUSE)
    agent = world.agent
    job = agent.allocate("web", cpu="+1")
    world.card.stop()
    decided(agent, deciding=False)
    before = agent.frozen()
    refused = agent.allocate("database", cpu="+1")
    assert refused["error"]["reason"] == "no-arbiter"
    assert agent.frozen() == before
    # what was lent comes home all the same
    ended = agent.finish(agent.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert ended["state"] == "done", ended


def test_a_card_that_started_anew_is_shown_the_host_again(socketed):
    world = socketed()
    agent = world.agent
    agent.allocate("web", cpu="+1")
    world.restart_card()
    decided(agent)
    aw.eventually(
        lambda: not [a for a in agent.agent.health(aw.ROOT)["alerts"] if "decide" in a], "alert"
    )
    job = agent.allocate("web", cpu="-1")
    assert job["result"]["decided_by"] == "card C-1", job
    assert kinds(agent).count("arbiter.deciding") == 2
    assert kinds(agent).count("arbiter.away") == 1


def test_a_card_that_forgot_the_host_is_told_in_the_same_request(socketed):
    world = socketed()
    world.hosts._frames.clear()
    job = world.agent.allocate("web", cpu="+1")
    assert job["result"]["decided_by"] == "card C-1"


def test_functions_are_not_the_card_s(socketed):
    world = socketed()
    refused = world.agent.allocate("web", **{"device:net.vf": "1"})
    assert "decided by the agent (functions are not for a card to give)" in str(refused)


# -- a card that does anything ---------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    made = CardWorld(tmp_path, settings={"carded": Carded("C-1", answer_s=0.3)}, cores=CORES)
    yield made
    made.close()


def mangle(world, change, kind=m.HostRequest):
    """Have every answer to this kind of message changed on its way."""
    world.wires["C-1"].mangle = lambda asked, answer: (
        change(asked, answer) if isinstance(asked, kind) else answer
    )


def forge(delta, *takes):
    return lambda asked, _: m.HostDecision(asked.picture, asked.request, delta, takes)


@pytest.mark.parametrize(
    ("delta", "takes", "words"),
    [
        (Amounts.of(cpu=100_000), (), "asked for was 1"),
        (Amounts.of(cpu=1000), (Take(DATABASE, Amounts.of(cpu=1000)),), "priority-not-lower"),
        (Amounts.of(cpu=1000), (Take(BATCH, Amounts.of(cpu=99_000)),), "it can give"),
        (Amounts.of(cpu=1000), (Take(WEB, Amounts.of(cpu=1000)),), "unknown, or does not run"),
        (Amounts.of(cpu=1000, memory=64 * MIB), (), "which nobody asked for"),
        (Amounts(), (), "web would get nothing"),
        (Amounts.of(cpu=1000), (Take(GuestId("nobody"), Amounts()),), "nobody would pay nothing"),
        (Amounts.of(cpu=1000), (Take(WEB, Amounts()),), "web would pay nothing"),
        (Amounts.of(cpu=-1000), (), "asked for was 1"),
    ],
)
def test_a_forged_decision_is_refused_told_and_audited(world, delta, takes, words):
    mangle(world, forge(delta, *takes))
    before = world.agent.guest("batch"), world.agent.guest("database")
    job = world.agent.allocate("web", cpu="+1")
    assert job["result"]["decided_by"].startswith("the agent (card C-1 decided what cannot be: ")
    assert words in job["result"]["decided_by"]
    rejected = world.audited("decision.rejected")
    assert len(rejected) == 1, "told once"
    assert words in rejected[0].body["why"]
    assert rejected[0].body["delta"] == delta.to_json()
    assert world.brains["C-1"].firmware.hosts.counts["rejected"] >= 1
    assert any("decided what cannot be" in alert for alert in world.alerts())
    told = world.agent.agent.explain(aw.ROOT, job["result"]["request"])["lines"]
    assert any("C-1 decided, and it was rejected: " in line for line in told)
    assert (world.agent.guest("batch"), world.agent.guest("database")) == before


def test_a_forged_decision_is_not_done_by_anybody_where_nobody_else_may(tmp_path):
    world = CardWorld(
        tmp_path, settings={"carded": Carded("C-1", Fallback.REFUSE)}, cores=CORES
    )  # fmt: skip
    try:
        mangle(world, forge(Amounts.of(cpu=9000)))
        before = world.agent.frozen()
        job = world.agent.allocate("web", cpu="+1")
        assert job["error"]["reason"] == "no-arbiter"
        assert world.agent.frozen() == before
    finally:
        world.close()


@pytest.mark.parametrize("other", [{"request": "req-other"}, {"picture": "older"}])
def test_a_decision_about_something_else_is_a_lie(world, other):
    mangle(world, lambda _, answer: replace(answer, **other))
    job = world.agent.allocate("web", cpu="+1")
    assert "is distrusted" in job["result"]["decided_by"]
    world.settle()
    assert world.audited("card.distrusted")
    mangle(world, lambda _, answer: answer)
    world.agent.agent.card_trust(aw.ROOT, "C-1")
    decided(world.agent)
    again = world.agent.allocate("web", cpu="+1")
    assert again["result"]["decided_by"] == "card C-1"


def test_a_decision_that_nobody_asked_for_is_a_lie(world):
    before = world.agent.frozen()
    world.wires["C-1"].tell(m.HostDecision("p", "req-1", Amounts.of(cpu=4000), ()))
    world.settle()
    assert [r.body["card"] for r in world.audited("card.distrusted")] == ["C-1"]
    assert world.agent.frozen() == before


def test_a_card_without_an_arbiter_or_words_we_know(world):
    no = m.Error(m.ErrorCode.REFUSED, "this card has no arbiter", reason="not-allowed")
    mangle(world, lambda *_: no, m.HostPicture)
    assert "no arbiter" in world.agent.allocate("web", cpu="+1")["result"]["decided_by"]
    mangle(world, lambda asked, _: m.HostRefusal(asked.picture, asked.request, "moon", "", {}, ()))
    told = world.agent.allocate("database", cpu="+1")["result"]["decided_by"]
    assert "refused without a reason that is known: moon" in told


def test_a_card_that_hangs_at_decisions(world):
    def hang(message):
        if isinstance(message, m.HostRequest):
            world.wires["C-1"].lose("it did not answer within 0.3 s")

    world.wires["C-1"].before = hang
    job = world.agent.allocate("web", cpu="+1")
    assert "is lost: it did not answer" in job["result"]["decided_by"] or "answer" in str(job)
    assert job["state"] == "done"
    world.wires["C-1"].before = lambda _message: None
    world.wires["C-1"].return_()
    world.settle()
    decided(world.agent)


def test_a_card_that_does_not_hear_the_end_costs_nothing(world):
    def deaf(message):
        if isinstance(message, m.HostOutcome):
            world.wires["C-1"].lose("pulled")

    world.wires["C-1"].before = deaf
    job = world.agent.allocate("web", cpu="+1")
    assert (job["state"], job["result"]["decided_by"]) == ("done", "card C-1")


def test_what_fails_is_told_as_undone(world):
    world.agent.host.faults.add(Fault(Effect.FAIL, Phase.APPLY))
    job = world.agent.allocate("web", cpu="+1")
    assert job["state"] == "failed", job
    assert world.brains["C-1"].firmware.hosts.counts["undone"] == 1


# -- property --------------------------------------------------------------------------------------


AMOUNTS = st.builds(
    lambda cpu, memory: Amounts.of(cpu=cpu, memory=memory * MIB),
    st.sampled_from([0, 0, 100, 500, 1000, 4000, 90_000]),
    st.sampled_from([0, 0, 2, 64, 256, 768, 100_000]),
)
GUESTS = st.sampled_from([BATCH, WEB, DATABASE, aw.uuid_of(7)])
DECISIONS = st.tuples(
    st.one_of(AMOUNTS, AMOUNTS.map(lambda a: -a), st.just(None)),
    st.dictionaries(GUESTS, AMOUNTS.filter(bool), max_size=2) | st.just(None),
)
ASKS = st.tuples(
    st.sampled_from(["batch", "web", "database"]),
    st.sampled_from([{"cpu": "+1"}, {"cpu": "-500m"}, {"memory": "+256M"}, {"memory": "-64M"},
                     {"cpu": "+500m", "memory": "+512M"}, {"cpu": "+2", "partial": "yes"}]),
    DECISIONS,
)  # fmt: skip


@given(st.lists(ASKS, min_size=1, max_size=6))
@settings(max_examples=examples(30), deadline=None, suppress_health_check=list(HealthCheck))
def test_no_card_gets_a_guest_below_its_own_or_the_host_beyond_what_it_has(tmp_path_factory, asks):
    """Judged on the simulated kernel and the books, after every decision of a hostile card."""
    world = CardWorld(
        tmp_path_factory.mktemp("cards"), settings={"carded": Carded("C-1")},
        specs=(*aw.default_specs(), aw.make_spec(7, "mine", 0, running=True)),
    )  # fmt: skip
    try:
        for guest, wants, (delta, takes) in asks:

            def change(asked, answer, delta=delta, takes=takes):
                if not isinstance(answer, m.HostDecision):
                    answer = m.HostDecision(asked.picture, asked.request, Amounts(), ())
                return replace(
                    answer, delta=answer.delta if delta is None else delta,
                    takes=answer.takes if takes is None
                    else tuple(Take(g, a) for g, a in takes.items()),
                )  # fmt: skip

            mangle(world, change)
            world.agent.allocate(guest, **wants)
            judge(world.agent)
    finally:
        world.close()


def judge(agent):
    """Nothing of `policy` is used."""
    guests = agent.agent.guests(aw.ROOT)
    for guest in guests:
        for part in ("cpu", "memory"):
            assert guest[part]["grant"] >= guest[part]["reservation"]
            assert guest[part]["grant"] <= guest[part]["limit"]
    assert sum(g["cpu"]["grant"] for g in guests) <= agent.cores * 1000
    there = sum(int(node.memory_total) for node in agent.host.read_topology().nodes.values())
    assert sum(g["memory"]["grant"] for g in guests) <= there
    for live in agent.host.read_guests().values():
        shown = next(g for g in guests if g["name"] == live.name)
        assert live.memory_current <= shown["memory"]["grant"]
