"""A real polkitd on the private bus: its rules say who may; where none runs, the group does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from lab_host import CAPACITY, Guest, LabHost, checker

from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Iterator

POLKITD = "/usr/lib/polkit-1/polkitd"
NAME = "org.freedesktop.PolicyKit1"
GUEST = Guest(name="database", priority=90, cpu="300m:700m", virtio_mem=None)
# user name: uid, which is the gid also; the last is in the configured group
USERS = {"alice": 61001, "mallory": 61002, "operator": 61003}
RULES = """\
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.virtfabric1.") == 0 && subject.user == "alice") {
        return polkit.Result.YES;
    }
});
"""
# The interpreter of a test run may lie where nobody else can read: load first, then drop root.
AS_USER = """
import os, sys
from virtfabric.cli import main
main.build_parser()
uid = int(sys.argv[1])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfpol{os.getpid()}", tmp_path_factory.mktemp("polkit") / "lab") as lab:
        with lab.box.path("/etc/passwd").open("a") as users:
            users.writelines(f"{n}:x:{u}:{u}::/:/usr/sbin/nologin\n" for n, u in USERS.items())
        lab.config(capacity=CAPACITY, access={"group": str(USERS["operator"])})
        lab.start_agent()
        lab.start_guests(GUEST, ready=False)
        lab.settle()
        yield lab


@pytest.fixture(scope="module")
def polkitd(host: LabHost) -> Iterator[subprocess.Popen[str]]:
    """polkitd with the actions as `virtfabric install` ships them, and one rule."""
    shipped = host.root / "vendor/usr/share/polkit-1/actions"
    # /usr is the machine's own: the mount exists in the sandbox's mount namespace only
    host.box.run(["mount", "--bind", str(shipped), "/usr/share/polkit-1/actions"])
    host.box.path("/etc/polkit-1/rules.d/10-alice.rules").write_text(RULES)
    with (host.root / "polkitd.log").open("w") as log:
        daemon = host.box.popen([POLKITD], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    host.wait(lambda: owns_name(host), "polkitd has its name on the bus")
    yield daemon
    daemon.kill()
    daemon.wait()


def owns_name(host: LabHost) -> bool:
    bus = "org.freedesktop.DBus"
    ask = ["dbus-send", "--system", "--print-reply=literal", f"--dest={bus}", "/"]
    done = host.box.run([*ask, f"{bus}.NameHasOwner", f"string:{NAME}"])
    return "true" in done.stdout


def run_as(host: LabHost, user: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`virtfabric WORDS` as that user."""
    command = [sys.executable, "-c", AS_USER, str(USERS[user]), *words]
    return host.box.run(command, check=False, env=host.env)


def expect_denied(host: LabHost, user: str, *words: str, action: str) -> None:
    """Exit code 3, the action named, an audit record, and nothing changed."""
    before = host.observe("database").settings
    known = len(host.cli_json("audit", "--subject", f"uid:{USERS[user]}"))
    done = run_as(host, user, *words)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "refused (not-allowed)" in done.stderr
    assert f"the polkit action org.virtfabric1.{action}" in done.stderr
    record = host.cli_json("audit", "--subject", f"uid:{USERS[user]}")[known:][-1]
    assert record["kind"] == "access.denied"
    assert record["body"]["who"] == user
    assert record["body"]["action"] == f"org.virtfabric1.{action}"
    assert host.observe("database").settings == before


def expect_allowed(host: LabHost, user: str) -> None:
    """It changes what the guest has."""
    quota = host.observe("database").quota
    assert quota is not None
    for change, then in (("-100m", quota - 100), ("+100m", quota)):
        done = run_as(host, user, "allocate", "database", "--cpu", change)
        assert done.returncode == 0, done.stdout + done.stderr
        assert checker.expect_quota(host.observe("database"), then)[0]


def test_where_it_runs_its_rules_decide(host: LabHost, polkitd: subprocess.Popen[str]) -> None:
    """And they alone: the group that is set in the configuration gives nothing then."""
    expect_allowed(host, "alice")
    assert run_as(host, "alice", "audit").returncode == 0
    expect_denied(host, "mallory", "allocate", "database", "--cpu", "-100m", action="allocate")
    expect_denied(host, "mallory", "audit", action="audit")
    expect_denied(host, "operator", "allocate", "database", "--cpu", "-100m", action="allocate")
    assert run_as(host, "mallory", "status").returncode == 0, "anybody may read"
    assert polkitd.poll() is None


def test_no_answer_is_a_no(host: LabHost, polkitd: subprocess.Popen[str]) -> None:
    """One that hangs is not one that is absent."""
    polkitd.send_signal(signal.SIGSTOP)
    try:
        expect_denied(host, "operator", "allocate", "database", "--cpu", "-100m", action="allocate")
    finally:
        polkitd.send_signal(signal.SIGCONT)


def test_where_it_does_not_run_the_group_decides(
    host: LabHost, polkitd: subprocess.Popen[str]
) -> None:
    polkitd.terminate()
    polkitd.wait(allow(10))
    host.wait(lambda: not owns_name(host), "its name is free")
    expect_allowed(host, "operator")
    expect_denied(host, "alice", "allocate", "database", "--cpu", "-100m", action="allocate")
    assert host.cli("allocate", "database", "--cpu", "-100m").returncode == 0, "root always may"
