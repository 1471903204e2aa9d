"""The socket end: bounded clients, answers while busy, one server at a time."""

import os
import select
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from virtfabric.adapters.hook_socket import HookServer
from virtfabric.model.errors import AlreadyRunningError, InstallationError
from virtfabric.protocol.hook import HookCode, HookOperation, HookReply, HookRequest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the hook socket takes root only")


def connect(path):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(str(path))
    return client


def read_reply(client):
    data = b""
    while piece := client.recv(65536):
        data += piece
    return HookReply.decode(data)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def drip(client, until):
    while time.monotonic() < until:
        client.sendall(b"x")
        select.select([client], [], [], 0.05)


def ask(path, operation=HookOperation.STARTED):
    with connect(path) as client:
        client.sendall(HookRequest(operation, "db", "<domain/>").encode())
        return read_reply(client)


def test_modes(desk, server):
    assert stat.S_IMODE(desk.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(desk.socket.parent.stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("start", [b"", b"VF1 prep", b"VF1 prepare 2 900\ndb<dom"])
def test_a_silent_client_is_let_go(desk, server, start):
    with connect(desk.socket) as client:
        client.sendall(start)
        assert read_reply(client).code is HookCode.UNABLE


def test_a_dripping_client_gets_no_longer(desk, server):
    began = time.monotonic()
    with connect(desk.socket) as client:
        client.sendall(b"VF1 prepare 2 900\n")
        with pytest.raises(OSError, match=r"pipe|reset"):
            drip(client, began + 10)
    assert time.monotonic() - began < 5


def test_a_client_that_leaves_early_does_no_harm(desk, server, agent):
    for start in (b"", b"VF1 started 2 9\ndb", HookRequest("started", "db", "<d/>").encode()):
        with connect(desk.socket) as client:
            client.sendall(start)
    assert ask(desk.socket).code is HookCode.DONE


def test_an_oversized_request_is_refused_unread(desk, server, agent):
    with connect(desk.socket) as client:
        client.sendall(b"VF1 prepare 2 99999999\n")
        reply = read_reply(client)
    assert reply.code is HookCode.UNABLE
    assert reply.line.startswith("xml: 99999999 is more than")
    assert agent.asked == []


def test_others_are_answered_while_one_waits(desk, server, agent):
    agent.gate = threading.Event()
    waiting = [connect(desk.socket) for _ in range(4)]
    for client in waiting:
        client.sendall(HookRequest(HookOperation.PREPARE, "web", "<domain/>").encode())
    began = time.monotonic()
    assert ask(desk.socket).code is HookCode.DONE
    assert time.monotonic() - began < 2
    agent.gate.set()
    for client in waiting:
        with client:
            assert read_reply(client).code is HookCode.DONE


def test_close_answers_what_is_under_way(desk, server, agent):
    agent.gate = threading.Event()
    with connect(desk.socket) as client:
        client.sendall(HookRequest(HookOperation.PREPARE, "web", "<domain/>").encode())
        deadline = time.monotonic() + 5
        while not agent.asked and time.monotonic() < deadline:
            time.sleep(0.005)
        closing = threading.Thread(target=server.close)
        closing.start()
        agent.gate.set()
        assert read_reply(client).code is HookCode.DONE
        closing.join(5)
    assert not desk.socket.exists()
    server.close()


def test_a_stale_socket_is_replaced(desk, agent):
    desk.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(desk.socket))
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append)
    server.start()
    assert ask(desk.socket).code is HookCode.DONE
    server.close()


def test_a_second_server_is_turned_away(desk, server, agent):
    second = HookServer(desk.socket, agent, on_denied=agent.denied.append)
    with pytest.raises(AlreadyRunningError, match=r"hook\.sock"):
        second.start()
    second.close()
    assert ask(desk.socket).code is HookCode.DONE


def test_something_else_at_the_path_is_not_removed(desk, agent):
    desk.run_dir.mkdir()
    desk.socket.write_text("precious")
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append)
    with pytest.raises(InstallationError, match="something else"):
        server.start()
    server.close()
    assert desk.socket.read_text() == "precious"


def test_no_threads_or_descriptors_stay(desk, agent):
    before = (threading.active_count(), descriptors())
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append)
    server.start()
    ask(desk.socket)
    server.close()
    assert (threading.active_count(), descriptors()) == before


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as agent:
    agent.settimeout(10)
    agent.connect(sys.argv[1])
    agent.sendall(b"x" * int(sys.argv[2]))
    print(b"".join(iter(lambda: agent.recv(4096), b"")).decode())
"""


@pytest.fixture
def open_server(desk, agent):
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append, mode=0o666)
    server.start()
    yield server
    server.close()


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_stranger_that_writes_first_still_hears_no(desk, open_server, agent, size):
    command = ["/usr/bin/python3", "-IS", "-c", STRANGER, str(desk.socket), str(size)]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        assert "root only" in done.stdout
    assert [caller.uid for caller in agent.denied] == [65534] * 5
    assert agent.asked == []


def test_strangers_that_never_stop_are_let_go_and_hold_nobody_up(desk, open_server):
    hold = STRANGER.replace("print(", "sys.stdin.read(); print(")
    command = ["/usr/bin/python3", "-IS", "-c", hold, str(desk.socket), "1"]
    pipe = subprocess.PIPE
    strangers = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in range(3)]
    before = descriptors()
    began = time.monotonic()
    assert ask(desk.socket).code is HookCode.DONE
    assert time.monotonic() - began < 2
    for stranger in strangers:
        stranger.communicate(b"")
        assert stranger.returncode == 0
    assert descriptors() <= before


def test_garbage_longer_than_a_header_still_gets_its_answer(desk, server):
    """The decoder stops at the first bad line: the rest of the input is unread then."""
    for _ in range(5):
        with connect(desk.socket) as client:
            client.sendall(b"nonsense\n" * 50_000)
            assert read_reply(client).code is HookCode.UNABLE
