"""Any bytes from a client: no crash, no hang, nothing kept; the next client is served."""

import os
import socket
import struct

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import Reverser
from vfio_client import CONFIG, Client, Event, Memory, held

from virtfabric.shim.vfiouser.server import FunctionServer

MEMORY, EVENT = Memory(1 << 16), Event()
NUMBERS = st.one_of(
    st.integers(0, 16),
    st.sampled_from([4095, 4096, 1 << 16, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]),
)  # fmt: skip


def body(form):
    """A body of that form with numbers that are likely to be nearly right."""
    sizes = {"I": 32, "Q": 64}
    return st.tuples(*[NUMBERS.map(lambda n, b=sizes[c]: n % (1 << b)) for c in form]).map(
        lambda numbers: struct.pack("<" + form, *numbers)
    )


BODIES = st.one_of(
    st.binary(max_size=64), body("IIQQQ"), body("IIQQ"), body("IIII"), body("IIIIQQ"),
    body("IIIII"), st.builds(lambda head, data: head + data, body("QII"), st.binary(max_size=40)),
)  # fmt: skip
REGION = st.builds(
    lambda offset, region, data: struct.pack("<QII", offset, region, len(data)) + data,
    st.integers(0, 4200), st.sampled_from([0, 2, CONFIG]), st.binary(max_size=32),
)  # fmt: skip
MESSAGES = st.builds(
    lambda command, flags, fds, content: (command, flags, fds, content),
    st.integers(0, 20), st.sampled_from([0, 0, 0, 0x10]),
    st.sampled_from(["", "m", "e", "mm", "me"]),
    st.one_of(BODIES, REGION),
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    function = Reverser()
    server = FunctionServer(tmp_path_factory.mktemp("h") / "f.sock", function)
    yield server, function
    server.close()


def look(server, function):
    with Client(server.path) as client:
        assert client.read(CONFIG, 0, 4) == bytes([0xCA, 0xF0, 0x34, 0x12])
    assert function.gone.wait(10)


@settings(
    max_examples=examples(200), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(MESSAGES, max_size=30))
def test_any_messages_are_answered_each(served, messages):
    server, function = served
    with Client(server.path) as client:
        for command, flags, kinds, content in messages:
            fds = [{"m": MEMORY.fd, "e": EVENT.fd}[kind] for kind in kinds]
            number = client.post(command, content, fds, flags)
            if flags:
                continue
            got, same, errno, answer, gained = client.take()
            assert (got, same) == (number, command)
            assert not (errno and answer)
            for fd in gained:
                os.close(fd)
        assert client.read(CONFIG, 0, 2) == b"\xca\xf0"
    assert function.gone.wait(10)
    look(server, function)


@settings(
    max_examples=examples(100), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(st.binary(max_size=80), max_size=6), st.booleans())
def test_any_bytes_end_the_connection_at_most(served, pieces, greeted):
    server, function = served
    with Client(server.path, greet=greeted) as client:
        try:
            for piece in pieces:
                if piece:
                    socket.send_fds(client.sock, [piece], [MEMORY.fd, EVENT.fd])
            client.sock.shutdown(socket.SHUT_WR)
            while client.sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
    assert function.gone.wait(10)
    look(server, function)


def test_nothing_was_kept(served):
    server, function = served
    look(server, function)
    # eventfds of one process are all the same file to stat
    memory = Memory(4096)
    before = [held(fd) for fd in (EVENT.fd, MEMORY.fd, memory.fd)]
    for _ in range(50):
        with Client(server.path) as client:
            client.map(0, 4096, memory.fd)
            own = client.eventfd()
        assert function.gone.wait(10)
        look(server, function)
        os.close(own.fd)
    assert [held(fd) for fd in (EVENT.fd, MEMORY.fd, memory.fd)] == before
    assert before[1] == before[2], "and those of the messages above are gone"
