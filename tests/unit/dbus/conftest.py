"""A private dbus-daemon of the system kind, and a small agent to put on it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# importlib mode puts no test directory on the path; all modules here talk over the same bus
sys.path.insert(0, str(Path(__file__).parent))

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true"/><allow receive_requested_reply="true"/>
    <allow eavesdrop="false" receive_type="method_call"/><allow receive_type="signal"/>
  </policy>
</busconfig>
"""


class PrivateBus:
    def __init__(self, directory: Path) -> None:
        socket = directory / "bus"
        self.address = f"unix:path={socket}"
        self._config = directory / "bus.conf"
        self._config.write_text(CONFIG.format(socket=socket))
        self._socket = socket
        self._daemon: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._daemon = subprocess.Popen(
            ["dbus-daemon", f"--config-file={self._config}", "--nofork", "--print-address"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline(), "dbus-daemon did not start"

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.communicate()
            self._daemon = None


@contextlib.contextmanager
def private_bus():
    directory = Path(tempfile.mkdtemp(prefix="vf-bus-"))
    directory.chmod(0o755)  # other users' clients must reach the socket
    bus = PrivateBus(directory)
    bus.start()
    try:
        yield bus
    finally:
        bus.stop()
        shutil.rmtree(directory)


@pytest.fixture
def bus():
    if shutil.which("dbus-daemon") is None:
        pytest.skip("no dbus-daemon here")
    with private_bus() as running:
        yield running


@pytest.fixture(scope="session")
def little():
    """The module of the small agent (importlib mode knows no packages of tests)."""
    path = Path(__file__).with_name("little_agent.py")
    spec = importlib.util.spec_from_file_location("little_agent", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["little_agent"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def agent(little):
    found = little.LittleAgent()
    yield found
    found.close()
