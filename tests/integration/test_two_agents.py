"""Two agents for one host, and two requests for the last of something."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab_host import Guest, LabHost, checker

from demo.host import AGENT, CONFIG
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo.checker import Finding, Observation

# Nobody can pay for the other (one priority), and 112 MiB are free.
LEFT = Guest(name="left", plugged=0, virtio_mem=256)
RIGHT = Guest(name="right", plugged=0, virtio_mem=256)
ASKED = 96


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vftwo{os.getpid()}", tmp_path_factory.mktemp("two") / "lab") as lab:
        lab.config(capacity={"memory": f"{2 * (160 + 16) + 16 + 112}M"})
        lab.start_agent()
        lab.start_guests(LEFT, RIGHT)
        lab.settle()
        yield lab


def read_inner_pid(host: LabHost) -> str:
    """The agent's process id as its own PID namespace counts."""
    assert host.agent is not None
    status = Path(f"/proc/{host.agent.pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--run-dir", "/run/other"), "state directory /var/lib/virtfabric"),
        (("--state-dir", "/var/lib/virtfabric-other"), "libvirt qemu:///system"),
    ],
)
def test_second_agent_is_refused(host: LabHost, options: tuple[str, ...], what: str) -> None:
    before = host.observe_all()
    done = host.box.run([*AGENT, "--config", CONFIG, *options], check=False, env=host.env)
    assert done.returncode == 1, done.stderr
    assert what in done.stderr
    assert f"process {read_inner_pid(host)} " in done.stderr
    assert "Traceback" not in done.stderr
    assert {n: o.settings for n, o in host.observe_all().items()} == {
        n: o.settings for n, o in before.items()
    }
    assert host.cli("status").returncode == 0


def test_second_agent_with_directories_of_its_own_is_refused(host: LabHost) -> None:
    """Neither state nor run directory is shared, but the libvirtd is: nothing is touched."""
    options = ("--state-dir", "/var/lib/virtfabric-third", "--run-dir", "/run/third")
    done = host.box.run([*AGENT, "--config", CONFIG, *options], check=False, env=host.env)
    assert done.returncode == 1, done.stderr
    assert "libvirt qemu:///system is in use by another agent" in done.stderr
    assert "Traceback" not in done.stderr
    assert host.cli("status").returncode == 0


def test_race_for_the_last_memory(host: LabHost) -> None:
    """Exactly one wins, whichever; the kernel shows it, and the loser lost nothing."""
    before = host.observe_all(fresh=True)
    clients = {name: host.start_cli("allocate", name, "--memory", f"+{ASKED}M") for name in before}
    said = {name: client.communicate(timeout=allow(90)) for name, client in clients.items()}
    codes = {name: client.returncode for name, client in clients.items()}
    assert sorted(codes.values()) == [0, 3], said
    winner = next(name for name, code in codes.items() if code == 0)
    loser = next(name for name in codes if name != winner)
    assert "no-capacity" in said[loser][1]

    def judge(seen: dict[str, Observation]) -> list[Finding]:
        return [
            checker.expect_plugged(seen[winner], ASKED * checker.MIB),
            checker.expect_same(seen[loser], before[loser]),
        ]

    host.expect(judge)
    (grant,) = host.cli_json("grants")
    assert grant["name"] == winner
    assert host.cli("release", grant["id"]).returncode == 0
    host.expect_same(before)
