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
    async def work():
        async with both(agent, bus) as client:
            wanted = {"Done", "JobDone", "GrantMade", "Notice", "DriftFound", "Alert"}
            hearing = asyncio.create_task(heard_until(client, wanted))
            await asyncio.sleep(0)
            job = await client.call("Allocate", "db", {"cpu": "+1"})
            agent.notices.publish("drift.found", {"guest": "x", "what": "pin"})
            agent.notices.alert("topic", "look at this")
            return job, await hearing

    job, found = run(work())
    by_member = {h.member: h for h in found}
    assert by_member["Done"].path == job_path(job)
    assert by_member["Done"].body[0] == "done"
    assert by_member["JobDone"].body == (job_path(job), "done")
    assert json.loads(by_member["GrantMade"].body[0])["id"] == "g1"
    assert by_member["Alert"].body == ("look at this",)
    kinds = [h.body[0] for h in found if h.member == "Notice"]
    assert "grant.made" in kinds
    assert "job.progress" not in kinds


def test_a_burst_of_notices_does_not_break_the_bus(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            numbers = []

            async def hear():
                async for heard in client.signals():
                    body = json.loads(heard.body[1]) if heard.member == "Notice" else {}
                    if "n" in body:
                        numbers.append(body["n"])
                        if body["n"] == 999:
                            return

            hearing = asyncio.create_task(hear())
            await asyncio.sleep(0)
            for n in range(1000):
                agent.notices.publish("burst.test", {"n": n, "filler": "x" * 500})
            health = await client.call("Health")
            await hearing
            return numbers, health

    numbers, health = run(work())
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
    async def work():
        async with both(agent, bus) as client:
            hearing = asyncio.create_task(heard_until(client, {"Alert"}))
            await asyncio.sleep(0)
            agent.notices.publish("job.done", {"nothing": "right"})
            agent.notices.publish("job.progress", {"job": "../x", "fraction": 1, "text": ""})
            agent.notices.alert("topic", "still here")
            return await hearing

    assert run(work())[-1].body == ("still here",)


def test_signals_of_others_are_not_believed(agent, bus):
    """Anybody may send a signal straight to our connection."""

    async def work():
        async with both(agent, bus) as client:
            hearing = asyncio.create_task(heard_until(client, {"Alert"}))
            await asyncio.sleep(0)
            liar = await Link.connect(bus.address, lambda _m: None)
            lie = Message.new_signal(ROOT, MANAGER, "Alert", "s", ["a lie"])
            lie.destination = client._link.unique_name
            await liar.send(lie)
            await liar.call_bus("GetId", "")  # the bus has passed the lie on by now
            agent.notices.alert("topic", "the truth")
            found = await hearing
            await liar.close()
            return [h.body for h in found if h.member == "Alert"]

    assert run(work()) == [("the truth",)]
