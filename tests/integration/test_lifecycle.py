"""Guests that come, go, sleep and wake beside the agent, and the agent's own coming and going."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab_host import Guest, LabHost, checker

from demo.host import AGENT, CONFIG
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo.checker import Observation

MIB = checker.MIB
ALL = frozenset({0, 1})
FAULT_AGENT = Path(__file__).with_name("fault_agent.py")
HOOK = "/etc/libvirt/hooks/qemu.d/50-virtfabric"
BATCH = Guest(
    name="batch", priority=10, cpu="200m:900m", max_vcpus=1, virtio_mem=384, plugged=384
)  # fmt: skip
# Each starts with its limit of CPU, and 100m are left: nobody's start changes anybody else.
WEB = Guest(name="web", priority=50, cpu="300m:300m", virtio_mem=128, plugged=64)
DATABASE = Guest(name="database", priority=90, cpu="500m:700m", virtio_mem=512, plugged=64)


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vflife{os.getpid()}", tmp_path_factory.mktemp("life") / "lab") as lab:
        lab.start_agent()
        lab.start_guests(BATCH, DATABASE)
        lab.settle()
        yield lab


def find(host: LabHost, name: str) -> dict[str, Any]:
    return next(g for g in host.cli_json("guests") if g["name"] == name)


def stop_guest(host: LabHost, name: str) -> None:
    """Ends a guest and forgets it."""
    host.virsh("destroy", name, check=False)
    host.virsh("undefine", name, check=False)
    host.guests.pop(name, None)


@pytest.fixture
def with_web(host: LabHost) -> None:
    """It runs since the first test, unless that passed in another lab, which failed."""
    if "web" not in host.guests:
        host.start_guests(WEB)
        host.settle()


def test_agent_stops_cleanly_and_finds_what_started_meanwhile(host: LabHost) -> None:
    before = host.observe_all()
    assert host.kill_agent(signal.SIGTERM) == 0
    host.define(WEB)
    assert host.start_guest("web").returncode == 0, "no agent, lax admission: it may start"
    host.wait_ready("web")
    seen = host.observe("web")
    assert seen.quota is None, "nobody has capped it yet"
    assert {n: o.settings for n, o in host.observe_all().items() if n in before} == {
        n: o.settings for n, o in before.items()
    }, "an agent that stops leaves everything as it is"
    host.virsh("vcpupin", "web", "0", "1", "--live")
    host.start_agent()
    host.settle()
    seen = host.expect(
        lambda now: [
            checker.expect_quota(now["web"], 300),
            checker.expect_affinity(now["web"], ALL),
        ]
    )["web"]
    assert find(host, "web")["cpu"]["grant"] == 300
    assert "a hook ran while the agent was away: started web" in host.read_agent_log()


def test_strict_guest_does_not_start_without_agent(host: LabHost) -> None:
    host.kill_agent(signal.SIGTERM)
    strict = Guest(name="careful", admission="strict", virtio_mem=None, memory=96)
    host.define(strict)
    try:
        done = host.start_guest("careful")
        assert done.returncode != 0
        assert "the agent does not answer" in done.stderr
    finally:
        stop_guest(host, "careful")
        host.start_agent()
        host.settle()


@pytest.mark.usefixtures("with_web")
def test_hook_is_answered_while_memory_moves(host: LabHost) -> None:
    """The move stands still for as long as it likes; libvirt is not kept waiting."""
    marker = host.root / "held"
    host.kill_agent(signal.SIGTERM)
    fault = f"hold:resize-virtio-mem:after-apply:{marker}"
    host.agent_command = (sys.executable, str(FAULT_AGENT), fault)
    host.start_agent()
    host.settle()
    before = host.observe_all(fresh=True)
    client = host.start_cli("allocate", "database", "--memory", "+96M")
    try:
        host.wait(marker.exists, "memory moves")
        for name, words in (("batch", "prepare begin -"), ("web", "started begin -")):
            xml = host.virsh("dumpxml", name).stdout
            host.box.path("/run/guest.xml").write_text(xml)
            clock = "date +%s%N"
            line = f"a=$({clock}); {HOOK} {name} {words} < /run/guest.xml; r=$?; b=$({clock})"
            done = host.box.run(["sh", "-c", f"{line}; echo $r $(((b - a) / 1000000))"])
            code, took_ms = map(int, done.stdout.split())
            assert code == 0, done.stderr
            assert took_ms < allow(1000), words
        assert host.cli("status").returncode == 0, "nor are readers"
    finally:
        marker.unlink(missing_ok=True)
        client.communicate(timeout=allow(60))
    assert client.returncode == 0
    host.kill_agent(signal.SIGTERM)
    host.agent_command = AGENT
    host.start_agent()
    (grant,) = host.cli_json("grants")
    assert host.cli("release", grant["id"]).returncode == 0
    host.expect_same(before)


def test_start_is_refused_when_its_floor_does_not_fit(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    host.define(Guest(name="huge", memory=1500, virtio_mem=None, reserve=1500, priority=100))
    try:
        done = host.start_guest("huge")
        assert done.returncode != 0
        line = next(part for part in done.stderr.splitlines() if "virtfabric" in part)
        assert "huge" in line
        assert "memory" in line
        assert "cannot start" in line
    finally:
        stop_guest(host, "huge")
    host.expect_same(before)


BROKEN = Guest(name="broken", priority=50, virtio_mem=None, memory=96, shares=0)


def test_invalid_policy_strict(host: LabHost) -> None:
    host.define(replace(BROKEN, admission="strict"))
    try:
        done = host.start_guest("broken")
        assert done.returncode != 0
        assert "invalid virtfabric policy" in done.stderr
        assert "shares" in done.stderr
    finally:
        stop_guest(host, "broken")


def test_invalid_policy_lax(host: LabHost) -> None:
    host.define(BROKEN)
    try:
        assert host.start_guest("broken").returncode == 0
        host.wait(lambda: any("broken" in a for a in host.cli_json("status")["alerts"]), "alert")
        seen = host.observe("broken")
        assert seen.quota is None
        guest = find(host, "broken")
        assert not guest["managed"]
        assert "shares" in guest["policy_error"]
        done = host.cli("allocate", "broken", "--cpu", "+100m")
        assert done.returncode == 3
        assert "unmanaged-guest" in done.stderr
    finally:
        stop_guest(host, "broken")


@pytest.mark.usefixtures("with_web")
def test_suspend_and_resume(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    host.virsh("suspend", "web")
    host.wait(lambda: find(host, "web")["state"] == "paused", "the pause is known")
    assert find(host, "web")["cpu"]["grant"] == 300, "a paused guest keeps what it holds"
    host.virsh("resume", "web")
    host.wait(lambda: find(host, "web")["state"] == "running", "the resume is known")
    host.expect_same(before)


@pytest.mark.usefixtures("with_web")
def test_save_and_restore(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    host.virsh("save", "web", "/run/web.save")
    host.wait(lambda: not find(host, "web")["cpu"]["grant"], "it holds nothing while away")
    host.console("web").write_text("")
    host.virsh("restore", "/run/web.save")
    host.wait_ready("web")
    host.settle()

    def judge(seen: dict[str, Observation]) -> list[checker.Finding]:
        found = [checker.expect_same(seen[n], before[n]) for n in ("batch", "database")]
        return [*found, checker.expect_same(replace(seen["web"], pid=before["web"].pid),
                                            before["web"])]  # fmt: skip

    host.expect(judge)
    host.box.run(["rm", "/run/web.save"])


@pytest.mark.usefixtures("with_web")
def test_rename_of_a_shut_off_guest(host: LabHost) -> None:
    host.virsh("destroy", "web")
    uuid = host.virsh("domuuid", "web").stdout.strip()
    host.virsh("domrename", "web", "shop")
    host.wait(lambda: any(g["name"] == "shop" for g in host.cli_json("guests")), "the new name")
    try:
        assert find(host, "shop")["uuid"] == uuid
        host.start_again("shop")
        host.wait(lambda: find(host, "shop")["cpu"]["grant"] == 300, "it is placed")
        host.wait(
            lambda: checker.observe(host.place, "shop", host.console("web")).quota == 300, "capped"
        )
        assert not any(g["name"] == "web" for g in host.cli_json("guests"))
    finally:
        host.virsh("destroy", "shop", check=False)
        host.virsh("undefine", "shop")
        host.guests.pop("web")


def test_reload(host: LabHost) -> None:
    """A wrong file changes nothing; a right one is taken over, and guests stay as they are."""
    assert host.agent is not None
    before = host.observe_all(fresh=True)
    known = host.cli_json("host")["capacity"]
    host.box.path(CONFIG).write_text("[capacity]\nmemory = 'lots'\n")
    host.agent.send_signal(signal.SIGHUP)
    host.wait(lambda: "configuration not taken over" in host.read_agent_log(), "it is told")
    assert "capacity.memory" in host.read_agent_log(3)
    assert host.cli_json("host")["capacity"] == known
    host.config(capacity={"memory": "1100M"})
    host.agent.send_signal(signal.SIGHUP)
    host.wait(lambda: host.cli_json("host")["capacity"] != known, "the new one is taken over")
    assert host.cli_json("host")["capacity"]["memory"] == (1100 - 16) * MIB, (
        "the reserve is not granted"
    )
    host.expect_same(before)
    assert host.kill_agent(signal.SIGTERM) == 0


def test_nothing_remains(host: LabHost) -> None:
    """The last of this file: no cgroup, mount, process or socket survives the host."""
    group, root = f"virtfabric-{host.box.name}", str(host.box.root)
    pids = {host.box.pid, host.box.libvirt_pid, *(host.observe(n).pid for n in host.guests)}
    assert any(p.is_dir() for p in Path("/sys/fs/cgroup").rglob(group))
    host.stop()
    assert not list(Path("/sys/fs/cgroup").rglob(group))
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert root not in Path("/proc/self/mountinfo").read_text()
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _readable(p)]
    assert not [c for c in commands if root.encode() in c]


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
