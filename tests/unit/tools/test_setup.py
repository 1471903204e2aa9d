"""What tools/setup does to a machine's packages: real apt, a small archive, a status of its own.

Nothing is installed: apt-get here only simulates, and writes down what it was asked for.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.sandbox_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SETUP = Path(__file__).resolve().parents[3] / "tools" / "setup"
APT = shutil.which("apt-get")

pytestmark = pytest.mark.skipif(APT is None, reason="no apt-get here")

APT_CONF = """\
Dir::Etc "{root}/etc";
Dir::State "{root}/state";
Dir::State::status "{root}/dpkg/status";
Dir::Cache "{root}/cache";
Dir::Log "{root}/log";
APT::Architecture "amd64";
APT::Sandbox::User "";
Debug::NoLocking "true";
"""
APT_GET = """\
#!/bin/sh
case $1 in update | -s) exec {apt} "$@" ;; esac
echo "$*" >> {root}/installs
cp {root}/policy {root}/policy-then
[ -z "$HOLD" ] || { : > "$HOLD.reached"; while [ ! -e "$HOLD.released" ]; do sleep 0.05; done; }
"""


def entry(name: str, version: str, *, depends: str = "", installed: bool = False) -> str:
    lines = [
        f"Package: {name}", f"Version: {version}", "Architecture: amd64", "Description: x",
        "Maintainer: x <x@example.org>",
    ]  # fmt: skip
    lines += [f"Depends: {depends}"] if depends else []
    lines += (
        ["Status: install ok installed"]
        if installed
        else [f"Filename: ./{name}_{version}.deb", "Size: 1", "SHA256: " + "0" * 64]
    )
    return "\n".join(lines) + "\n\n"


@dataclass
class Machine:
    """A machine's packages below a directory."""

    root: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            # a shell cannot trap what it was started with as ignored, such as by nohup
            ["env", "--default-signal", "bash", "-c", f"source {SETUP}; {script}"],
            env={
                "PATH": f"{self.root}/bin:{os.environ['PATH']}",
                "APT_CONFIG": f"{self.root}/apt.conf",
                "DPKG_ADMINDIR": f"{self.root}/dpkg",
                "TMPDIR": f"{self.root}/tmp",
                "SETUP_POLICY": str(self.policy),
                "SETUP_LOCK": f"{self.root}/lock",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Ends what a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, script: str) -> tuple[int, str]:
        process = self.start(script)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    @property
    def installs(self) -> list[str]:
        """The last words of each installation: what apt-get was told to install."""
        file = self.root / "installs"
        return [line.split("--no-remove ")[-1] for line in _lines(file)]


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """libvirt 1 and a language 1 are installed; the archive has 2 of them, and what needs that."""
    for name in ("bin", "etc", "state/lists/partial", "cache/archives/partial", "dpkg/info",
                 "dpkg/updates", "archive", "tmp", "log"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(APT_CONF.format(root=tmp_path))
    (tmp_path / "etc/sources.list").write_text(f"deb [trusted=yes] file:{tmp_path}/archive ./\n")
    program = tmp_path / "bin/apt-get"
    program.write_text(APT_GET.replace("{root}", str(tmp_path)).replace("{apt}", str(APT)))
    program.chmod(0o755)
    (tmp_path / "dpkg/status").write_text(
        entry("libvirt0", "1", installed=True)
        + entry("libvirt-daemon", "1", depends="libvirt0 (= 1)", installed=True)
        + entry("language", "1", installed=True)
    )
    (tmp_path / "archive/Packages").write_text(
        entry("libvirt0", "2")
        + entry("libvirt-daemon", "2", depends="libvirt0 (= 2)")
        + entry("libvirt-dev", "2", depends="libvirt0 (= 2)")
        + entry("language", "2")
        + entry("language-dev", "2", depends="language (= 2)")
        + entry("git", "2")
    )
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


def test_what_is_missing_is_installed_and_no_daemon_is_started(machine: Machine) -> None:
    code, said = machine.run("packages language git; echo then")
    assert (code, machine.installs) == (0, ["git"]), said
    assert "exit 101" in (machine.root / "policy-then").read_text().splitlines()
    assert not machine.policy.exists()
    assert said.splitlines()[-1] == "then"
    assert list((machine.root / "tmp").iterdir()) == []


def test_libvirt_is_not_upgraded_for_what_depends_on_it(machine: Machine) -> None:
    code, said = machine.run("packages libvirt-dev")
    assert (code, machine.installs) == (1, []), said
    assert "libvirt0 (1, would be 2)" in said
    assert "libvirt-daemon (1, would be 2)" in said
    advice = next(line for line in said.splitlines() if "--only-upgrade" in line)
    assert sorted(advice.split()[-2:]) == ["libvirt-daemon", "libvirt0"]
    assert not machine.policy.exists()


def test_the_dev_package_of_the_installed_libvirt_is_taken_if_apt_has_it(machine: Machine) -> None:
    with (machine.root / "archive/Packages").open("a") as archive:
        archive.write(entry("libvirt-dev", "1", depends="libvirt0 (= 1)"))
    code, said = machine.run("packages git libvirt-dev")
    assert (code, machine.installs) == (0, ["git libvirt-dev=1"]), said


def test_where_there_is_no_libvirt_apts_own_is_taken(machine: Machine) -> None:
    (machine.root / "dpkg/status").write_text("")
    code, said = machine.run("packages libvirt-dev")
    assert (code, machine.installs) == (0, ["libvirt-dev"]), said


def test_of_others_is_said_what_is_upgraded(machine: Machine) -> None:
    code, said = machine.run("packages language-dev")
    assert (code, machine.installs) == (0, ["language-dev"]), said
    assert "language (1, would be 2)" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_setup_lets_daemons_start_again(
    machine: Machine, number: signal.Signals
) -> None:
    hold = machine.root / "hold"
    process = machine.start("packages git", HOLD=str(hold))
    wait_until(hold.with_suffix(".reached").exists, "it installs", timeout_s=60)
    assert machine.policy.exists()
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not machine.policy.exists()


def test_what_a_killed_setup_left_is_taken_away_by_the_next(machine: Machine) -> None:
    hold = machine.root / "hold"
    process = machine.start("packages git", HOLD=str(hold))
    wait_until(hold.with_suffix(".reached").exists, "it installs", timeout_s=60)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert machine.policy.exists()
    assert machine.run("packages git")[0] == 0
    assert not machine.policy.exists()


def test_a_policy_of_the_hosts_own_stays(machine: Machine) -> None:
    machine.policy.write_text("#!/bin/sh\nexit 101\n")
    assert machine.run("packages git")[0] == 0
    assert machine.policy.read_text() == "#!/bin/sh\nexit 101\n"


def test_of_two_setups_one_waits_and_says_so(machine: Machine) -> None:
    first_hold, second_hold = machine.root / "first", machine.root / "second"
    first = machine.start("take_lock; packages git", HOLD=str(first_hold))
    wait_until(first_hold.with_suffix(".reached").exists, "the first installs", timeout_s=60)
    second = machine.start("take_lock; packages git", HOLD=str(second_hold))
    assert second.stdout is not None
    assert "waiting for another tools/setup" in second.stdout.readline()
    first_hold.with_suffix(".released").touch()
    first.communicate(timeout=60)
    wait_until(second_hold.with_suffix(".reached").exists, "the second installs", timeout_s=60)
    assert machine.policy.exists(), "the first took away what the second needs"
    second_hold.with_suffix(".released").touch()
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert not machine.policy.exists()
