"""Which slices of this host nobody uses, and since when: noticed, and free for who waits.

Nobody uses a slice that nobody holds, or whose holder moves nothing by its DMA, as the card counts
it. Only of the first kind may one be taken back without asking: of the second a guest has the
function, and gives it up as its policy says (`policy.victims`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.model.card import CardView, HeldSlice
    from virtfabric.ports import AuditLog, Cards, Clock

_MOVED: Final = ("dma_read", "dma_written")


@dataclass(slots=True)
class _Watched:
    figure: int
    holder: str
    since: float
    told: bool = False


class IdleSlices:
    """Looks as often as it is told to. Thread-safe."""

    def __init__(
        self, *, cards: Cards, ledger: Ledger, audit: AuditLog, notices: Notices, clock: Clock,
        after_s: float,
    ) -> None:  # fmt: skip
        """`after_s` seconds without use make a slice idle; 0: none ever is."""
        self._cards = cards
        self._ledger = ledger
        self._audit = audit
        self._notices = notices
        self._clock = clock
        self._after_s = after_s
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}

    def look(self) -> None:
        """See what moved since the last look."""
        if not self._after_s:
            return
        held, views, now = self._ledger.view().books.slices, self._cards.views(), self._now()
        found: list[tuple[HeldSlice, float]] = []
        with self._lock:
            self._watched = {key: one for key, one in self._watched.items() if key in held}
            for key, one in held.items():
                figure = _figure_of(one, views.get(one.card))
                before = self._watched.get(key)
                if figure is None:
                    self._watched.pop(key, None)
                elif before is None or (before.figure, before.holder) != (figure, one.holder):
                    self._watched[key] = _Watched(figure, one.holder, now)
                elif now - before.since >= self._after_s and not before.told:
                    before.told = True
                    found.append((one, now - before.since))
        for one, idle_s in found:
            body = one.to_json() | {"idle_s": round(idle_s)}
            self._audit.append("slice.idle", [one.key, one.wish, one.card], body)
            self._notices.publish("slice.idle", body)

    def idle(self) -> Mapping[str, float]:
        """Seconds of each slice that is idle, by key."""
        now = self._now()
        with self._lock:
            idle = {key: now - one.since for key, one in self._watched.items()}
        return {key: seconds for key, seconds in idle.items() if 0 < self._after_s <= seconds}

    def takeable(self) -> tuple[str, ...]:
        """Keys of slices that nobody would miss: all parts idle and held by nobody.

        The lowest priority first, of the same what was idle longest. What was made for a guest's
        request ends by itself, and is not among them.
        """
        idle, held = self.idle(), self._ledger.view().books.slices
        kept = {
            one.wish for key, one in held.items()
            if key not in idle or one.holder or one.transient or not one.part.reclaimable
        }  # fmt: skip
        free = [key for key, one in held.items() if one.wish not in kept]
        return tuple(sorted(free, key=lambda key: (held[key].part.priority, -idle[key], key)))

    def _now(self) -> float:
        return self._clock.monotonic()


def _figure_of(one: HeldSlice, view: CardView | None) -> int | None:
    """What has moved so far; None where nobody can tell."""
    if view is None or not view.is_usable:
        return None
    if not one.holder:
        return 0
    figures = view.readings.get(one.slice, {})
    if not any(name in figures for name in _MOVED):
        return None
    return sum(figures.get(name, 0) for name in _MOVED)
