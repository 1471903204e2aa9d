"""Calls of a card: through the mailbox and over a socket; a decision about the host over a socket.

The ends are those of the tests: drivers that were written from docs/card-protocol.md, a card with
TLS in this process. What the time goes into is TLS and JSON, twice, and Python's one lock.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from virtfabric.model.card import ARBITER_ANSWER_S

_UNIT = Path(__file__).resolve().parents[1] / "tests" / "unit"
CALLS = 2000
GUESTS = (10, 100, 1000)
WITHIN_MS = ARBITER_ANSWER_S * 1000
"""For a decision, the picture included: what the agent waits for each single answer."""
DECISIONS = 12


def measure() -> list[dict[str, Any]]:
    """Rows of calls a second, and milliseconds of decisions."""
    rooms = ("vfiouser", "card", "cardpci", "trust")
    sys.path[:0] = [str(_UNIT.parent), *(str(_UNIT / room) for room in rooms)]
    with tempfile.TemporaryDirectory() as place:
        rows = [_mailbox(Path(place))]
    with tempfile.TemporaryDirectory() as place:
        return rows + _socket(Path(place))


def _mailbox(place: Path) -> dict[str, Any]:
    from card_rig import Rig
    from mailbox_driver import MailboxDriver
    from mailbox_host import Host

    from virtfabric.protocol.messages import Heartbeat

    rig = Rig(place)
    try:
        host = Host(MailboxDriver(rig.connect("management")))
        host.ask(Heartbeat(0))
        began = time.perf_counter()
        for number in range(CALLS):
            host.ask(Heartbeat(number))
        return _rate("mailbox calls, one after the other (TLS, heartbeats)", began, 500)
    finally:
        rig.close()


def _rate(what: str, began: float, target: int) -> dict[str, Any]:
    rate = CALLS / (time.perf_counter() - began)
    return {
        "what": what, "value": round(rate), "unit": "/s", "target": target, "met": rate >= target,
        "at least": True,
    }  # fmt: skip


def _socket(place: Path) -> list[dict[str, Any]]:
    from card_process import Served, write_card
    from card_wires import link_to

    from virtfabric.adapters.cardlink.streamwire import Timing
    from virtfabric.protocol.messages import Heartbeat

    served = Served(write_card(place))
    card = link_to(served.socket, "host-a", timing=Timing())
    try:
        card.watch(lambda _news: None)
        until = time.monotonic() + 10
        while not card.view().is_usable:
            if time.monotonic() > until:
                raise SystemExit("no link to the card")
            time.sleep(0.01)
        began = time.perf_counter()
        for number in range(CALLS):
            card._wire.ask(Heartbeat(number))  # noqa: SLF001
        rows = [_rate("calls over a socket, one after the other", began, 500)]
        for count in GUESTS:
            rows += _decisions(card, count, WITHIN_MS)
        return rows
    finally:
        card.close()
        served.stop()


def _decisions(card: Any, count: int, target: float) -> list[dict[str, Any]]:
    """Of a host that changed, so that all of it has to be sent; and of one that did not."""
    from dataclasses import replace

    from benchmarks.bench_policy import make_snapshot
    from virtfabric.model.decision import Proposal
    from virtfabric.model.ids import RequestId
    from virtfabric.model.request import Origin, Principal, Request
    from virtfabric.model.units import MIB
    from virtfabric.model.want import Mode, Want
    from virtfabric.policy.proposals import check_proposal

    snapshot, asker = make_snapshot(count, contended=True)
    request = Request(
        RequestId("req-bench"), asker, Principal("root", 0), Origin.DBUS,
        cpu=Want(Mode.BY, 300), memory=Want(Mode.BY, 64 * MIB),
    )  # fmt: skip
    fresh, again = [], []
    for number in range(DECISIONS):
        changed = replace(snapshot, generation=number + 2)
        for samples in (fresh, again):
            began = time.perf_counter()
            proposal = card.propose(changed, request, {}, deadline_s=10)
            if not isinstance(proposal, Proposal):
                raise SystemExit(f"the benchmark's request was refused: {proposal}")
            check_proposal(changed, request, proposal)
            samples.append((time.perf_counter() - began) * 1e3)
    return [
        {
            "what": f"carded decision, asked and checked, {count} guests, {name}",
            "value": round(statistics.median(samples), 1), "unit": "ms median", "target": target,
            "met": statistics.median(samples) < target,
        }
        for name, samples in (("new picture", fresh), ("known picture", again))
    ]  # fmt: skip
