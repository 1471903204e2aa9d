"""Jobs over the bus: followed to their end, cancelled, failed."""

from __future__ import annotations

import json

from bus_talk import both, ignore


def test_a_job_is_followed_to_its_end(agent, bus, little):
    shown = []

    def show(fraction, text):
        shown.append((fraction, text))
        if len(shown) == 5:
            agent.let_go.set()

    with both(agent, bus) as client:
        job = client.follow(client.call("Allocate", "db", {"cpu": "+1", "key": "slow"}), show)
    assert job["state"] == "done"
    assert job["result"] == little.RESULT
    assert [f for f, _ in shown] == sorted(f for f, _ in shown)
    assert shown[-1][1].startswith("step ")


def test_a_job_over_before_we_look_is_still_told(agent, bus, little):
    with both(agent, bus) as client:
        job = client.call("Allocate", "db", {"cpu": "+1"})
        assert agent.jobs_.get(job).ended.wait(10)
        assert client.follow(job, ignore)["result"] == little.RESULT


def test_a_cancelled_job_undoes_and_says_so(agent, bus):
    with both(agent, bus) as client:
        job = client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
        client.cancel(job)
        ended = client.follow(job, ignore)
    assert ended["state"] == "cancelled"
    assert ended["error"]["reason"] == "cancelled"
    assert ended["error"]["detail"].endswith("nothing changed")


def test_a_failing_job_tells_its_error_and_no_secrets(agent, bus):
    with both(agent, bus) as client:
        bad, defect = (
            client.follow(client.call("Allocate", "db", {"cpu": "+1", "key": key}), ignore)["error"]
            for key in ("bad", "defect")
        )
    assert (bad["detail"], bad["advice"]) == ("libvirt said no", "ask it again")
    assert defect["reason"] == "internal"
    assert "secret" not in json.dumps(defect)
