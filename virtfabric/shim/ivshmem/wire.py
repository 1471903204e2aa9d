"""What an ivshmem server says: numbers of 8 bytes, some with a file. Clients say nothing."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER: Final = struct.Struct("<q")
_VERSION: Final = 0
_MEMORY: Final = -1


class BrokenClientError(OSError):
    """A client does not take what it is told."""


def send_welcome(
    sock: socket.socket, *, own: int, memory: int, peers: dict[int, Sequence[int]],
    bells: Sequence[int],
) -> None:  # fmt: skip
    """Tell a client that came what there is.

    Args:
        sock: to the client; does not block.
        own: the client's id.
        memory: file of the shared memory.
        peers: whom it may ring: eventfds, one for each vector, by id.
        bells: eventfds by which it is rung, one for each vector.

    Raises:
        OSError: it does not take it.
    """
    _send(sock, _VERSION)
    _send(sock, own)
    _send(sock, _MEMORY, memory)
    for peer, theirs in peers.items():
        for fd in theirs:
            _send(sock, peer, fd)
    for fd in bells:
        _send(sock, own, fd)


def send_gone(sock: socket.socket, peer: int) -> None:
    """Tell a client that another went.

    Raises:
        OSError: it does not take it.
    """
    _send(sock, peer)


def _send(sock: socket.socket, number: int, fd: int | None = None) -> None:
    data = _NUMBER.pack(number)
    if socket.send_fds(sock, [data], [] if fd is None else [fd]) != len(data):
        raise BrokenClientError("it takes a part of a message")
