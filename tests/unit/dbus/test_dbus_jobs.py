"""Jobs over the bus: followed to their end, cancelled, failed."""

from __future__ import annotations

import asyncio
import json

from bus_talk import both, ignore, run


def test_a_job_is_followed_to_its_end(agent, bus, little):
    async def work():
        shown = []

        def show(fraction, text):
            shown.append((fraction, text))
            if len(shown) == 5:
                agent.let_go.set()

        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
            return await client.follow(job, show), shown

    job, shown = run(work())
    assert job["state"] == "done"
    assert job["result"] == little.RESULT
    assert [f for f, _ in shown] == sorted(f for f, _ in shown)
    assert shown[-1][1].startswith("step ")


def test_a_job_over_before_we_look_is_still_told(agent, bus, little):
    async def work():
        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1"})
            await asyncio.to_thread(agent.jobs_.get(job).ended.wait)
            return await client.follow(job, ignore)

    assert run(work())["result"] == little.RESULT


def test_a_cancelled_job_undoes_and_says_so(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
            await client.cancel(job)
            return await client.follow(job, ignore)

    job = run(work())
    assert job["state"] == "cancelled"
    assert job["error"]["reason"] == "cancelled"
    assert job["error"]["detail"].endswith("nothing changed")


def test_a_failing_job_tells_its_error_and_no_secrets(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            ended = []
            for key in ("bad", "defect"):
                job = await client.call("Allocate", "db", {"cpu": "+1", "key": key})
                ended.append((await client.follow(job, ignore))["error"])
            return ended

    bad, defect = run(work())
    assert (bad["detail"], bad["advice"]) == ("libvirt said no", "ask it again")
    assert defect["reason"] == "internal"
    assert "secret" not in json.dumps(defect)
