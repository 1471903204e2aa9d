"""What comes before a guest gets functions that are not there yet: slices of cards are made.

Of one request. The slices are part of its transaction: what is undone of it ends them as well.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from virtfabric.daemon.undertaking import new_request
from virtfabric.model.card import HeldSlice
from virtfabric.model.errors import CardError, Refusal, StepCancelledError
from virtfabric.policy.guestslices import choose_slices, foresee, functions_to_come, lacks_group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.model.request import Request
    from virtfabric.model.step import Step
    from virtfabric.policy.guestslices import Foresight
    from virtfabric.policy.sliceplans import SlicePart
    from virtfabric.ports import Cards, Clock

log = logging.getLogger(__name__)

APPEAR_S: Final = 30.0
"""From the grant until the kernel knows the function: it trains the link and walks the bus."""
_LOOK_S: Final = 1.0
"""Without a uevent so long, functions are read all the same."""


class SlicePrelude:
    """Implements `daemon.undertaking.Prelude`."""

    def __init__(
        self, request: Request, cards: Cards, observatory: Observatory, ledger: Ledger,
        clock: Clock, idle_slices: Callable[[], Sequence[str]],
    ) -> None:  # fmt: skip
        """`idle_slices` says which slices nobody would miss."""
        self._idle_slices = idle_slices
        self._request = request
        self._cards = cards
        self._observatory = observatory
        self._ledger = ledger
        self._clock = clock
        self._found: Foresight | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has to be done first, as `foresee` found last."""
        found = self._found
        return found.slices.plan.steps if found and found.slices else ()

    def foresee(self, snapshot: HostSnapshot) -> HostSnapshot:
        """The host as it will be when the steps are done."""
        found = choose_slices(
            snapshot, self._request, host=self._cards.host, making=new_request(),
            idle=self._idle_slices(),
        )  # fmt: skip
        self._found = found
        return foresee(snapshot, found.slices) if found.slices else snapshot

    def explain(self, refusal: Refusal) -> Refusal:
        """With why cards could not help, where they were asked."""
        why = self._found.refusal if self._found else None
        if why is None:
            return refusal
        return refusal._replace(considered=(*refusal.considered, f"cards: {why.detail}"))

    def before(self, plan: Plan) -> Plan:
        """Its steps, then the plan's, for people."""
        return replace(plan, steps=(*self.steps, *plan.steps))

    def finish(self, progress: Progress) -> None:
        """Wait until the functions of the slices are there.

        Raises:
            CardError: they do not come.
            StepCancelledError
        """
        until = self._clock.monotonic() + APPEAR_S
        while True:
            seen = self._ledger.view().generation
            self._observatory.refresh_devices()
            missing = self._missing()
            if not missing:
                return
            if progress.cancelled.is_set():
                raise StepCancelledError("cancelled while functions of slices were to come")
            left = until - self._clock.monotonic()
            if left <= 0:
                raise CardError(self._tell_missing(missing))
            names = ", ".join(sorted({part.card for part in missing}))
            progress.progress(1.0, f"waiting for functions of card {names}")
            self._ledger.wait_change(seen, min(left, _LOOK_S))

    def _parts(self) -> tuple[SlicePart, ...]:
        return self._found.slices.parts if self._found and self._found.slices else ()

    def _missing(self) -> tuple[SlicePart, ...]:
        inventory = self._observatory.devices
        there = {a: one for a, one in inventory.slices.items() if not lacks_group(inventory, a)}
        return functions_to_come(there, self._parts())

    def _tell_missing(self, missing: tuple[SlicePart, ...]) -> str:
        inventory = self._observatory.devices
        doubts = [f"{address} {why}" for address, why in sorted(inventory.doubts.items())]
        doubts += [f"{a} has no IOMMU group" for a in inventory.slices if lacks_group(inventory, a)]
        told = f" ({'; '.join(doubts)})" if doubts else ""
        cards = ", ".join(sorted({part.card for part in missing}))
        return (
            f"{len(missing)} functions of card {cards} did not appear within {APPEAR_S:g} s{told}"
        )

    def settle(self, books: Books) -> Books:
        """With the slices, under the ids that cards gave them."""
        made: dict[str, HeldSlice] = {}
        views = self._cards.views()
        for part in self._parts():
            on_it = views[part.card].books
            slices = on_it.slices.values() if on_it else ()
            found = next((one for one in slices if one.request == part.key), None)
            if found is not None:
                made[part.key] = HeldSlice(
                    part.key, part.card, found.id, part.wish, part.spec, part.holder,
                    transient=True,
                )  # fmt: skip
        ends = self._found.slices.ends if self._found and self._found.slices else frozenset()
        kept = {key: one for key, one in books.slices.items() if key not in ends}
        return replace(books, slices=kept | made)
