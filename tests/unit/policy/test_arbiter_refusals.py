"""Requests that the arbiter refuses, and what it says then."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from arbiter_host import (
    DB,
    OTHER,
    ask,
    guest,
    host,
    refused,
    three,
)

from virtfabric.model.errors import Reason
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.model.want import Mode

if TYPE_CHECKING:
    from virtfabric.model.request import Request


@pytest.mark.parametrize(
    ("change", "request_", "reason", "words"),
    [
        ({}, ask(OTHER, 100), Reason.UNKNOWN_GUEST, [OTHER]),
        ({"policy": None, "policy_error": "broken XML"}, ask(DB, 1), Reason.UNMANAGED_GUEST,
         ["db", "broken XML"]),
        ({"state": RunState.SHUTOFF}, ask(DB, 1), Reason.NOT_RUNNING, ["db"]),
        ({"job": "backup"}, ask(DB, 1), Reason.BUSY, ["db", "backup"]),
        ({"mechanism": MemoryMechanism.FIXED}, ask(DB, memory=2), Reason.NO_MECHANISM, ["db"]),
        ({}, ask(DB, 3001), Reason.ABOVE_LIMIT, ["db", "4.001", "4"]),
        ({}, ask(DB, memory=641, mode=Mode.TO), Reason.ABOVE_LIMIT, ["db", "641MiB", "640MiB"]),
        ({}, ask(DB, -901), Reason.BELOW_FLOOR, ["db", "0.099", "0.1"]),
        ({}, ask(DB, memory=127, mode=Mode.TO), Reason.BELOW_FLOOR, ["db", "127MiB", "128MiB"]),
        ({}, ask(DB, -5000, mode=Mode.TO), Reason.BELOW_FLOOR, ["db"]),
    ],
)  # fmt: skip
def test_refusals_name_the_guest_and_the_figures(
    change: dict[str, Any], request_: Request, reason: Reason, words: list[str]
) -> None:
    snapshot = three()
    db = replace(snapshot.guests[DB], **change)
    refusal = refused(replace(snapshot, guests={**snapshot.guests, DB: db}), request_)
    assert refusal.reason is reason
    assert all(word in refusal.detail for word in words), refusal.detail


def test_a_guest_under_a_plan_or_not_in_the_books_is_busy() -> None:
    assert refused(three(busy=frozenset({DB})), ask(DB, 1)).reason is Reason.BUSY
    assert refused(host(guest(DB, 90)), ask(DB, 1)).reason is Reason.BUSY
