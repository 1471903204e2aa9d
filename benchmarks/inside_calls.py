"""Runs inside the host: allocations through D-Bus, from the call to the job's end."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from virtfabric.dbus.client import AgentClient


def _job(client: AgentClient, method: str, *words: Any) -> dict[str, Any]:
    done = client.follow(client.call(method, *words), lambda _fraction, _text: None)
    if done["state"] != "done":
        raise SystemExit(f"{method} {words}: {done['error']}")
    return done


def main() -> None:
    """Print seconds (whole, and the agent's own part) for each round as JSON."""
    name, rounds = sys.argv[1], int(sys.argv[2])
    took, agent = [], []
    _measure(name, rounds, took, agent)
    print(json.dumps({"took": took, "agent": agent}))


def _measure(name: str, rounds: int, took: list[float], agent: list[float]) -> None:
    with AgentClient.connected(None) as client:
        for _ in range(rounds):
            began = time.perf_counter()
            done = _job(client, "Allocate", name, {"cpu": "+1", "memory": "+64M"})
            took.append(time.perf_counter() - began)
            agent.append(done["result"]["agent_s"])
            _job(client, "Release", done["result"]["grant"])


if __name__ == "__main__":
    main()
