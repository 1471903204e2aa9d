"""sd_notify: what the service manager hears."""

import os
import socket
import uuid

import pytest

from virtfabric.adapters.sdnotify import ServiceNotifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    name = f"@vf-{uuid.uuid4()}" if request.param == "abstract" else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name[0] == "@" else name)
        listener.settimeout(5)
        yield ServiceNotifier.from_environment({"NOTIFY_SOCKET": name}), listener


def test_states(manager):
    notifier, listener = manager
    notifier.ready("4 guests\nheld")
    assert listener.recv(999) == b"READY=1\nSTATUS=4 guests held"
    notifier.reloading()
    word, _, usec = listener.recv(999).partition(b"\nMONOTONIC_USEC=")
    assert word == b"RELOADING=1"
    assert int(usec) > 0
    notifier.stopping()
    assert listener.recv(999) == b"STOPPING=1"
    notifier.status("waiting")
    assert listener.recv(999) == b"STATUS=waiting"
    notifier.watchdog()
    assert listener.recv(999) == b"WATCHDOG=1"


def test_nobody_listens(tmp_path):
    ServiceNotifier().ready()
    ServiceNotifier(str(tmp_path / "gone")).ready()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog(environ, seconds):
    assert ServiceNotifier.from_environment(environ).watchdog_s == seconds
