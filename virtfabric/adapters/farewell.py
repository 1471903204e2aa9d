"""Closes connections so that the other end gets to read the last answer.

A close with unread input resets a UNIX connection (net/unix/af_unix.c, unix_release_sock), and a
client that is still writing then never sees what it was told. So: shut down our side, take what
still comes, within bounds, and close.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from typing import Final

WAIT_S: Final = 0.5
MOST_BYTES: Final = 4 << 20
MOST_LEAVING: Final = 32
_PIECE: Final = 1 << 16


def drain(peer: socket.socket) -> None:
    """Shut down our side, and take what comes until the other end hangs up. The caller closes.

    Raises:
        OSError: the other end broke off.
    """
    until, left = time.monotonic() + WAIT_S, MOST_BYTES
    peer.shutdown(socket.SHUT_WR)
    while left > 0:
        peer.settimeout(max(until - time.monotonic(), 0.001))
        size = len(peer.recv(_PIECE))
        if not size:
            return
        left -= size


class Farewells:
    """Drains many connections beside other work of one thread, through that thread's selector."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._leaving: dict[socket.socket, tuple[float, int]] = {}

    def add(self, peer: socket.socket) -> None:
        """Take over a connection that has its answer; the oldest makes room where many leave."""
        while len(self._leaving) >= MOST_LEAVING:
            self._close(next(iter(self._leaving)))
        try:
            peer.settimeout(0)
            peer.shutdown(socket.SHUT_WR)
        except OSError:
            peer.close()
            return
        self._selector.register(peer, selectors.EVENT_READ)
        self._leaving[peer] = (time.monotonic() + WAIT_S, MOST_BYTES)

    def has(self, peer: socket.socket) -> bool:
        """Whether it is one of those that leave."""
        return peer in self._leaving

    def timeout_s(self) -> float | None:
        """How long the selector may wait; None when nobody is leaving."""
        if not self._leaving:
            return None
        until, _ = next(iter(self._leaving.values()))
        return max(0.0, until - time.monotonic())

    def take(self, peer: socket.socket) -> None:
        """The selector says that it has input, or has hung up."""
        until, left = self._leaving[peer]
        size = 0
        with contextlib.suppress(OSError):
            size = len(peer.recv(_PIECE))
        if size and left > size:
            self._leaving[peer] = (until, left - size)
        else:
            self._close(peer)

    def expire(self) -> None:
        """Close those whose time is up."""
        now = time.monotonic()
        for peer in [p for p, (until, _) in self._leaving.items() if until <= now]:
            self._close(peer)

    def close(self) -> None:
        """Close them all."""
        for peer in list(self._leaving):
            self._close(peer)

    def _close(self, peer: socket.socket) -> None:
        del self._leaving[peer]
        self._selector.unregister(peer)
        peer.close()
