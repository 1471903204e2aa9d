"""The server's protocol, by a client that was written from QEMU's specification."""

import fcntl
import os
import queue
import socket
import stat
import struct
from pathlib import Path

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ivshmem_client import IvshmemClient

from virtfabric.shim.ivshmem import server as s


class Recorder:
    """A resident with memory of one page."""

    def __init__(self, ring, happened):
        self.ring, self.happened = ring, happened
        self.memory = os.memfd_create("page")
        os.ftruncate(self.memory, 4096)

    def rung(self):
        self.happened.put(("rung", self))

    def gone(self):
        os.close(self.memory)
        self.happened.put(("gone", self))


class Served:
    def __init__(self, path):
        self.happened, self.residents, self.told = queue.Queue(), [], []
        self.fails = False
        self.server = s.IvshmemServer(path / "i.sock", self.admit, report=self.told.append)
        self.path = self.server.path

    def admit(self, ring):
        if self.fails:
            raise OSError("no memory")
        self.residents.append(Recorder(ring, self.happened))
        return self.residents[-1]

    def next(self):
        what, who = self.happened.get(timeout=20)
        return what, self.residents.index(who)


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    yield served
    served.server.close()


def test_a_client_gets_what_the_specification_says(served):
    with IvshmemClient(served.path, greet=False) as client:
        messages = [client.take() for _ in range(5)]
        assert [number for number, _ in messages] == [0, 1, -1, s.CARD, 1]
        assert [fd is not None for _, fd in messages] == [False, False, True, True, True]
        assert os.fstat(messages[2][1]).st_ino == os.fstat(served.residents[0].memory).st_ino
        for _, fd in messages[3:]:
            assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


def test_bells_ring_both_ways_and_each_its_own(served):
    with IvshmemClient(served.path) as one, IvshmemClient(served.path) as two:
        assert (one.id, two.id) == (1, 2)
        for _ in range(3):
            two.ring()
            assert served.next() == ("rung", 1), "each time, though nobody reads the eventfd"
        one.ring()
        assert served.next() == ("rung", 0)
        served.residents[1].ring()
        assert two.rung()
        assert not one.rung(0)


def test_clients_know_only_the_card(served):
    with IvshmemClient(served.path) as one, IvshmemClient(served.path) as two:
        assert list(one.peers) == list(two.peers) == [s.CARD]
        assert os.fstat(one.memory_fd).st_ino != os.fstat(two.memory_fd).st_ino
        two.close()
        assert served.next() == ("gone", 1)
        one.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.take()


def test_an_id_is_free_when_its_client_went(served):
    with IvshmemClient(served.path) as one, IvshmemClient(served.path) as two:
        one.close()
        assert served.next() == ("gone", 0)
        with IvshmemClient(served.path) as three:
            assert (two.id, three.id) == (2, 1)
        assert served.next() == ("gone", 2)
        served.residents[0].ring()
        two.ring()
        assert served.next() == ("rung", 1)


def test_who_went_rings_nobody(served):
    """It still has the eventfd, whose number here may be another's by now."""
    with IvshmemClient(served.path) as one:
        one.sock.close()
        assert served.next() == ("gone", 0)
        with IvshmemClient(served.path) as two:
            one.ring()
            two.sock.close()
            assert served.next() == ("gone", 1), "the first that happens"


def test_too_many_are_turned_away(served):
    clients = [IvshmemClient(served.path) for _ in range(s.MAX_CLIENTS)]
    with IvshmemClient(served.path, greet=False) as another:
        assert another.ends()
    assert sorted(client.id for client in clients) == [*range(1, s.MAX_CLIENTS + 1)]
    clients.pop().close()
    assert served.next() == ("gone", s.MAX_CLIENTS - 1)
    with IvshmemClient(served.path) as another:
        assert another.id == s.MAX_CLIENTS
    for client in clients:
        client.close()
    assert served.told == [f"i.sock: a client was not taken in: there are {s.MAX_CLIENTS}"]


def test_one_that_cannot_be_taken_in_is_ended_and_the_next_is_not(served):
    served.fails = True
    with IvshmemClient(served.path, greet=False) as client:
        assert client.ends()
    served.fails = False
    with IvshmemClient(served.path) as client:
        assert client.id == 1
    assert served.told == ["i.sock: a client was not taken in: no memory"]


def test_a_client_that_reads_nothing_holds_nobody(served):
    with IvshmemClient(served.path, greet=False), IvshmemClient(served.path) as other:
        other.ring()
        assert served.next() == ("rung", 1)


def test_a_full_counter_holds_nobody(served):
    """The eventfds are the client's as well: it may have made them blocking."""
    with IvshmemClient(served.path) as one, IvshmemClient(served.path) as two:
        for fd in (*one.own, *one.peers[s.CARD]):
            os.write(fd, struct.pack("=Q", 2**64 - 2))
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        assert served.next() == ("rung", 0)
        served.residents[0].ring()
        two.ring()
        assert served.next() == ("rung", 1)


def test_the_card_says_goodbye(served):
    with IvshmemClient(served.path) as client:
        served.server.close()
        assert client.take() == (s.CARD, None)
        assert client.ends()
    assert served.next() == ("gone", 0)
    assert not served.path.exists()
    served.server.close()
    served.residents[0].ring()


@settings(
    max_examples=examples(100), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=4), st.integers(0, 3), st.booleans())
def test_whatever_a_client_says_ends_it_at_most(served, pieces, files, greeted):
    with IvshmemClient(served.path) as other:
        before = len(served.residents)
        with IvshmemClient(served.path, greet=greeted) as client:
            try:
                for piece in pieces:
                    socket.send_fds(client.sock, [piece], [other.memory_fd] * files)
            except OSError:
                pass
            if pieces:
                assert client.ends()
        assert served.next() == ("gone", before)
        other.ring()
        assert served.next() == ("rung", before - 1)
    assert served.next() == ("gone", before - 1)


def test_nothing_is_kept_of_who_went(served):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for greet in (True, False) * 20:
        IvshmemClient(served.path, greet=greet).close()
        assert served.next()[0] == "gone"
    assert open_files() == before
    assert served.server._actions.keys() == {served.server._listener.fileno()}
