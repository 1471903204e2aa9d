"""Signals over the bus: jobs and notices, bursts, lies."""

from __future__ import annotations

import asyncio
import json

import pytest
from bus_talk import both, heard_until, run
from dbus_next.message import Message

from virtfabric.daemon.api import Notice
from virtfabric.dbus.emission import Outbox, emissions_of
from virtfabric.dbus.link import Link
from virtfabric.dbus.names import (
    MANAGER,
    ROOT,
    job_path,
)


def test_signals_of_a_job_and_of_notices(agent, bus):
    with both(agent, bus) as client:
        signals = client.signals()
        job = client.call("Allocate", "db", {"cpu": "+1"})
        agent.notices.publish("drift.found", {"guest": "x", "what": "pin"})
        agent.notices.alert("topic", "look at this")
        wanted = {"Done", "JobDone", "GrantMade", "Notice", "DriftFound", "Alert"}
        found = heard_until(signals, wanted)
    by_member = {h.member: h for h in found}
    assert by_member["Done"].path == job_path(job)
    assert by_member["Done"].body[0] == "done"
    assert by_member["JobDone"].body == (job_path(job), "done")
    assert json.loads(by_member["GrantMade"].body[0])["id"] == "g1"
    assert by_member["Alert"].body == ("look at this",)
    kinds = [h.body[0] for h in found if h.member == "Notice"]
    assert "grant.made" in kinds
    assert "job.progress" not in kinds


def test_an_agent_that_came_meanwhile_is_heard(agent, bus):
    with both(agent, bus) as client:
        client._owner = ":1.4711"  # who had the name before the client asked to be told
        signals = client.signals()
        agent.notices.alert("topic", "look at this")
        assert heard_until(signals, {"Alert"})


def test_a_burst_of_notices_does_not_break_the_bus(agent, bus):
    numbers = []
    with both(agent, bus) as client:
        signals = client.signals()
        for n in range(1000):
            agent.notices.publish("burst.test", {"n": n, "filler": "x" * 500})
        health = client.call("Health")
        for heard in signals:
            body = json.loads(heard.body[1]) if heard.member == "Notice" else {}
            numbers += [body["n"]] if "n" in body else []
            if numbers[-1:] == [999]:
                break
    assert numbers == list(range(1000))
    assert health["version"] == "0.1.0"


def test_more_than_the_queue_takes_is_counted_and_told():
    async def work():
        outbox = Outbox(limit=10)
        for n in range(15):
            [emission] = emissions_of(Notice("flood.test", 0.0, {"n": n}))
            outbox.put(emission)
        taken = [await outbox.take() for _ in range(11)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await outbox.take()
        return [(e.body[0], json.loads(e.body[1])) for e in taken]

    *kept, last = run(work())
    assert [body["n"] for _, body in kept] == list(range(10))
    assert last == ("notices.lost", {"count": 5})


def test_only_the_newest_progress_waits():
    async def work():
        outbox = Outbox()
        for n in range(100):
            body = {"job": "j1", "fraction": n / 100, "text": f"step {n}"}
            for emission in emissions_of(Notice("job.progress", 0.0, body)):
                outbox.put(emission)
        ended = {"job": "j1", "state": "done", "result": {}, "error": None}
        for emission in emissions_of(Notice("job.done", 0.0, ended)):
            outbox.put(emission)
        return [await outbox.take() for _ in range(3)]

    first, *rest = run(work())
    assert (first.member, first.body) == ("Progress", (0.99, "step 99"))
    assert "Done" in {e.member for e in rest}


def test_a_malformed_notice_silences_nothing(agent, bus):
    with both(agent, bus) as client:
        signals = client.signals()
        agent.notices.publish("job.done", {"nothing": "right"})
        agent.notices.publish("job.progress", {"job": "../x", "fraction": 1, "text": ""})
        agent.notices.alert("topic", "still here")
        assert heard_until(signals, {"Alert"})[-1].body == ("still here",)


async def _lie_to(bus, name):
    liar = await Link.connect(bus.address, lambda _m: None)
    lie = Message.new_signal(ROOT, MANAGER, "Alert", "s", ["a lie"])
    lie.destination = name
    await liar.send(lie)
    await liar.call_bus("GetId", "")  # the bus has passed the lie on by now
    await liar.close()


def test_signals_of_others_are_not_believed(agent, bus):
    """Anybody may send a signal straight to our connection."""
    with both(agent, bus) as client:
        signals = client.signals()
        run(_lie_to(bus, client._channel.name))
        agent.notices.alert("topic", "the truth")
        found = heard_until(signals, {"Alert"})
    assert [h.body for h in found if h.member == "Alert"] == [("the truth",)]
