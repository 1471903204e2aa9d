"""Notices to subscribers: fan-out from any thread; a listener must not block."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.api import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.ports import Clock

log = logging.getLogger(__name__)


class Notices:
    """The agent's loudspeaker; also keeps the open alerts for `health`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Notice], None]] = []
        self._alerts: dict[str, str] = {}

    def subscribe(self, listener: Callable[[Notice], None]) -> Callable[[], None]:
        """Deliver every notice to `listener`; returns the way to stop."""
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    def publish(self, kind: str, body: Mapping[str, Any]) -> None:
        """Tell everyone."""
        notice = Notice(kind, self._clock.now(), dict(body))
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(notice)
            except Exception:
                # a broken subscriber must not stop a plan
                log.exception("a listener failed on %s", kind)

    def alert(self, topic: str, text: str) -> None:
        """Raise an alert that stays open until `settle(topic)`; told once while unchanged."""
        with self._lock:
            known = self._alerts.get(topic) == text
            self._alerts[topic] = text
        if not known:
            log.warning("%s", text)
            self.publish("alert", {"topic": topic, "text": text})

    def settle(self, topic: str) -> None:
        """The reason for an alert is gone."""
        with self._lock:
            self._alerts.pop(topic, None)

    @property
    def alerts(self) -> list[str]:
        """Open alerts."""
        with self._lock:
            return list(self._alerts.values())
