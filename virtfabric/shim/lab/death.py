"""Killing a process that QEMU is connected to, so that QEMU lives.

SIGKILL closes a process's sockets. Where one has bytes that nobody read, as a card's has whose
functions are in use, its peer is told ECONNRESET instead of an end of the stream; QEMU 11.1.2 then
sets an error twice (`vfio_user_recv_hdr`) and aborts. So the sockets are kept beyond the death,
read empty, and closed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438
"""Linux 5.6; of all architectures. Python has no function for it."""
_PIECE: Final = 64 << 10


def kill_process(pid: int, *, patience_s: float) -> None:
    """SIGKILL, wait for the end, and only then close its sockets. Nothing, where it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        sockets = _copy_sockets(handle, pid)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], patience_s)
        except ProcessLookupError:
            pass
        finally:
            for one in sockets:
                _close_empty(one)
    finally:
        os.close(handle)


def _copy_sockets(handle: int, pid: int) -> list[socket.socket]:
    """Its connections by Unix sockets, as descriptors of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    with suppress(OSError):  # it is ending already
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if not str(entry.readlink()).startswith("socket:"):
                    continue
                descriptor = libc.syscall(_PIDFD_GETFD, handle, int(entry.name), 0)
                if descriptor < 0:
                    continue
                one = socket.socket(fileno=descriptor)
                if one.family == socket.AF_UNIX and one.type == socket.SOCK_STREAM:
                    found.append(one)
                else:
                    one.close()
    return found


def _close_empty(one: socket.socket) -> None:
    with one, suppress(OSError):  # one that only listened is not connected
        one.shutdown(socket.SHUT_RDWR)  # nothing more comes in from here on
        one.settimeout(0)
        while one.recv(_PIECE):
            pass
