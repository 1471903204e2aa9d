"""Ends the grants whose lease is over, on time whatever else the agent waits for.

It has a thread of its own and asks nobody but ledger and clock: a look at libvirt may be held up
for as long as a hook of any guest runs.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.model.ids import GrantId
    from virtfabric.ports import Clock

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
"""Longest time between two looks: new leases are seen, and the clock may be set."""
_RETRY_S: Final = 0.05


class LeaseWatch:
    """Calls `end` for each grant whose lease is over, until it is gone from the books."""

    def __init__(self, ledger: Ledger, clock: Clock, end: Callable[[GrantId], None]) -> None:
        """`end` must not wait for the grant to end, and may be called again meanwhile."""
        self._ledger = ledger
        self._clock = clock
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop; safe to repeat."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            try:
                wait_s = self._look()
            except VirtfabricError as error:
                log.warning("a lease cannot be ended now: %s", error)
                wait_s = LOOK_EVERY_S

    def _look(self) -> float:
        """End what is over; returns seconds until the next look."""
        now = self._clock.now()
        coming = LOOK_EVERY_S
        for grant in self._ledger.view().books.grants.values():
            if grant.expires is None:
                continue
            if grant.expires <= now:
                self._end(grant.id)
            else:
                coming = min(coming, max(_RETRY_S, grant.expires - now))
        return coming
