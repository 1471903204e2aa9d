"""Interrupt vectors: eventfds of the client, which QEMU or KVM turn into messages to a guest."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Final

from virtfabric.shim.vfiouser.bodies import InvalidRequestError

_ONE: Final = (1).to_bytes(8, "little")


class Vectors:
    """The vectors of one interrupt. Safe for several threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = Lock()
        self._fds: dict[int, int] = {}

    def attach(self, start: int, fds: list[int]) -> None:
        """Give vectors from `start` on their eventfds; those in the list are owned by this then.

        Raises:
            InvalidRequestError: no such vector, or not an eventfd; nothing has changed.
        """
        if start + len(fds) > self.count:
            raise InvalidRequestError(f"vectors {start} to {start + len(fds)} of {self.count}")
        for fd in fds:
            if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[eventfd]":
                raise InvalidRequestError("the descriptor is no eventfd", errno.EBADF)
        with self._lock:
            for vector in range(start, start + len(fds)):
                self._drop(vector)
                self._fds[vector] = fds.pop(0)

    def detach(self, start: int, count: int) -> None:
        """Silence vectors; safe to repeat."""
        with self._lock:
            for vector in [v for v in self._fds if start <= v < start + count]:
                self._drop(vector)

    def trigger(self, vector: int) -> bool:
        """Raise one; False if nobody listens."""
        with self._lock:
            fd = self._fds.get(vector)
            if fd is None:
                return False
            # A counter that the client has filled up must not hold the device. The client has the
            # same file, and may have made it blocking at any time.
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):  # it is raised already
                os.write(fd, _ONE)
            return True

    def _drop(self, vector: int) -> None:
        old = self._fds.pop(vector, None)
        if old is not None:
            os.close(old)
