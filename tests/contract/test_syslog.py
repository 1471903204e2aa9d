"""The system log: what goes out, and that nothing comes back."""

import os
import re
import socket

import pytest

from virtfabric.adapters.syslog import WARNING, SystemLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


def listen(path):
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    receiver.settimeout(5)
    return receiver


def test_line_has_the_form_of_syslog(path):
    with listen(path) as receiver:
        log = SystemLog(path)
        assert log.available
        log.send("virtfabric audit head 1:abc\nsecond ü\0")
        log.send("careful", WARNING)
        first, second = receiver.recv(9000).decode(), receiver.recv(9000).decode()
        log.close()
        log.close()
    form = rf"<86>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d virtfabricd\[{os.getpid()}\]: (.*)"
    match = re.fullmatch(form, first)
    assert match is not None
    assert match[1] == "virtfabric audit head 1:abc second ü "
    assert second.startswith("<84>")
    assert log.failures == 0


def test_nobody_listening_is_counted_and_not_raised(path):
    log = SystemLog(path)
    assert not log.available
    log.send("x")
    log.send("y")
    assert log.failures == 2
    with listen(path) as receiver:
        log.send("z")
        assert b": z" in receiver.recv(9000)
        assert log.available
        assert log.failures == 2


def test_restarted_daemon_is_found_again(path):
    log = SystemLog(path)
    with listen(path) as receiver:
        log.send("one")
        receiver.recv(9000)
    path.unlink()
    with listen(path) as receiver:
        log.send("two")
        assert b": two" in receiver.recv(9000)
    assert log.failures == 0


def test_full_queue_does_not_block(path):
    with listen(path):
        log = SystemLog(path)
        for _ in range(2000):
            log.send("x" * 1000)
            if log.failures:
                break
        assert log.failures
        assert not log.available


def test_absurd_paths_do_not_raise(tmp_path):
    log = SystemLog(tmp_path / ("x" * 200))
    log.send("x")
    assert log.failures == 1
