"""The lab as a Vagrant machine, from `vagrant up` to `vagrant destroy`, on a private host.

Everything runs in one sandbox with its own libvirtd, network and Vagrant home; the box comes from
the real cache. The tests of this module share one machine, and the last one takes it down.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running_lab import LABS

from virtfabric.shim.cache import cache_root
from virtfabric.shim.lab import health
from virtfabric.shim.lab.place import LabError
from virtfabric.shim.sandbox import Sandbox
from virtfabric.shim.sandbox_process import SandboxError, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

VAGRANT = Path(__file__).resolve().parents[2] / "vagrant"
GUESTS = {"batch": 10, "web": 50, "database": 90}
EXTRA_CONFIG = "/etc/virtfabric/test.toml"
BUILD_S = 900  # with an empty cache
UP_S = 1500  # until the agent is active and three guests run; a busy machine took 410 s

pytestmark = pytest.mark.timeout(BUILD_S + UP_S + 300)


@dataclass(frozen=True)
class Machine:
    """One Vagrant environment in a sandbox."""

    box: Sandbox
    home: Path
    name: str = "vagrant"

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

    def unit(self, *properties: str) -> dict[str, str]:
        """What systemd says of the agent's unit."""
        wanted = ",".join(properties)
        shown = self.ssh(f"systemctl show virtfabricd --property {wanted}")
        return dict(line.split("=", 1) for line in shown.splitlines())

    def running(self) -> set[str]:
        """The guests that run in the machine."""
        return set(self.ssh("sudo virsh -q list --name --state-running").split())

    def run(
        self, command: str, *, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Root's shell in the machine."""
        line = f"sudo bash -c {shlex.quote(command)}"
        try:
            return self.vagrant("ssh", "-c", line, timeout_s=timeout_s or 300, check=False)
        except SandboxError as error:
            raise LabError(str(error)) from error

    def find_faults(self) -> list[str]:
        """What has hung or fallen over in it by no doing of what runs there."""
        return health.find_faults(self)

    def tell(self) -> str:
        """What the agent and the guests there say: to read beside a failure."""
        looks = (
            "journalctl -u virtfabricd -n 60 --no-pager", "virsh list --all",
            "tail -n 5 /var/log/libvirt/qemu/*.log",
        )  # fmt: skip
        try:
            return self.run("; ".join(f"echo '# {look}'; {look} 2>&1" for look in looks)).stdout
        except LabError as error:
            return str(error)

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
        LABS.append(machine)
        try:
            yield machine
        finally:
            LABS.remove(machine)


def test_systemd_runs_the_shipped_unit(machine: Machine) -> None:
    shown = machine.unit("FragmentPath", "NRestarts", "Type", "ActiveState")
    assert shown == {
        "FragmentPath": "/usr/lib/systemd/system/virtfabricd.service",
        "NRestarts": "0", "Type": "notify", "ActiveState": "active",
    }  # fmt: skip
    status = machine.json("sudo virtfabric status --json")
    assert status["alerts"] == []
    assert sorted(guest["name"] for guest in status["guests"]) == sorted(GUESTS)


def test_the_host_is_the_topologys(machine: Machine) -> None:
    said = machine.ssh("lscpu")
    shape = {key: value.strip() for key, _, value in (x.partition(":") for x in said.splitlines())}
    assert (shape["Socket(s)"], shape["Core(s) per socket"], shape["Thread(s) per core"]) == (
        "2", "2", "2",
    )  # fmt: skip
    assert shape["NUMA node1 CPU(s)"] == "4-7"
    assert "82576" in machine.ssh("lspci"), "the igb NIC"
    clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert machine.ssh(f"cat {clock}") == "tsc", "the HPET makes a machine many times slower"


def test_three_guests_run_and_are_managed(machine: Machine) -> None:
    assert machine.running() == set(GUESTS)
    for name in GUESTS:
        assert machine.ssh(f"sudo virsh dumpxml {name} | head -1").startswith("<domain type='kvm'")
        console = f"/var/log/libvirt/qemu/{name}-console.log"
        machine.ssh(
            f"sudo timeout 240 sh -c 'tail -n +1 -F {console} 2> /dev/null | grep -q -m 1 VFREADY'",
            timeout_s=300,
        )
    listed = machine.json("sudo virtfabric guests --json")
    assert {guest["name"]: guest["priority"] for guest in listed} == GUESTS


def test_the_agent_moves_cpu_between_them(machine: Machine) -> None:
    def quota() -> list[str]:
        return re.findall(
            r"global_quota\s*:\s*(-?\d+)", machine.ssh("sudo virsh schedinfo database")
        )

    before = quota()
    machine.ssh("sudo virtfabric allocate database --cpu +200m", timeout_s=180)
    assert quota() != before


def test_the_doctor_finds_nothing(machine: Machine) -> None:
    found = machine.json("sudo virtfabric doctor --json")
    assert found["healthy"] is True
    assert [check for check in found["checks"] if check["verdict"] != "ok"] == []


def test_reload_takes_a_new_configuration_over(machine: Machine) -> None:
    before = machine.unit("MainPID")
    text = r'[capacity]\nmemory = "2GiB"\nreserve = "64MiB"\n'
    machine.ssh(f"printf '{text}' | sudo tee {EXTRA_CONFIG} && sudo systemctl reload virtfabricd")

    def capacity() -> Any:
        return machine.json("sudo virtfabric host --json")["capacity"]["memory"]

    # the signal is sent when `reload` returns, not yet served
    wait_until(lambda: capacity() == (2048 - 64) << 20, "it is taken over", timeout_s=180)
    assert machine.unit("MainPID") == before


def test_a_vf_comes_to_a_guest_by_the_shipped_unit(machine: Machine) -> None:
    """What its sandbox leaves it is enough to make, set, bind and give a function."""
    pf = machine.ssh("lspci -D -d 8086:10c9").split()[0]
    text = rf"""
[[device]]
capability = "net.vf"
match = {{ pf = "{pf}" }}
vf_count = 1
vf = {{ trust = true, spoofchk = false }}
"""
    machine.ssh(
        f"printf '{text}' | sudo tee {EXTRA_CONFIG} > /dev/null && "
        "sudo systemctl reload virtfabricd"
    )

    def members() -> list[Any]:
        shown = machine.json("sudo virtfabric devices --json")
        return [one for one in shown if one["capability"] == "net.vf"]

    wait_until(lambda: len(members()) == 1, "the VF is made", timeout_s=180)
    answer = machine.json("sudo virtfabric allocate web --device net.vf --json")
    (given,) = members()
    assert given["holder"] == "web"
    driver = machine.ssh(f"readlink /sys/bus/pci/devices/{given['address']}/driver")
    assert driver.endswith("/vfio-pci")
    assert "<hostdev" in machine.ssh("sudo virsh dumpxml web")
    interface = machine.ssh(f"ls /sys/bus/pci/devices/{pf}/net")
    (shown,) = machine.json(f"ip -j link show dev {interface}")
    (vf,) = shown["vfinfo_list"]
    assert (vf["trust"], vf["spoofchk"]) == (True, False)
    machine.ssh(f"sudo virtfabric release {answer['result']['grant']}", timeout_s=300)
    (home,) = members()
    assert home["holder"] is None


def test_restart_leaves_guests_and_their_policies(machine: Machine) -> None:
    qemus = machine.ssh("pgrep -f ^/usr/bin/qemu-system-x86_64.*guest=").split()
    assert len(qemus) == len(GUESTS)
    before = machine.unit("MainPID")
    machine.ssh(f"sudo rm -f {EXTRA_CONFIG} && sudo systemctl restart virtfabricd")
    after = machine.unit("MainPID", "ActiveState", "NRestarts")
    assert (after["ActiveState"], after["NRestarts"]) == ("active", "0")
    assert after["MainPID"] != before["MainPID"]
    assert machine.ssh("pgrep -f ^/usr/bin/qemu-system-x86_64.*guest=").split() == qemus
    listed = machine.json("sudo virtfabric guests --json")
    assert {guest["name"]: guest["priority"] for guest in listed} == GUESTS


def test_stop_is_clean_and_leaves_the_guests(machine: Machine) -> None:
    machine.ssh("sudo systemctl stop virtfabricd")
    shown = machine.unit("ActiveState", "Result", "ExecMainStatus")
    assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    machine.ssh("sudo virtfabric status", code=4)  # the agent does not answer
    assert machine.running() == set(GUESTS)


def test_destroy_leaves_nothing(machine: Machine) -> None:
    assert machine.virsh("list", "--all", "--name") == ["virtfabric-lab-small"]
    machine.vagrant("destroy", "-f")
    for listing in ("list", "pool-list", "net-list"):
        assert machine.virsh(listing, "--all", "--name") == [], listing
    assert not machine.box.path("/var/lib/libvirt/virtfabric-lab").exists()
    assert list((machine.home / "machine").rglob("*.json")) == []
    assert machine.box.run(["pgrep", "-a", "qemu-system"], check=False).stdout == ""
