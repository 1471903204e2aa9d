"""Runs in a lab: has a function given to a guest and taken back, again and again, over D-Bus.

    cycle.py GUEST CAPABILITY ROUNDS

One process for all rounds: under TCG the start of a client alone takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from virtfabric.dbus.client import AgentClient


def _job(client: AgentClient, method: str, *words: Any) -> dict[str, Any]:
    done = client.follow(client.call(method, *words), lambda _fraction, _text: None)
    if done["state"] != "done":
        raise SystemExit(f"{method} {words}: {done['error']}")
    return done


def _cycle(guest: str, capability: str, rounds: int) -> None:
    with AgentClient.connected(None) as client:
        wants = {f"device:{capability}": "+1", "deadline": "300"}
        for _ in range(rounds):
            done = _job(client, "Allocate", guest, wants)
            _job(client, "Release", done["result"]["grant"])


if __name__ == "__main__":
    _cycle(sys.argv[1], sys.argv[2], int(sys.argv[3]))
