"""Messages of vfio-user on a stream socket: a header, its file descriptors, a body.

Bounded in size and in descriptors; what is in a body is for `bodies`.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from virtfabric.model.errors import VirtfabricError

MAX_DATA: Final = 1 << 20
"""Bytes of one read or write of a region; the protocol's default."""
MAX_FDS: Final = 8
_HEADER: Final = struct.Struct("<HHIII")  # id, command, size with this header, flags, errno
_MAX_BODY: Final = MAX_DATA + 64
_TYPE: Final = 0xF
_REPLY: Final = 1
_NO_REPLY: Final = 0x10
_ERROR: Final = 0x20
_FD_SIZE: Final = array.array("i").itemsize


class Command(IntEnum):
    """What a client may ask; the numbers of the protocol."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    RESET = 13


class BrokenWireError(VirtfabricError):
    """The stream cannot be followed any more; the connection has to end."""


@dataclass(slots=True)
class Request:
    """One message of a client.

    Attributes:
        fds: descriptors that came along; whoever takes one out owns it.
        complete: False if the client sent more descriptors than are taken.
    """

    id: int
    command: int
    reply: bool
    body: bytes
    fds: list[int] = field(default_factory=list)
    complete: bool = True

    def close_fds(self) -> None:
        """Close those that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


def read_request(sock: socket.socket) -> Request | None:
    """The next message; None when the client went away between two.

    Raises:
        BrokenWireError: not a message, or the client went away within one.
        OSError: of the socket.
    """
    # The header is read by itself: descriptors come with a message's first byte, and clients send
    # messages ahead, so that a larger read would give one message the descriptors of the next.
    header, fds, complete = _receive_first(sock)
    request = Request(0, 0, reply=False, body=b"", fds=fds, complete=complete)
    try:
        if not header and not fds:
            return None
        header += _receive_exactly(sock, _HEADER.size - len(header))
        request.id, request.command, size, flags, _ = _HEADER.unpack(header)
        if flags & _TYPE:
            raise BrokenWireError(f"a message of type {flags & _TYPE} is no command")
        if not _HEADER.size <= size <= _HEADER.size + _MAX_BODY:
            raise BrokenWireError(f"a message of {size} bytes")
        request.reply = not flags & _NO_REPLY
        request.body = _receive_exactly(sock, size - _HEADER.size)
    except BaseException:
        request.close_fds()
        raise
    return request


def is_at_message(sock: socket.socket) -> bool:
    """Whether what can be read next is the beginning of a command, or nothing."""
    try:
        data = sock.recv(_HEADER.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if len(data) < _HEADER.size:
        return not data
    _, command, size, flags, error = _HEADER.unpack(data)
    is_sized = _HEADER.size <= size <= _HEADER.size + _MAX_BODY
    return command in set(Command) and is_sized and not flags & ~_NO_REPLY and not error


def send_reply(sock: socket.socket, request: Request, body: bytes, fds: tuple[int, ...]) -> None:
    """Answer; the descriptors stay the caller's."""
    header = _HEADER.pack(request.id, request.command, _HEADER.size + len(body), _REPLY, 0)
    _send(sock, header + body, fds)


def send_error(sock: socket.socket, request: Request, errno: int) -> None:
    """Answer that it failed."""
    header = _HEADER.pack(request.id, request.command, _HEADER.size, _REPLY | _ERROR, errno)
    _send(sock, header, ())


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    sent = socket.send_fds(sock, [data], fds) if fds else 0
    sock.sendall(data[sent:])


def _receive_first(sock: socket.socket) -> tuple[bytes, list[int], bool]:
    data, ancillary, flags, _ = sock.recvmsg(
        _HEADER.size, socket.CMSG_SPACE(MAX_FDS * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // _FD_SIZE * _FD_SIZE])
    return data, list(fds), not flags & socket.MSG_CTRUNC


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), 1 << 16))
        if not piece:
            raise BrokenWireError("the client went away within a message")
        data += piece
    return bytes(data)
