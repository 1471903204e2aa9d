"""Wires what an agent has for offload cards: what it shows and does, and what it follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.daemon.carddesk import CardDesk
from virtfabric.daemon.cardwatch import CardWatch
from virtfabric.daemon.idleslices import IdleSlices
from virtfabric.model.errors import CardError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.arbitration import Arbitration
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.jobs import Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.wiring import World
    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.card import CardNews, CardView
    from virtfabric.ports import Card


class CardParts(NamedTuple):
    """See each of them."""

    desk: CardDesk
    watch: CardWatch
    idle: IdleSlices


class NoCards:
    """Implements `ports.Cards` where the configuration has none."""

    host = ""

    def views(self) -> Mapping[AdapterId, CardView]:
        """None."""
        return {}

    def find(self, serial: str) -> Card | None:
        """None."""
        return None

    def reach(self, serial: str) -> Card:
        """There is none."""
        raise CardError(f"the configuration has no card {serial!r}")

    def follow(self, changed: Callable[[CardNews], None]) -> None:
        """Nothing happens."""

    def close(self) -> None:
        """Nothing to end."""


def wire_cards(
    world: World, *, observatory: Observatory, ledger: Ledger, conductor: Conductor, jobs: Jobs,
    notices: Notices, arbitration: Arbitration, idle_after_s: float,
) -> CardParts:  # fmt: skip
    """All; nothing is asked yet."""
    cards = world.cards or NoCards()
    watch = CardWatch(
        cards=cards, ledger=ledger, conductor=conductor, audit=world.audit, notices=notices,
        clock=world.clock, heed=arbitration.heed,
    )  # fmt: skip
    idle = IdleSlices(
        cards=cards, ledger=ledger, audit=world.audit, notices=notices, clock=world.clock,
        after_s=idle_after_s,
    )  # fmt: skip
    desk = CardDesk(
        cards=cards, observatory=observatory, ledger=ledger, conductor=conductor, jobs=jobs,
        audit=world.audit, settle_soon=watch.settle_soon, arbiter=arbitration.view,
        idle=idle,
    )  # fmt: skip
    return CardParts(desk, watch, idle)
