"""Watchers that tell, from a thread of their own, that something of the host has changed.

`UeventWatcher` hears of devices of some subsystems. `DeviceWatcher` hears of PCIe functions and
their uses, from four sources, as none tells everything: uevents (functions, interfaces and disks
come and go), route messages (an interface goes up or joins a bridge, which has no uevent), and the
kernel's notes on /proc/self/mountinfo and /proc/swaps. They read no device. What they tell is which
functions it may be about: whoever listens reads those anew.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import pyudev

from virtfabric.adapters.pci.attributes import parse_address
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.device import DeviceNews

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from virtfabric.model.device import PciAddress

LOG = logging.getLogger(__name__)
SUBSYSTEMS: Final = ("pci", "net", "block")
QUIET_S: Final = 0.05
"""A burst has ended when nothing came for so long."""
LONGEST_S: Final = 0.5
"""A burst that does not end is told of this often."""
_LINKS: Final = 1  # RTMGRP_LINK
_NEW_LINK: Final = 16  # RTM_NEWLINK
_NAME: Final = 3  # IFLA_IFNAME
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK_BYTES: Final = 16  # struct ifinfomsg
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr
_VIRTUAL_LINKS: Final = "devices/virtual/net"
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
        self._news = False

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
            while (device := monitor.poll(0)) is not None:
                self._note(device.device_path)

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
                # what wakes us may be of another subsystem: the filter drops that when it is read
                if self._news and not self._ended:
                    self._news = False
                    self._tell()
            self._drains.clear()

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait for an event; False when none came, or it is the end."""
        ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        for descriptor, _ in ready:
            try:
                self._drains[descriptor]()
            except BlockingIOError:  # the end of a drain
                pass
            except OSError:  # ENOBUFS: events were lost, which is an event as well
                self._note_any()
        return bool(ready) and not self._ended

    def _note(self, path: str) -> None:
        """An event of the device at this path of sysfs."""
        self._news = True

    def _note_any(self) -> None:
        """Something has happened to no device in particular."""
        self._news = True

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

    def __init__(self, changed: Callable[[DeviceNews], None], *, sys: Path, proc: Path) -> None:
        """As for any; interfaces are those of `sys`, mounts and swap those of `proc`."""
        super().__init__(self._tell_news, SUBSYSTEMS, thread="devices")
        self._told = changed
        self._sys, self._proc = SysTree(sys), proc
        self._about: set[PciAddress] = set()
        self._about_any = False
        self._at = 0.0

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
            while messages := route.recv(1 << 16):
                for name in parse_links(messages):
                    # A name that leads nowhere is an old one: another message has the new one.
                    self._note(self._sys.link(f"class/net/{name}") or _VIRTUAL_LINKS)

        self._add(route.fileno(), select.POLLIN, drain)

    def _listen_to_file(self, path: Path, opening: ExitStack) -> None:
        with suppress(FileNotFoundError):  # a kernel without swap has no /proc/swaps
            file = opening.enter_context(path.open("rb"))
            self._add(file.fileno(), _NOTED, self._note_any)

    def _note(self, path: str) -> None:
        found = [address for part in path.split("/") if (address := parse_address(part))]
        super()._note(path)
        if found:
            self._about.add(found[-1])
        elif _VIRTUAL_LINKS not in path:  # a guest's tap device, a bridge: no function has those
            self._about_any = True
        self._at = time.monotonic()

    def _note_any(self) -> None:
        super()._note_any()
        self._about_any = True
        self._at = time.monotonic()

    def _tell_news(self) -> None:
        about, self._about = self._about, set()
        any_, self._about_any = self._about_any, False
        self._told(DeviceNews(None if any_ else frozenset(about), self._at))


def parse_links(messages: bytes) -> Iterator[str]:
    """The interfaces that RTM_NEWLINK messages are about. Of one that goes a uevent tells.

    Source: rtnetlink(7); linux/netlink.h, linux/rtnetlink.h, linux/if_link.h.
    """
    at = 0
    while at + _HEADER.size <= len(messages):
        size, kind, *_ = _HEADER.unpack_from(messages, at)
        end = min(at + size, len(messages))
        attribute = at + _HEADER.size + _LINK_BYTES
        while kind == _NEW_LINK and attribute + _ATTRIBUTE.size <= end:
            length, what = _ATTRIBUTE.unpack_from(messages, attribute)
            if what == _NAME:
                name = messages[attribute + _ATTRIBUTE.size : attribute + length]
                yield name.partition(b"\0")[0].decode(errors="replace")
            attribute += max(_aligned(length), _ATTRIBUTE.size)
        at += max(_aligned(size), _HEADER.size)


def _aligned(size: int) -> int:
    return size + 3 & ~3
