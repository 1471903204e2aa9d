"""A hook script, a socket, and an agent small enough to read."""

import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from virtfabric.adapters.hook_socket import HookServer
from virtfabric.cli.hooks import hook_text


@dataclass
class SmallAgent:
    """Remembers what it was asked; `refusal`, `filtered` and `failure` are its answers."""

    refusal: str = ""
    filtered: str = ""
    failure: Exception | None = None
    gate: threading.Event | None = None
    asked: list = field(default_factory=list)
    denied: list = field(default_factory=list)

    def hook_prepare(self, caller, xml, *, wait_s):
        self.asked.append(("prepare", caller.uid, xml, wait_s))
        if self.gate:
            self.gate.wait(20)
        if self.failure:
            raise self.failure
        return self.refusal

    def hook_notify(self, caller, name, operation, xml):
        self.asked.append((operation, caller.uid, xml, name))
        if self.failure:
            raise self.failure

    def hook_filter(self, caller, operation, xml):
        self.asked.append((operation, caller.uid, xml, None))
        if self.failure:
            raise self.failure
        return self.filtered or xml


@dataclass
class Desk:
    """A directory with the script as installed, and how to call it."""

    directory: Path

    @property
    def run_dir(self):
        return self.directory / "run"

    @property
    def socket(self):
        return self.run_dir / "hook.sock"

    @property
    def script(self):
        return self.directory / "50-virtfabric"

    def call(self, operation, xml="", *, argv=None, before=()):
        data = xml if isinstance(xml, bytes) else xml.encode()
        arguments = ["db", operation, "begin", "-"] if argv is None else argv
        return subprocess.run(
            [*before, str(self.script), *arguments],
            input=data, capture_output=True, timeout=30, check=False,
            env={"PATH": "/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C"},
        )  # fmt: skip


@pytest.fixture
def desk():
    # Not tmp_path: a socket's path is at most 107 bytes, and nobody must be able to get there.
    directory = Path(tempfile.mkdtemp(prefix="vf-hook-"))
    directory.chmod(0o755)
    found = Desk(directory)
    found.script.write_text(hook_text(str(found.socket)))
    found.script.chmod(0o755)
    yield found
    shutil.rmtree(directory)


@pytest.fixture
def agent():
    return SmallAgent()


@pytest.fixture
def server(desk, agent):
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append, read_s=0.5)
    server.start()
    yield server
    server.close()
