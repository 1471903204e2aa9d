"""Runs in a lab: has something given and taken back, again and again, over D-Bus.

    cycle.py GUEST CAPABILITY ROUNDS        a function
    cycle.py GUEST memory@cxl:128M ROUNDS   CXL memory
    cycle.py host region:WINDOW:SERIAL ROUNDS

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


def _cycle(guest: str, what: str, rounds: int) -> None:
    kind, _, rest = what.partition(":")
    with AgentClient.connected(None) as client:
        for _ in range(rounds):
            if kind == "region":
                window, _, serial = rest.partition(":")
                made = _job(client, "CreateRegion", {"window": window, "memdevs": serial})
                _job(client, "DestroyRegion", made["result"]["region"])
                continue
            wants = {f"device:{what}": "+1"}
            if kind == "memory@cxl":
                wants = {"memory": f"+{rest}", "tier": "cxl"}
            done = _job(client, "Allocate", guest, wants | {"deadline": "300"})
            _job(client, "Release", done["result"]["grant"])


if __name__ == "__main__":
    _cycle(sys.argv[1], sys.argv[2], int(sys.argv[3]))
