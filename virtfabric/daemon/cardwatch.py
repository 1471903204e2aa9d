"""What cards tell by themselves: into the audit log, out as notices, and what follows from it.

A card that comes back, or on which something happened, is settled: brought to what the books say.
It runs in a thread of its own: a card must not hold up guests.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.custody import idle_slices
from virtfabric.daemon.errands import Errands
from virtfabric.daemon.executor import Progress
from virtfabric.daemon.undertaking import Undertaking, new_request
from virtfabric.model.card import CardNewsKind
from virtfabric.model.errors import CardError
from virtfabric.policy.sliceplans import plan_settling

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.api import Notice
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.model.adapter import SliceId
    from virtfabric.model.card import CardNews, HeldSlice
    from virtfabric.model.decision import Decision
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.policy.sliceplans import Settling
    from virtfabric.ports import AuditLog, Cards, Clock

log = logging.getLogger(__name__)

_KEY: Final = "cards"
_BURST: Final = 32
_EACH_S: Final = 0.5
"""Events of one card that are taken: so many at once, then one in this time. A hostile card must
not fill the audit log; of the rest it is told how many there were."""
_SETTLES: Final = (CardNewsKind.CONNECTED, CardNewsKind.EVENT)
_WORDS: Final = {
    CardNewsKind.LOST: "is lost: {}; guests keep what they have",
    CardNewsKind.DISTRUSTED: "is distrusted: {}; guests keep what they have, nothing it says is "
    "believed; when it is sane: virtfabric card trust {serial}",
}


class _Flood:
    """How many events of a card may pass now, and how many did not since one did."""

    def __init__(self, now: float) -> None:
        self._left = float(_BURST)
        self._at = now
        self.dropped = 0

    def lets_pass(self, now: float) -> bool:
        self._left = min(float(_BURST), self._left + (now - self._at) / _EACH_S)
        self._at = now
        if self._left < 1:
            self.dropped += 1
            return False
        self._left -= 1
        return True


class CardWatch:
    """Follows cards from `start` to `close`."""

    def __init__(
        self, *, cards: Cards, ledger: Ledger, conductor: Conductor, audit: AuditLog,
        notices: Notices, clock: Clock, heed: Callable[[CardNews], None],
    ) -> None:  # fmt: skip
        """`heed` hears news in the watch's thread, before anything follows from them."""
        self._heed_news = heed
        self._cards = cards
        self._ledger = ledger
        self._conductor = conductor
        self._audit = audit
        self._notices = notices
        self._clock = clock
        self._errands = Errands(workers=1)
        self._floods: dict[str, _Flood] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to follow, with what happened since the links were begun."""
        self._unsubscribe = self._notices.subscribe(self._heed)
        self._cards.follow(self._hear)

    def close(self) -> None:
        """End the links, and what they led to; safe to repeat."""
        self._unsubscribe()
        self._cards.close()
        self._errands.close()

    def drain(self, wait_s: float) -> bool:
        """Wait until nothing is to be worked off; False when it took longer."""
        return self._errands.drain(wait_s)

    def settle_soon(self) -> None:
        """Bring cards to what the books say, in the watch's thread."""
        self._errands.put(_KEY, self.settle)

    def _heed(self, notice: Notice) -> None:
        """A slice that was made for a guest ends when that has lost its function."""
        if notice.kind == "device.lost" and idle_slices(self._ledger.view().books):
            self.settle_soon()

    def _hear(self, news: CardNews) -> None:
        dropped = 0
        if news.kind in (CardNewsKind.EVENT, CardNewsKind.REFUSED):
            flood = self._floods.setdefault(news.serial, _Flood(self._clock.monotonic()))
            if not flood.lets_pass(self._clock.monotonic()):
                return
            dropped, flood.dropped = flood.dropped, 0
        self._errands.put(_KEY, lambda: self._take(news, dropped))

    def _take(self, news: CardNews, dropped: int) -> None:
        body: dict[str, Any] = {"card": news.serial, "detail": news.detail}
        if dropped:
            body["dropped"] = dropped
        if news.what:
            body |= {"what": news.what, "slice": news.slice}
        topic = f"card:{news.serial}"
        words = _WORDS.get(news.kind)
        if words is not None:
            text = words.format(news.detail, serial=news.serial)
            self._notices.alert(topic, f"card {news.serial} {text}")
        elif news.kind is CardNewsKind.CONNECTED:
            self._notices.settle(topic)
        self._audit.append(f"card.{news.kind}", [news.serial], body)
        self._notices.publish(f"card.{news.kind}", body)
        self._heed_news(news)
        self._ledger.touch()  # which functions are its slices may be another answer now
        if news.kind in _SETTLES:
            self._refresh(news)
            self.settle()

    def _refresh(self, news: CardNews) -> None:
        """What happened shows in the card's inventory."""
        if news.kind is not CardNewsKind.EVENT:
            return
        try:
            self._cards.reach(news.serial).refresh()
        except CardError as error:
            log.warning("%s", error)

    # -- settling -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring cards to what the books say; slices that are lost leave the books, with an alert.

        Raises:
            VirtfabricError: nothing was changed; a later settling does it.
        """
        request = new_request()
        found: list[Settling] = []

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan:
            settling = plan_settling(
                snapshot.cards, snapshot.books.slices, host=self._cards.host,
                request=request, generation=snapshot.generation, idle=idle_slices(snapshot.books),
            )  # fmt: skip
            found[:] = [settling]
            return settling.plan

        def change(books: Books) -> Books:
            return replace(books, slices=self._as_they_are(books))

        body = {"by": "virtfabricd"}
        work = Undertaking(request, "settling of cards", place, settle_books=change, body=body)
        self._conductor.consider(work)
        if not found[0].plan.steps:
            return
        self._conductor.conduct(work, Progress(lambda *_: None))
        self._tell(found[0])

    def _as_they_are(self, books: Books) -> dict[str, HeldSlice]:
        """The slices of the books under the ids that cards have for them now."""
        ids: dict[tuple[str, str], SliceId] = {}
        known: set[str] = set()
        for serial, view in self._cards.views().items():
            if view.is_usable and view.books is not None:
                known.add(serial)
                ids |= {(serial, one.request): one.id for one in view.books.slices.values()}
        idle = idle_slices(books)
        return {
            key: replace(one, slice=ids.get((one.card, key), one.slice))
            for key, one in books.slices.items()
            if one.card not in known or ((one.card, key) in ids and key not in idle)
        }

    def _tell(self, settling: Settling) -> None:
        held = self._ledger.view().books.slices
        for one in settling.missing:
            name = one.part.name or one.wish
            what = f"slice {name} ({one.slice} of card {one.card})"
            who = f", which {one.holder} had" if one.holder else ""
            kind, words = "slice.lost", f"{what} is gone{who}"
            if one.key in held:
                kind = "slice.remade"
                words = f"{what} was gone{who}; it was made anew, without its image"
            self._audit.append(kind, [one.key, one.wish, one.card], one.to_json())
            self._notices.publish(kind, one.to_json())
            self._notices.alert(f"slice:{one.key}", words)
        for key in settling.strays:
            self._audit.append("slice.withdrawn", [key], {"key": key, "why": "no plan made it"})
