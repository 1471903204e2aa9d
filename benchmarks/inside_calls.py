"""Runs inside the host: allocations through D-Bus, from the call to the job's end."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from virtfabric.dbus.client import AgentClient


async def _job(client: AgentClient, method: str, *words: Any) -> dict[str, Any]:
    done = await client.follow(await client.call(method, *words), lambda _fraction, _text: None)
    if done["state"] != "done":
        raise SystemExit(f"{method} {words}: {done['error']}")
    return done


def main() -> None:
    """Print seconds (whole, and the agent's own part) for each round as JSON."""
    name, rounds = sys.argv[1], int(sys.argv[2])
    took, agent = [], []
    asyncio.run(_measure(name, rounds, took, agent))
    print(json.dumps({"took": took, "agent": agent}))


async def _measure(name: str, rounds: int, took: list[float], agent: list[float]) -> None:
    async with AgentClient.connected(None) as client:
        for _ in range(rounds):
            began = time.perf_counter()
            done = await _job(client, "Allocate", name, {"cpu": "+1", "memory": "+64M"})
            took.append(time.perf_counter() - began)
            agent.append(done["result"]["agent_s"])
            await _job(client, "Release", done["result"]["grant"])


if __name__ == "__main__":
    main()
