"""What a command loads: in an emulated host a millisecond of imports here is 30 ms of waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtfabric.cli.main import command_in

ROOT = Path(__file__).parents[3]
HEAVY = (
    "asyncio", "concurrent", "dataclasses", "datetime", "dbus_next", "inspect", "jinja2", "libvirt",
    "logging", "lxml", "psutil", "rich", "shutil", "ssl", "subprocess", "uuid",
    "virtfabric.adapters", "virtfabric.daemon", "virtfabric.model.device",
    "virtfabric.model.policy", "virtfabric.policy", "virtfabric.shim",
)  # fmt: skip
WATCHED = """
import json, sys
before = set(sys.modules)
from virtfabric.cli.main import main
code = main(json.loads(sys.argv[1]))
print(json.dumps([code, sorted(set(sys.modules) - before)]), file=sys.stderr)
"""
COMMANDS = (
    ["allocate", "db", "--device", "net.vf"],
    ["--json", "allocate", "db", "--cpu", "+1", "--memory", "+64M", "--for", "10m"],
    ["release", "g1"],
    ["status"],
    ["status", "--json"],
)


def _loaded(*words):
    """Exit code, and what was loaded for it."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(words)],
        capture_output=True, text=True, timeout=30, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert "virtfabric.dbus.client" in modules
    return code, [m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nothing_heavy_is_loaded_up_to_the_connection(command):
    assert _loaded("--bus", "unix:path=/nonexistent/bus", *command) == (4, [])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nothing_heavy_is_loaded_up_to_the_end(served, command):
    assert _loaded("--bus", served.address, *command) == (0, [])


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["allocate", "db"], "allocate"),
        (["--json", "allocate", "db"], "allocate"),
        (["--bus", "unix:path=/x", "status", "--json"], "status"),
        (["--bus=unix:path=/x", "--json", "release", "g1"], "release"),
        (["--help", "allocate"], ""),
        (["allocate", "--help"], "allocate"),
        (["--json", "--bus"], ""),
        (["--version"], ""),
        ([], ""),
    ],
)
def test_the_command_is_found_behind_options(argv, command):
    assert command_in(argv) == command
