"""The ledger's waiting: nothing that happens between a look and the wait is missed."""

from __future__ import annotations

import time

from virtfabric.daemon.ledger import Ledger
from virtfabric.model.amounts import Amounts
from virtfabric.model.ids import GuestId, TransactionId
from virtfabric.model.ledger import Books

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
TXN = TransactionId("txn-1")
LONG_S = 60.0


def test_a_plan_that_ended_before_the_wait_is_not_waited_for() -> None:
    ledger = Ledger(Books())
    assert ledger.reserve(TXN, ledger.view().generation, Amounts(), frozenset({GUEST}))
    seen = ledger.view()
    assert seen.busy == {GUEST}
    ledger.abort(TXN)
    began = time.monotonic()
    ledger.wait_change(seen.generation, LONG_S)
    assert time.monotonic() - began < LONG_S / 2
