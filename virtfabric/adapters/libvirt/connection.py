"""The connection to libvirtd: opened on demand, opened again after a loss, errors translated.

The one place where a `libvirtError` becomes one of ours. It decides nothing about guests.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.adapters.libvirt.loop import event_loop
from virtfabric.model.errors import GuestGoneError, HypervisorError, HypervisorGoneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.ids import GuestId

log = logging.getLogger(__name__)

_KEEPALIVE_S: Final = 5
_KEEPALIVE_COUNT: Final = 5
_FRESH_S: Final = 2.0
_DOWN: Final = frozenset(
    {libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_NO_CLIENT}
)


class LibvirtConnection:
    """One connection, shared by worker threads; libvirt's own objects are thread-safe."""

    def __init__(self, uri: str = "qemu:///system") -> None:
        """Nothing is opened before the first call."""
        self.uri = uri
        self._lock = threading.RLock()
        self._connection: Any = None
        self._handles: dict[GuestId, Any] = {}
        self._holds_loop = False
        self._fresh_until = 0.0

    @property
    def fresh_until(self) -> float:
        """Until when (time.monotonic) libvirtd may still be finding its guests again.

        After its restart it takes calls before it has found a running guest's control groups, and
        refuses what needs them (measured with 9.0: for about 50 ms).
        """
        return self._fresh_until

    @property
    def raw(self) -> Any:
        """The open `virConnect`; opens it when there is none or it is dead.

        Raises:
            HypervisorGoneError: libvirtd does not answer.
        """
        with self._lock:
            if self._connection is None or not _is_alive(self._connection):
                self._drop()
                self._connection = self._open()
            return self._connection

    def _open(self) -> Any:
        if not self._holds_loop:
            event_loop.acquire()
            self._holds_loop = True
        try:
            connection = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise HypervisorGoneError(
                f"{self.uri}: {error.get_error_message()}", advice="is libvirtd running?"
            ) from error
        self._fresh_until = time.monotonic() + _FRESH_S
        with suppress(libvirt.libvirtError):  # drivers without a socket have none
            connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
        return connection

    def _drop(self) -> None:
        self._handles.clear()
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close; safe to repeat. A later call opens it again."""
        with self._lock:
            self._drop()
            held, self._holds_loop = self._holds_loop, False
        if held:
            event_loop.release()

    @contextmanager
    def calls(self) -> Iterator[Any]:
        """The open `virConnect`, with errors translated.

        Raises:
            HypervisorGoneError, HypervisorError
        """
        connection = self.raw
        try:
            yield connection
        except libvirt.libvirtError as error:
            raise self._translate(connection, error) from error

    @contextmanager
    def domain(self, guest: GuestId) -> Iterator[Any]:
        """A handle of a guest that runs, with errors translated.

        Raises:
            GuestGoneError: it is not known, or was found not to run after a call failed.
            HypervisorGoneError, HypervisorError
        """
        connection = self.raw
        handle = None
        try:
            handle = self._lookup(connection, guest)
            yield handle
        except libvirt.libvirtError as error:
            # Whatever a call says about a guest that ended below it ("monitor closed", "domain is
            # not running", ...), that it ended is what matters.
            if _is_alive(connection) and _is_gone(handle, error):
                raise GuestGoneError(f"guest {guest} is gone: {_message(error)}") from error
            raise self._translate(connection, error) from error

    def lookup(self, guest: GuestId) -> Any:
        """A handle of a guest, from the cache where possible.

        Raises:
            GuestGoneError, HypervisorGoneError, HypervisorError
        """
        with self.domain(guest) as handle:
            return handle

    def forget(self, guest: GuestId) -> None:
        """Drop a cached handle (the guest was undefined)."""
        with self._lock:
            self._handles.pop(guest, None)

    def remember(self, guest: GuestId, handle: Any) -> None:
        """Keep a handle that a listing brought: hooks' answers rely on handles held already."""
        with self._lock:
            self._handles[guest] = handle

    def _lookup(self, connection: Any, guest: GuestId) -> Any:
        with self._lock:
            handle = self._handles.get(guest)
        if handle is None:
            handle = connection.lookupByUUIDString(guest)
            self.remember(guest, handle)
        return handle

    def _translate(self, connection: Any, error: libvirt.libvirtError) -> HypervisorError:
        code = error.get_error_code()
        if code in _DOWN or not _is_alive(connection):
            log.warning("connection to %s lost: %s", self.uri, _message(error))
            return HypervisorGoneError(f"{self.uri}: {_message(error)}")
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return GuestGoneError(_message(error))
        return HypervisorError(_message(error))


def _is_alive(connection: Any) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _is_gone(handle: Any, error: libvirt.libvirtError) -> bool:
    if handle is None or error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)
    try:
        return not handle.isActive()
    except libvirt.libvirtError as second:
        return bool(second.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)


def _message(error: libvirt.libvirtError) -> str:
    return str(error.get_error_message() or error)
