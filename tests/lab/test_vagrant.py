"""The lab as a Vagrant machine, from `vagrant up` to `vagrant destroy`, on a private host.

Everything runs in one sandbox with its own libvirtd, network and Vagrant home; the box comes from
the real cache. The tests of this module share one machine, and the last one takes it down.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.shim.cache import cache_root
from virtfabric.shim.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

VAGRANT = Path(__file__).resolve().parents[2] / "vagrant"
BUILD_S = 900  # with an empty cache
UP_S = 600
GUESTS_S = 600  # the first of them boots a guest to see whether KVM runs it

pytestmark = pytest.mark.timeout(BUILD_S + UP_S + GUESTS_S)


@dataclass(frozen=True)
class Machine:
    """One Vagrant environment in a sandbox."""

    box: Sandbox
    home: Path

    def vagrant(
        self, *words: str, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`vagrant WORDS`."""
        environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "VAGRANT_HOME": str(self.home / "vagrant"),
            "VAGRANT_DOTFILE_PATH": str(self.home / "machine"),
            "VIRTFABRIC_CACHE": str(cache_root()),
            "TOPOLOGY": "small",
            "LAB_DRIVER": "qemu",
        }
        argv = ["vagrant", *words]
        return self.box.run(
            argv, cwd=str(VAGRANT), env=environment, timeout_s=timeout_s, check=check
        )

    def ssh(self, command: str, *, timeout_s: float = 300, code: int = 0) -> str:
        """What a command in the machine prints; asserts its exit code."""
        done = self.vagrant("ssh", "-c", command, timeout_s=timeout_s, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()

    def json(self, command: str) -> Any:
        """The JSON that a command in the machine prints."""
        return json.loads(self.ssh(command))

    def virsh(self, *words: str) -> list[str]:
        """What the sandbox's libvirt lists."""
        return self.box.run(["virsh", "-q", "-c", "qemu:///system", *words]).stdout.split()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = tmp_path_factory.mktemp("vagrant")
    subprocess.run([VAGRANT / "build-box", "small"], check=True, timeout=BUILD_S)
    (root / "home").mkdir()
    with Sandbox(f"vagrant{os.getpid()}", root / "box") as box:
        box.start_libvirtd()
        machine = Machine(box, root / "home")
        began = time.monotonic()
        machine.vagrant("up", timeout_s=UP_S)
        print(f"vagrant up took {time.monotonic() - began:.0f} s")
        yield machine


def test_systemd_runs_the_shipped_unit(machine: Machine) -> None:
    unit = "/usr/lib/systemd/system/virtfabricd.service"
    machine.ssh(
        "timeout 420 sh -c 'until systemctl is-active virtfabricd > /dev/null; do "
        '[ "$(systemctl show virtfabricd -P NRestarts)" = 0 ] || exit 1; sleep 1; done\'',
        timeout_s=480,
    )
    shown = machine.ssh("systemctl show virtfabricd -p FragmentPath -p NRestarts -p Type")
    assert set(shown.split()) == {f"FragmentPath={unit}", "NRestarts=0", "Type=notify"}
    status = machine.json("sudo virtfabric status --json")
    assert status["alerts"] == []


def test_the_host_is_the_topologys(machine: Machine) -> None:
    said = machine.ssh("lscpu")
    shape = {key: value.strip() for key, _, value in (x.partition(":") for x in said.splitlines())}
    assert (shape["Socket(s)"], shape["Core(s) per socket"], shape["Thread(s) per core"]) == (
        "2", "2", "2",
    )  # fmt: skip
    assert shape["NUMA node1 CPU(s)"] == "4-7"
    assert "82576" in machine.ssh("lspci"), "the igb NIC"


def test_three_guests_run_and_are_managed(machine: Machine) -> None:
    done = machine.ssh(
        "sudo systemctl start virtfabric-lab-guests; "  # waits for the start under way
        "systemctl is-active virtfabric-lab-guests || journalctl -u virtfabric-lab-guests",
        timeout_s=GUESTS_S,
    )
    assert done == "active"
    names = {"batch", "web", "database"}
    assert set(machine.ssh("sudo virsh -q list --name").split()) == names
    consoles = "/var/log/libvirt/qemu"
    for name in sorted(names):
        machine.ssh(
            f"sudo timeout 240 sh -c 'tail -n +1 -F {consoles}/{name}-console.log "
            "2> /dev/null | grep -q -m 1 VFREADY'",
            timeout_s=300,
        )
    listed = machine.json("sudo virtfabric guests --json")
    assert {guest["name"]: guest["priority"] for guest in listed} == {
        "batch": 10, "web": 50, "database": 90,
    }  # fmt: skip


def test_the_agent_moves_cpu_between_them(machine: Machine) -> None:
    def quota() -> list[str]:
        return re.findall(
            r"global_quota\s*:\s*(-?\d+)", machine.ssh("sudo virsh schedinfo database")
        )

    before = quota()
    machine.ssh("sudo virtfabric allocate database --cpu +200m", timeout_s=180)
    assert quota() != before


def test_destroy_leaves_nothing(machine: Machine) -> None:
    assert machine.virsh("list", "--all", "--name") == ["virtfabric-lab-small"]
    machine.vagrant("destroy", "-f")
    for listing in ("list", "pool-list", "net-list"):
        assert machine.virsh(listing, "--all", "--name") == [], listing
    assert not machine.box.path("/var/lib/libvirt/virtfabric-lab").exists()
    assert list((machine.home / "machine").rglob("*.json")) == []
    assert machine.box.run(["pgrep", "-a", "qemu-system"], check=False).stdout == ""
