"""libvirt's event loop: one per process, one thread, shared by all connections.

Owns libvirt's process-wide settings: the error handler, the event implementation and the thread
that runs it. They have to be there before any connection is opened, or it gets no events and no
keepalive.

libvirtaio would need no thread, but does not wake its loop from other threads: 320 ms median
latency against 0.3 ms for this (measured, facts/hooks-events-dbus.md).
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import libvirt

log = logging.getLogger(__name__)


class _EventLoop:
    """Runs while somebody uses it; the last release stops and joins the thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._timer: int | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    def acquire(self) -> None:
        """Start the loop, or count one more user of it."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            if self._timer is None:
                self._prepare()
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="libvirt-events", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Count one user less; the last one waits for the thread to end."""
        with self._lock:
            self._users -= 1
            if self._users or self._thread is None:
                return
            self._stopping = True
            libvirt.virEventUpdateTimeout(self._timer, 0)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def _prepare(self) -> None:
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # else it prints them
        libvirt.virEventRegisterDefaultImpl()
        # A timer that never fires by itself: arming it is what wakes the loop.
        self._timer = libvirt.virEventAddTimeout(-1, self._disarm, None)

    def _disarm(self, timer: int, _opaque: Any) -> None:
        libvirt.virEventUpdateTimeout(timer, -1)

    def _run(self) -> None:
        while not self._stopping:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                log.exception("libvirt's event loop failed")


event_loop = _EventLoop()
