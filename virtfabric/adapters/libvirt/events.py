"""libvirt's events, translated and delivered: `ports.EventSource`.

Owns a connection for events alone, and its re-establishment. It judges no event. libvirt delivers
on its loop's thread; what is handed on must neither block nor call libvirt.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.adapters.libvirt.loop import event_loop
from virtfabric.model.ids import GuestId
from virtfabric.ports import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 5.0
_LIFECYCLE: Final = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: EventKind.DEFINED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: EventKind.UNDEFINED,
    libvirt.VIR_DOMAIN_EVENT_STARTED: EventKind.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: EventKind.SUSPENDED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: EventKind.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: EventKind.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: EventKind.SUSPENDED,
}
_CLOSE_REASONS: Final = {
    libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "I/O error",
    libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "libvirtd closed the connection",
    libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "keepalive timed out",
    libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "closed here",
}


class LibvirtEvents:
    """Implements `ports.EventSource`."""

    def __init__(self, uri: str = "qemu:///system", *, also: Callable[[Event], None] | None = None):
        """Nothing is opened before `start`; `also` hears every event before the subscriber."""
        self._uri = uri
        self._also = also
        self._deliver: Callable[[Event], None] = lambda _event: None
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._lost = ""
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Event], None]) -> None:
        """Begin delivering; CONNECTED is the first event of each connection (resync then)."""
        if self._thread is not None:
            raise RuntimeError("events are delivered already")
        self._deliver = deliver
        self._closing.clear()
        self._thread = threading.Thread(target=self._supervise, name="libvirt-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and join the thread; safe to repeat."""
        self._closing.set()
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _supervise(self) -> None:
        event_loop.acquire()
        delay = _FIRST_RETRY_S
        try:
            while not self._closing.is_set():
                self._wake.clear()
                connection = self._connect()
                if connection is None:
                    self._closing.wait(delay)
                    delay = min(delay * 2, _LAST_RETRY_S)
                    continue
                delay = _FIRST_RETRY_S
                self._serve(*connection)
        finally:
            event_loop.release()

    def _serve(self, connection: Any, callbacks: list[int]) -> None:
        self._emit(Event(EventKind.CONNECTED))
        if self._closing.is_set():  # close() may have run before _wake was cleared
            self._wake.set()
        self._wake.wait()
        _disconnect(connection, callbacks)
        if not self._closing.is_set():
            log.warning("connection for events to %s lost: %s", self._uri, self._lost)
            self._emit(Event(EventKind.DISCONNECTED, detail=self._lost))

    def _connect(self) -> tuple[Any, list[int]] | None:
        connection = None
        try:
            connection = libvirt.open(self._uri)
            connection.registerCloseCallback(self._on_close, None)
            with suppress(libvirt.libvirtError):
                connection.setKeepAlive(5, 5)
            return connection, self._register(connection)
        except libvirt.libvirtError as error:
            log.debug("no events from %s yet: %s", self._uri, error)
            if connection is not None:
                _disconnect(connection, [])
            return None

    def _register(self, connection: Any) -> list[int]:
        wanted = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: self._on_lifecycle,
            libvirt.VIR_DOMAIN_EVENT_ID_TUNABLE: self._on_tunable,
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: self._on_metadata,
            libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE: self._on_memory_device,
            libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE: self._on_balloon,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: self._on_device,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: self._on_removed,
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: self._on_job,
        }
        return [
            connection.domainEventRegisterAny(None, number, callback, None)
            for number, callback in wanted.items()
        ]

    # -- callbacks, on the loop's thread ------------------------------------------------------

    def _on_close(self, _connection: Any, reason: int, _opaque: Any) -> None:
        self._lost = _CLOSE_REASONS.get(reason, f"reason {reason}")
        self._wake.set()

    def _on_lifecycle(self, _c: Any, dom: Any, event: int, detail: int, _opaque: Any) -> None:
        kind = _LIFECYCLE.get(event)
        if kind is not None:
            self._tell(kind, dom, detail=str(detail))

    def _on_tunable(self, _c: Any, dom: Any, values: Mapping[str, Any], _opaque: Any) -> None:
        self._tell(EventKind.TUNABLE, dom, values=dict(values))

    def _on_metadata(self, _c: Any, dom: Any, _kind: int, uri: str | None, _opaque: Any) -> None:
        self._tell(EventKind.METADATA, dom, detail=uri or "", values={"uri": uri or ""})

    def _on_memory_device(self, _c: Any, dom: Any, alias: str, kib: int, _opaque: Any) -> None:
        self._tell(EventKind.MEMORY, dom, values={"alias": alias, "current": kib << 10})

    def _on_balloon(self, _c: Any, dom: Any, kib: int, _opaque: Any) -> None:
        self._tell(EventKind.MEMORY, dom, values={"balloon": kib << 10})

    def _on_device(self, _c: Any, dom: Any, alias: str, _opaque: Any) -> None:
        if alias.startswith("vcpu"):
            self._tell(EventKind.VCPUS, dom, detail=alias, values={"alias": alias})
        elif alias.startswith(("virtiomem", "dimm")):
            self._tell(EventKind.MEMORY, dom, detail=alias, values={"alias": alias})

    def _on_removed(self, c: Any, dom: Any, alias: str, opaque: Any) -> None:
        """Also what has an event of its own: whoever waits for one alias hears of each."""
        self._on_device(c, dom, alias, opaque)
        self._tell(EventKind.DEVICE_REMOVED, dom, detail=alias)

    def _on_job(self, _c: Any, dom: Any, values: Mapping[str, Any], _opaque: Any) -> None:
        self._tell(EventKind.JOB, dom, values=dict(values))

    def _tell(
        self,
        kind: EventKind,
        dom: Any,
        *,
        detail: str = "",
        values: Mapping[str, Any] | None = None,
    ) -> None:
        # UUIDString and name are kept in the handle: neither is a call to libvirtd.
        guest = GuestId(dom.UUIDString())
        self._emit(Event(kind, guest, dom.name(), detail, values or {}))

    def _emit(self, event: Event) -> None:
        try:
            if self._also is not None:
                self._also(event)
            self._deliver(event)
        except Exception:
            log.exception("a listener failed on %s", event)


def _disconnect(connection: Any, callbacks: list[int]) -> None:
    for callback in callbacks:
        with suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(callback)
    with suppress(libvirt.libvirtError):
        connection.unregisterCloseCallback()
    with suppress(libvirt.libvirtError):
        connection.close()
