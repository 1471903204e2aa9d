"""All cards of a host: `ports.Cards`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from virtfabric.model.card import CardCondition, CardNewsKind, CardView
from virtfabric.model.errors import CardDistrustedError, CardError, CardLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.card import CardNews
    from virtfabric.ports import Card

MEET_S: Final = 3.0
"""How long a card is waited for that nothing is known of yet: at a start, plans of before are
undone as soon as there are links."""
_KEPT: Final = 256


class CardFleet:
    """Implements `ports.Cards`."""

    def __init__(self, host: str, cards: Iterable[Card] = ()) -> None:
        self._host = host
        self._cards: dict[str, Card] = {card.serial: card for card in cards}
        self._changed = threading.Condition()
        self._met: set[str] = set()
        self._news: list[CardNews] = []
        self._listener: Callable[[CardNews], None] | None = None

    def start(self) -> None:
        """Begin to connect; call once."""
        for card in self._cards.values():
            card.watch(self._hear)

    @property
    def host(self) -> str:
        """Who this host is to cards."""
        return self._host

    def views(self) -> Mapping[AdapterId, CardView]:
        """Each card as last told of."""
        return {card.serial: card.view() for card in self._cards.values()}

    def find(self, serial: str) -> Card | None:
        """A card however it is."""
        return self._cards.get(serial)

    def reach(self, serial: str) -> Card:
        """A card that can be asked.

        Raises:
            CardLostError, CardDistrustedError, CardError
        """
        card = self._cards.get(serial)
        if card is None:
            raise CardError(f"the configuration has no card {serial!r}")
        with self._changed:
            self._changed.wait_for(lambda: serial in self._met, MEET_S)
        view = card.view()
        if view.condition is CardCondition.DISTRUSTED:
            raise CardDistrustedError(f"card {serial} is distrusted: {view.why}")
        if not view.is_usable:
            raise CardLostError(f"card {serial} is lost: {view.why}")
        return card

    def follow(self, changed: Callable[[CardNews], None]) -> None:
        """Call `changed` with all news so far, and from then on."""
        with self._changed:
            self._listener = changed
            for news in self._news:
                changed(news)
            self._news.clear()

    def close(self) -> None:
        """End all links."""
        for card in self._cards.values():
            card.close()

    def _hear(self, news: CardNews) -> None:
        with self._changed:
            if news.kind is not CardNewsKind.RESTARTED:
                self._met.add(news.serial)
            if self._listener is not None:
                self._listener(news)
            else:
                self._news = [*self._news, news][-_KEPT:]
            self._changed.notify_all()
