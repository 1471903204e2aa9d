"""A function whose server died: all ones, and consent to whatever is mapped."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys

import pytest

from virtfabric.shim.vfiouser import dead
from virtfabric.shim.vfiouser.wire import is_at_message

HEADER = struct.Struct("<HHIII")
ACCESS = struct.Struct("<QII")
READ, WRITE, MAP, UNMAP, INFO = 9, 10, 2, 3, 4
NO_REPLY = 0x10


def command(number, kind, body=b"", flags=0):
    return HEADER.pack(number, kind, HEADER.size + len(body), flags, 0) + body


@pytest.fixture
def client():
    """Of a process that answers for the dead."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    argv = [sys.executable, "-m", dead.__name__, str(theirs.fileno())]
    with ours, subprocess.Popen(argv, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        yield ours
        ours.close()
        assert process.wait(30) == 0, "it ends with its client"


def ask(client, *words, **options):
    client.sendall(command(*words, **options))
    number, kind, size, flags, error = HEADER.unpack(client.recv(HEADER.size, socket.MSG_WAITALL))
    body = client.recv(size - HEADER.size, socket.MSG_WAITALL) if size > HEADER.size else b""
    assert (number, kind) == words[:2]
    assert flags & 1
    return body, error


def test_reads_are_all_ones_and_writes_go_nowhere(client):
    where = ACCESS.pack(0x10, 0, 4)
    assert ask(client, 7, READ, where) == (where + b"\xff" * 4, 0)
    assert ask(client, 8, WRITE, where + b"abcd") == (where, 0)
    client.sendall(command(9, WRITE, where + b"abcd", flags=NO_REPLY))
    assert ask(client, 10, READ, where) == (where + b"\xff" * 4, 0)


def test_mappings_are_agreed_to_and_their_files_closed(client):
    reads, writes = os.pipe()
    lent = struct.pack("<IIQQQ", 32, 3, 0, 0, 4096)
    socket.send_fds(client, [command(1, MAP, lent)], [writes])
    os.close(writes)
    assert HEADER.unpack(client.recv(HEADER.size, socket.MSG_WAITALL))[4] == 0
    with os.fdopen(reads, "rb") as end:
        assert end.read() == b""
    gone = struct.pack("<IIQQ", 24, 0, 0, 4096)
    assert ask(client, 2, UNMAP, gone) == (gone, 0)


def test_nothing_else_is_known_of_it(client):
    assert ask(client, 1, INFO, bytes(16)) == (b"", errno.ENODEV)
    assert ask(client, 2, READ, ACCESS.pack(0, 0, 1 << 30)) == (b"", errno.EINVAL)


@pytest.mark.parametrize(
    ("waiting", "is_one"),
    [
        (b"", True),
        (command(5, READ, ACCESS.pack(0, 0, 4)), True),
        (command(5, READ, ACCESS.pack(0, 0, 4))[16:], False),
        (command(5, MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, 4096))[16:], False),
        (command(5, READ)[:9], False),
    ],
    ids=["nothing", "a command", "its body", "a mapping's body", "part of a header"],
)
def test_where_a_message_begins(waiting, is_one):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(waiting)
        assert is_at_message(theirs) is is_one
