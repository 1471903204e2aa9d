"""Killing a process that QEMU is connected to, so that QEMU lives.

SIGKILL closes a process's sockets. Where one has bytes that nobody read, as a card's has whose
functions are in use, its peer is told ECONNRESET instead of an end of the stream; QEMU 11.1.2 then
sets an error twice (`vfio_user_recv_hdr`) and aborts. So the sockets are kept beyond the death:
some for whoever answers from then on, the others to be read empty and closed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.shim.lab.place import has_words
from virtfabric.shim.vfiouser.wire import is_at_message

if TYPE_CHECKING:
    from collections.abc import Callable

_PIDFD_GETFD: Final = 438
"""Linux 5.6; of all architectures. Python has no function for it."""
_PIECE: Final = 64 << 10
_STOPS: Final = 50
_LOOK_S: Final = 0.005


def kill_process(
    pid: int,
    keeps: Callable[[str], bool] = lambda _: False,
    *,
    words: tuple[str, str] | None = None,
    patience_s: float,
) -> list[socket.socket]:
    """SIGKILL, and wait for the end. Nothing, where it is gone.

    Args:
        pid: whose.
        keeps: of which path of a vfio-user socket the clients' connections are returned, all of
            which are between two messages if that can be had; the caller owns them.
        words: that it has to have among its arguments; None for any.
        patience_s: seconds until it has to be gone.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return []
    kept: list[socket.socket] = []
    try:
        if words and not has_words(pid, words):
            return []  # it was gone, and its number is another's
        sockets = _copy_sockets(handle, pid)
        kept = [one for one in sockets if keeps(_path(one)) and _is_connected(one)]
        with suppress(OSError):  # it ends by itself just now
            _stop_between_messages(handle, pid, kept)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], patience_s)
        for one in sockets:
            if one not in kept:
                _close_empty(one)
    finally:
        os.close(handle)
    return kept


def _copy_sockets(handle: int, pid: int) -> list[socket.socket]:
    """Its Unix sockets, as descriptors of this process."""
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


def _path(one: socket.socket) -> str:
    """Where it, or what it was accepted by, is bound."""
    name = one.getsockname()
    return name if isinstance(name, str) else ""


def _is_connected(one: socket.socket) -> bool:
    return not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _stop_between_messages(handle: int, pid: int, clients: list[socket.socket]) -> None:
    """Stop it where it has read whole messages only, if it comes to that soon."""
    for _ in range(_STOPS if clients else 0):
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        _await_stop(pid)
        if all(is_at_message(client) for client in clients):
            return
        signal.pidfd_send_signal(handle, signal.SIGCONT)
        time.sleep(_LOOK_S)  # it reads on


def _await_stop(pid: int) -> None:
    """Until no thread of it runs; there is nothing that could be waited for but the look of it."""
    for _ in range(_STOPS):
        if all(_is_still(task) for task in Path(f"/proc/{pid}/task").iterdir()):
            return
        time.sleep(_LOOK_S)


def _is_still(task: Path) -> bool:
    try:
        return task.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    except OSError:  # it ended meanwhile
        return True


def _close_empty(one: socket.socket) -> None:
    with one, suppress(OSError):  # one that only listened is not connected
        one.shutdown(socket.SHUT_RDWR)  # nothing more comes in from here on
        one.settimeout(0)
        while one.recv(_PIECE):
            pass
