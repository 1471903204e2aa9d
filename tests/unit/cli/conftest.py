"""The small agent of tests/unit/dbus as a process of its own, on a private bus."""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BESIDE = ROOT / "tests/unit/dbus"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"of_dbus_{name}", BESIDE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Served:
    """An agent on a bus, and the command beside it."""

    def __init__(self, address):
        self.address = address

    def popen(self, *args, bus=None):
        return subprocess.Popen(
            [sys.executable, "-m", "virtfabric.cli.main", "--bus", bus or self.address, *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TZ": "UTC"},
        )  # fmt: skip

    def __call__(self, *args, bus=None):
        process = self.popen(*args, bus=bus)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def served():
    if shutil.which("dbus-daemon") is None:
        pytest.skip("no dbus-daemon here")
    with _load("conftest").private_bus() as bus:
        agent = subprocess.Popen(
            [sys.executable, str(BESIDE / "little_agent.py"), bus.address],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert agent.stdout.readline() == "ready\n"
        try:
            yield Served(bus.address)
        finally:
            agent.terminate()
            agent.communicate(timeout=20)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The bus address of `virtfabricd --simulate`: a whole agent on a host of its own."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("no dbus-daemon here")
    place = tmp_path_factory.mktemp("simulated")
    with _load("conftest").private_bus() as bus:
        agent = subprocess.Popen(
            [sys.executable, "-m", "virtfabric.cli.agentd", "--simulate", "--bus", bus.address],
            stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place)},
        )  # fmt: skip
        try:
            log = []
            while not (log and ": ready:" in log[-1]):
                assert select.select([agent.stderr], [], [], 30)[0], log
                log.append(agent.stderr.readline())
                assert log[-1], log
            # the state of a real agent is not for it
            assert f"state in {place}/virtfabricd-simulated-" in log[-1]
            assert [*place.glob("*/run/hook.sock")]
            yield bus.address
        finally:
            agent.terminate()
            agent.communicate(timeout=20)
        assert not [*place.iterdir()]
