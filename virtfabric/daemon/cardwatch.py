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
from virtfabric.model.errors import CardError, Reason, RefusedError, VirtfabricError
from virtfabric.model.plan import Plan
from virtfabric.policy.sliceplans import plan_remaking, plan_settling
from virtfabric.policy.sliceusers import find_users

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.api import Notice
    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.model.adapter import AdapterId
    from virtfabric.model.card import CardNews, HeldSlice
    from virtfabric.model.decision import Decision
    from virtfabric.model.ledger import Books, HostSnapshot
    from virtfabric.policy.sliceplans import Settling
    from virtfabric.ports import AuditLog, Cards, Clock

log = logging.getLogger(__name__)

_KEY: Final = "cards"
_BURST: Final = 32
_EACH_S: Final = 0.5
"""Events of one card that are taken: so many at once, then one in this time. A hostile card must
not fill the audit log; of the rest it is told how many there were."""
_BODY: Final = {"by": "virtfabricd"}
_SETTLES: Final = (CardNewsKind.CONNECTED, CardNewsKind.EVENT)
_LETS_GO: Final = ("device.lost", "guest.stopped")
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
        self._kept: dict[AdapterId, frozenset[str]] = {}
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
        """A slice ends when nobody has its function any more for whom it is there."""
        lost = notice.kind == "device.lost" and bool(idle_slices(self._ledger.view().books))
        if lost or (notice.kind in _LETS_GO and any(self._kept.values())):
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
        """Bring each card to what the books say; lost slices leave the books, with an alert.

        A card that fails at it is settled later, and keeps no other from it.
        """
        for serial in self._cards.views():
            try:
                for one in self._settle_card(serial):
                    self._remake(one)
            except VirtfabricError as error:
                log.warning("card %s is not settled: %s", serial, error)

    def _settle_card(self, serial: AdapterId) -> tuple[HeldSlice, ...]:
        """All but what the card has lost; that is answered."""
        request = new_request()
        found: list[Settling] = []
        users: dict[str, str] = {}

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan:
            books = snapshot.books
            users.clear()
            users.update(find_users(snapshot))
            settling = plan_settling(
                snapshot.cards[serial], books.slices, host=self._cards.host, request=request,
                generation=snapshot.generation, idle=idle_slices(books), used=users,
            )  # fmt: skip
            found[:] = [settling]
            return settling.plan

        def change(books: Books) -> Books:
            return replace(books, slices=found[0].settled(books.slices))

        work = Undertaking(
            request, f"settling of card {serial}", place, settle_books=change, body=_BODY
        )
        self._conductor.consider(work)
        self._tell_kept(serial, {key: users[key] for key in found[0].kept})
        if found[0].is_needed:
            self._conductor.conduct(work, Progress(lambda *_: None))
            for key in found[0].strays:
                body = {"key": key, "why": "no plan made it"}
                self._audit.append("slice.withdrawn", [key], body)
        return found[0].missing

    def _tell_kept(self, serial: AdapterId, kept: Mapping[str, str]) -> None:
        """Slices that no books know are not ended under who uses them, but told of."""
        for key in self._kept.get(serial, frozenset()) - kept.keys():
            self._notices.settle(f"slice:{key}")
        self._kept[serial] = frozenset(kept)
        for key, user in kept.items():
            text = f"card {serial} has a slice ({key}) of this host that no books know: {user}; it "
            self._notices.alert(f"slice:{key}", text + "ends when nobody uses it any more")

    def _remake(self, one: HeldSlice) -> None:
        """Make a slice anew that its card has lost; one for which there is no room is lost.

        Raises:
            VirtfabricError: neither; it stays in the books.
        """
        request = new_request()
        plans: list[Plan] = []

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan:
            card, held = snapshot.cards[one.card], snapshot.books.slices.get(one.key)
            plans[:] = [plan_remaking(card, held, request, snapshot.generation)]
            return plans[0]

        title = f"slice {_name(one)} anew"
        work = Undertaking(request, title, place, settle_books=self._as_made(one), body=_BODY)
        self._conductor.consider(work)
        if not plans[0].steps:
            return
        try:
            self._conductor.conduct(work, Progress(lambda *_: None))
        except RefusedError as error:
            if error.refusal.reason is Reason.BUSY:
                raise
            self._drop(one)
            self._tell("slice.lost", one, f"; {error.refusal.detail}")
        else:
            if plans[0].steps:
                self._tell("slice.remade", one, "; it was made anew, without its image")

    def _as_made(self, one: HeldSlice) -> Callable[[Books], Books]:
        """The books with a slice under the id that its card has for it now."""

        def change(books: Books) -> Books:
            told = self._cards.views()[one.card].books
            ids = {s.request: s.id for s in told.slices.values()} if told else {}
            held = books.slices.get(one.key)
            if held is None or one.key not in ids:
                return books
            made = replace(held, slice=ids[one.key])
            return replace(books, slices={**books.slices, one.key: made})

        return change

    def _drop(self, one: HeldSlice) -> None:
        """A slice leaves the books."""
        request = new_request()

        def change(books: Books) -> Books:
            return replace(books, slices={k: s for k, s in books.slices.items() if k != one.key})

        work = Undertaking(
            request, f"loss of slice {_name(one)}",
            lambda snapshot, _: Plan(request, snapshot.generation, ()), settle_books=change,
            body=_BODY,
        )  # fmt: skip
        self._conductor.conduct(work, Progress(lambda *_: None))

    def _tell(self, kind: str, one: HeldSlice, what_came: str) -> None:
        who = f", which {one.holder} had" if one.holder else ""
        words = f"slice {_name(one)} ({one.slice} of card {one.card}) is gone{who}{what_came}"
        self._audit.append(kind, [one.key, one.wish, one.card], one.to_json())
        self._notices.publish(kind, one.to_json())
        self._notices.alert(f"slice:{one.key}", words)


def _name(one: HeldSlice) -> str:
    return one.part.name or one.wish
