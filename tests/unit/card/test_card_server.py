"""An emulated card as a process: its hosts, its log, its end; and its description."""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from card_process import Served, SocketHost, write_card
from slice_world import spec
from trust_data import HOST, credentials

from virtfabric.model.errors import AlreadyRunningError, InvalidValueError
from virtfabric.protocol import messages as m
from virtfabric.shim.card import server as module
from virtfabric.shim.card.description import read_description
from virtfabric.shim.card.server import Card, CardError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def card(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    served = Served(write_card(tmp_path))
    yield served
    served.stop()


def granted(host, request, wanted):
    decision = host.ask(m.AllocationRequest(request, wanted))
    return host.ask(m.Commit(decision.reservation)).slice


def test_several_hosts_at_once_and_all_hear_what_happens(card, caplog):
    hosts = [SocketHost(card.socket, f"host-{n}").greet() for n in range(5)]
    low = granted(hosts[0], "r-1", spec(cores=8, priority=10))
    high = hosts[1].ask(m.AllocationRequest("r-2", spec(cores=1, priority=90)))
    assert high.victims == (low.id,)
    hosts[1].ask(m.Commit(high.reservation))
    for host in hosts:
        (event,) = host.hear(m.Event)
        assert (event.what, event.slice) == ("slice-reclaimed", low.id)
    lines = [record.getMessage() for record in caplog.records]
    assert "host-0: a slice (8 cores; priority 10) -> reservation-1 of slice-1, waits 30 s" in lines
    assert any("slice-1 would end for it" in line for line in lines)
    assert f"slice-reclaimed: {low.id}: for {high.slice.id}, priority 90" in lines


def test_what_a_host_says_is_one_line_of_the_log(card, caplog):
    """Else it could have the log say what another host did."""
    host = SocketHost(card.socket, software="x\nhost host-b came").greet()
    one = granted(host, "r-1", spec(cores=1))
    host.ask(m.Assign(one.id, "a\nhost-b: slice-1 ended\x1b[2J\u2028"))
    host.ask(m.Release("s\nhost-b: gone"))
    host.close()
    for record in caplog.records:
        assert record.getMessage().isprintable(), record.getMessage()
    assert f"{one.id} is with a\\nhost-b: slice-1 ended\\x1b[2J\\u2028" in caplog.text
    assert "host host-a came (x\\nhost host-b came)" in caplog.text


def test_the_end_is_told_and_everything_is_kept(card, tmp_path, caplog):
    host = SocketHost(card.socket).greet()
    one = granted(host, "r-1", spec(cores=2))
    card.stop()
    host.until(lambda: host.link.ended_by)
    assert host.link.ended_by == "the other end closed it"
    assert not card.socket.exists()
    again = Served(write_card(tmp_path))
    try:
        other = SocketHost(again.socket, "host-b").greet()
        assert [r.slice for r in other.ask(m.InventoryRequest()).slices] == [one]
        assert other.link.peer.boot != host.link.peer.boot
    finally:
        again.stop()


def test_a_host_that_says_nothing_is_turned_out(card, monkeypatch, caplog):
    monkeypatch.setattr(module, "GREETING_S", 0.1)
    silent = SocketHost(card.socket)
    assert silent.socket.recv(1) == b""
    assert "did not prove in 0.1 s who it is" in caplog.text


def test_one_host_too_many_is_turned_away(card, monkeypatch):
    monkeypatch.setattr(module, "MAX_HOSTS", 1)
    first = SocketHost(card.socket).greet()
    assert SocketHost(card.socket, "host-b").socket.recv(1) == b""
    assert isinstance(first.ask(m.InventoryRequest()), m.Inventory)
    first.close()


def test_a_stranger_and_an_expired_host_stay_outside(card):
    for mine in (credentials(HOST, "another authority"), credentials(HOST, days=1, ago=3)):
        host = SocketHost(card.socket, mine=mine)
        host.until(lambda: host.link.ended_by)  # noqa: B023
        assert host.link.ended_by
        assert not host.link.is_open
    assert card.card.firmware.books.generation == 0


def test_a_host_that_does_not_read_harms_nobody(card, monkeypatch):
    deaf, other = SocketHost(card.socket).greet(), SocketHost(card.socket, "host-b").greet()
    deaf.socket.settimeout(0.5)
    try:
        for _ in range(4000):
            deaf.link.send(m.InventoryRequest())
            deaf.socket.sendall(deaf.link.outgoing())
    except OSError:
        pass  # its link was ended, or it may say no more
    assert isinstance(other.ask(m.InventoryRequest()), m.Inventory)


def test_a_host_that_does_not_read_makes_room_for_another(card, monkeypatch):
    monkeypatch.setattr(module, "MAX_HOSTS", 1)
    monkeypatch.setattr(module, "DEAF_S", 0.2)
    monkeypatch.setattr(module, "GOODBYE_S", 0.1)
    deaf = SocketHost(card.socket).greet()
    deaf.socket.settimeout(0.5)
    with contextlib.suppress(OSError):
        for _ in range(2000):
            for _ in range(20):
                deaf.link.send(m.InventoryRequest())
            deaf.socket.sendall(deaf.link.outgoing())
    until = time.monotonic() + 10
    while not isinstance(answer := _ask_anew(card), m.Inventory):
        assert time.monotonic() < until, answer
        time.sleep(0.05)


def _ask_anew(card):
    try:
        return SocketHost(card.socket, "host-b").greet().ask(m.InventoryRequest())
    except (OSError, InvalidValueError) as error:
        return error


def test_one_card_is_one_process(card, tmp_path):
    with pytest.raises(AlreadyRunningError, match=r"C-1\.flash"):
        Card(read_description(tmp_path / "C-1.toml"), None)


def test_a_certificate_of_another_card_is_not_used(tmp_path):
    path = write_card(tmp_path)
    write_card(tmp_path, "C-2")
    path.write_text(path.read_text().replace('credentials = "C-1"', 'credentials = "C-2"'))
    with pytest.raises(CardError, match="the certificate is of card C-2, and this is card C-1"):
        Card(read_description(path), None)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("cores = 8", "cores = -1", "adapter.cores: -1 is not a whole number"),
        ("cores = 8", 'cores = "many"', "adapter.cores"),
        ('serial = "C-1"', 'serial = "C 1"', "is not 1 to 64 letters"),
        ('"4GiB"', '"4 apples"', "adapter.memory"),
        ("version = 1", "version = 2", "version: 2"),
        ("state =", "stat =", "card.state: None is missing"),
        ("[card]", "[card]\nspeed = 1", "card.speed: 1 is not a known field"),
        ("lanes = 16", "lanes = = 16", "is not TOML"),
        ("C-1.sock", "s" * 120, "card.socket"),
    ],
)
def test_a_wrong_description_names_the_field(tmp_path, old, new, problem):
    path = write_card(tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InvalidValueError) as error:
        read_description(path)
    assert problem in str(error.value)


def test_the_command_as_it_is_run(tmp_path):
    path = write_card(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "virtfabric.cli.cardd", str(path)],
        stderr=subprocess.PIPE, bufsize=0, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        log = []
        while not (log and log[-1].endswith(": ready\n")):
            assert select.select([process.stderr], [], [], 30)[0], log
            log.append(process.stderr.readline().decode())
            assert log[-1], log
        assert (tmp_path / "C-1.sock").stat().st_mode & 0o777 == 0o600
        host = SocketHost(tmp_path / "C-1.sock").greet()
        granted(host, "r-1", spec(cores=1))
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=20)[1].decode()
        assert process.returncode == 0
        assert "reservation-1 is committed: slice-1 is there" in rest
        assert "card C-1 at node:0: 8 cores, 4GiB" in "".join(log)
    finally:
        process.kill()
        process.wait()


def test_the_command_says_what_is_wrong(tmp_path):
    path = write_card(tmp_path)
    path.write_text(path.read_text().replace("cores = 8", "cores = 8000"))
    run = subprocess.run(
        [sys.executable, "-m", "virtfabric.cli.cardd", "--check", str(path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("virtfabric-card: adapter.cores: 8000")
