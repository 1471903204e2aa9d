"""Watchers that tell, from a thread of their own, that something of the host has changed.

`UeventWatcher` hears of devices of some subsystems. `DeviceWatcher` hears of PCIe functions and
their uses, from four sources, as none tells everything: uevents (functions, interfaces and disks
come and go), route messages (an interface goes up or joins a bridge, which has no uevent), and the
kernel's notes on /proc/self/mountinfo and /proc/swaps. They read no device and tell no detail:
whoever listens reads the inventory anew.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import pyudev

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOG = logging.getLogger(__name__)
SUBSYSTEMS: Final = ("pci", "net", "block")
QUIET_S: Final = 0.05
"""A burst has ended when nothing came for so long."""
LONGEST_S: Final = 0.5
"""A burst that does not end is told of this often."""
_LINKS: Final = 1  # RTMGRP_LINK
_NOTED: Final = select.POLLPRI


class UeventWatcher:
    """One watch, from `start` to `close`."""

    def __init__(
        self, changed: Callable[[], None], subsystems: tuple[str, ...], *, thread: str
    ) -> None:
        """`changed` is called once for a burst of events; what it raises is logged."""
        self._changed = changed
        self._subsystems = subsystems
        self._name = thread
        self._poll = select.poll()
        self._drains: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._end = -1
        self._ended = False

    def start(self) -> None:
        """Listen from now on: nothing that happens after this call is missed.

        Raises:
            OSError: there is no netlink here.
        """
        with ExitStack() as opening:
            ending, self._end = os.pipe()
            opening.callback(os.close, ending)
            opening.callback(os.close, self._end)
            self._add(ending, select.POLLIN, self._note_end)
            self._listen(opening)
            opened = opening.pop_all()
        self._thread = threading.Thread(
            target=self._run, args=(opened,), name=self._name, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait until `changed` is not called any more; safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.write(self._end, b"x")
        if thread is not threading.current_thread():
            thread.join()

    def _listen(self, opening: ExitStack) -> None:
        """Add the sources; what they hold open goes to `opening`."""
        # The kernel's own, not udev's: they come where no udevd runs, too.
        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        for subsystem in self._subsystems:
            monitor.filter_by(subsystem)
        monitor.start()

        def drain() -> None:
            while monitor.poll(0) is not None:
                pass

        self._add(monitor.fileno(), select.POLLIN, drain)

    def _add(self, descriptor: int, mask: int, drain: Callable[[], None]) -> None:
        self._drains[descriptor] = drain
        self._poll.register(descriptor, mask)

    def _run(self, opened: ExitStack) -> None:
        with opened:
            while self._wait(None):
                latest = time.monotonic() + LONGEST_S
                while time.monotonic() < latest and self._wait(QUIET_S):
                    pass
                if not self._ended:
                    self._tell()
            self._drains.clear()

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait for an event; False when none came, or it is the end."""
        ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        for descriptor, _ in ready:
            # EAGAIN ends a drain; ENOBUFS says that events were lost, which is an event as well.
            with suppress(OSError):
                self._drains[descriptor]()
        return bool(ready) and not self._ended

    def _note_end(self) -> None:
        # Only the thread itself sets this: until then it keeps open what `close` writes to.
        self._ended = True

    def _tell(self) -> None:
        try:
            self._changed()
        except Exception:
            LOG.exception("%s: something has changed, and telling it failed", self._name)


class DeviceWatcher(UeventWatcher):
    """Of PCIe functions and their uses."""

    def __init__(self, changed: Callable[[], None], *, proc: Path) -> None:
        """As for any; mounts and swap are those below `proc`."""
        super().__init__(changed, SUBSYSTEMS, thread="devices")
        self._proc = proc

    def _listen(self, opening: ExitStack) -> None:
        super()._listen(opening)
        self._listen_to_links(opening)
        for name in ("self/mountinfo", "swaps"):
            self._listen_to_file(self._proc / name, opening)

    def _listen_to_links(self, opening: ExitStack) -> None:
        route = opening.enter_context(
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        )
        route.bind((0, _LINKS))

        def drain() -> None:
            while route.recv(1 << 16):
                pass

        self._add(route.fileno(), select.POLLIN, drain)

    def _listen_to_file(self, path: Path, opening: ExitStack) -> None:
        with suppress(FileNotFoundError):  # a kernel without swap has no /proc/swaps
            file = opening.enter_context(path.open("rb"))
            self._add(file.fileno(), _NOTED, lambda: None)
