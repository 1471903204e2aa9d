"""The real agent, libvirtd and guests, cut off at the worst moments; judged from the kernel.

One private host serves the module. Each test leaves it as it found it: no grants, a normal agent.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab_host import DATABASE, Guest, LabHost, checker

from demo.host import AGENT
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from demo.checker import Observation

Seen = dict[str, "Observation"]

FAULT_AGENT = Path(__file__).with_name("fault_agent.py")
PHASES = ("before-apply", "after-apply", "after-verify")
DONE, FAILED, REFUSED, UNREACHABLE = 0, 1, 3, 4
STATE = "/var/lib/virtfabric"
BATCH = Guest(
    name="batch", priority=10, cpu="200m:900m", max_vcpus=1, virtio_mem=384, plugged=384
)  # fmt: skip
WEB = Guest(name="web", priority=50, cpu="300m:300m", virtio_mem=128, plugged=64)


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vffaults{os.getpid()}", tmp_path_factory.mktemp("faults") / "lab") as lab:
        lab.start_agent()
        lab.start_guests(BATCH, WEB, DATABASE)
        lab.settle()
        yield lab


@pytest.fixture(autouse=True)
def normal_agent(host: LabHost) -> Iterator[None]:
    """Whatever a test did: the next one finds a normal agent and no grants."""
    yield
    if host.agent is not None and host.agent_command != AGENT:
        host.kill_agent()
    host.agent_command = AGENT
    if host.agent is None or host.agent.poll() is not None:
        host.start_agent()
    for grant in host.cli_json("grants"):
        host.cli("release", grant["id"])


def start_faulty(host: LabHost, fault: str, *, wait: bool = True) -> None:
    """Replaces the running agent by one with a fault."""
    if host.agent is not None:
        host.kill_agent(signal.SIGTERM)
    host.agent_command = (sys.executable, str(FAULT_AGENT), fault)
    host.start_agent(wait=wait)


def start_normal(host: LabHost) -> None:
    """Replaces what runs by a normal agent."""
    if host.agent is not None:
        host.kill_agent(signal.SIGTERM)
    host.agent_command = AGENT
    host.start_agent()


def await_suicide(host: LabHost) -> None:
    """The agent has to end by its own SIGKILL."""
    assert host.agent is not None
    assert host.agent.wait(allow(60)) == -signal.SIGKILL, host.read_agent_log()
    host.agent = None


def recover_only(host: LabHost) -> None:
    """Lets an agent recover and do nothing else, so that no placement hides a bad undo."""
    start_faulty(host, "recover-only", wait=False)
    await_suicide(host)


def count_open(host: LabHost) -> int:
    """Transactions that the journal has as open, read beside the agent."""
    # SQLite resolves the links of /proc/PID/root by itself, wrongly: so by the bind's source.
    path = host.box.root / "lib-virtfabric" / "journal.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
        (count,) = journal.execute("SELECT count(*) FROM txn WHERE state = 'open'").fetchone()
    return int(count)


def audit_kinds(host: LabHost) -> list[str]:
    return [record["kind"] for record in host.cli_json("audit")]


@contextmanager
def held(host: LabHost, step: str, phase: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command under way, whose plan stands still at a phase of a step until the block ends."""
    marker = host.root / "held"
    start_faulty(host, f"hold:{step}:{phase}:{marker}")
    client = host.start_cli(*words)
    try:
        host.wait(marker.exists, f"the plan reaches {step} {phase}")
        yield client
    finally:
        marker.unlink(missing_ok=True)


def end(client: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all that a command said."""
    out, err = client.communicate(timeout=allow(90))
    return client.returncode, out + err


def read_marks(host: LabHost) -> dict[str, list[str]]:
    """By guest: the pins in its live XML that are marked as the agent's."""
    return {
        name: re.findall(r"<placement:(?:pin|emulator) [^>]*>", host.virsh("dumpxml", name).stdout)
        for name in host.guests
    }


# -- SIGKILL at each phase of each step type ------------------------------------------------------

# What makes a plan with such a step.
KILLS: dict[str, tuple[str, ...]] = {
    "resize-virtio-mem": ("allocate", "database", "--memory", "+96M"),
    "set-quota": ("allocate", "database", "--cpu", "+200m"),
    "pin-vcpu": ("policy", "set", "database", "--placement", "dedicated"),
    "set-shares": ("policy", "set", "web", "--shares", "200"),
    "set-policy": ("policy", "set", "web", "--shares", "200", "--priority", "55"),
    "pin-emulator": ("drift", "--repair"),
    "mark-pins": ("policy", "set", "database", "--placement", "dedicated"),
}


def read_policies(host: LabHost) -> dict[tuple[str, str], str]:
    """The metadata of every guest, in both of its definitions."""
    return {
        (name, which): host.virsh("metadata", name, "urn:virtfabric:policy:1", which).stdout
        for name in host.guests
        for which in ("--live", "--config")
    }


@pytest.mark.parametrize("kind", KILLS)
def test_killed_agent_leaves_all_as_before(host: LabHost, kind: str) -> None:
    command = KILLS[kind]
    if kind == "mark-pins":
        # every pCPU is libvirt's default and no pin of ours, until an undo has set it: said before,
        # it is in the marks from the beginning, and no start has anything to mark
        start_normal(host)
        for name in host.guests:
            host.virsh("vcpupin", name, "0", "0-1", "--live")
        start_normal(host)
    policies = read_policies(host)
    recovered = audit_kinds(host).count("plan.recovered")
    for phase in PHASES:
        start_faulty(host, f"kill:{kind}:{phase}")
        if kind == "pin-emulator":
            host.virsh("emulatorpin", "web", "0-1", "--live")
        before, marks = host.observe_all(fresh=True), read_marks(host)
        done = host.cli(*command)
        assert done.returncode == UNREACHABLE, (phase, done.stdout, done.stderr)
        await_suicide(host)
        assert count_open(host) == 1, phase
        recover_only(host)
        assert count_open(host) == 0, phase
        host.expect_same(before)
        assert read_marks(host) == marks, phase
        assert read_policies(host) == policies, phase
        if kind == "pin-emulator":  # an agent that starts places everyone, and would die of it
            host.virsh("emulatorpin", "web", "0", "--live")
    start_normal(host)
    assert audit_kinds(host).count("plan.recovered") == recovered + len(PHASES)
    story = host.cli(
        "explain", "web" if kind in ("set-shares", "set-policy", "pin-emulator") else "database"
    )
    assert "undone, because the agent was cut off in mid-plan" in story.stdout
    assert host.cli_json("grants") == host.cli_json("loans") == []
    host.wait(lambda: host.cli_json("drift") == [], "nothing differs from the books")
    assert read_policies(host) == policies


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_a_plug_leaves_a_residue_at_most(host: LabHost, phase: str) -> None:
    """Where a vCPU does not leave again (TCG), its time is taken back, and it is shown."""
    start_faulty(host, f"kill:set-vcpu-count:{phase}")
    before = host.observe_all(fresh=True)
    done = host.cli("allocate", "database", "--cpu", "+500m")
    assert done.returncode == UNREACHABLE, done.stdout + done.stderr
    await_suicide(host)
    recover_only(host)
    assert count_open(host) == 0
    surplus = int(phase != "before-apply" and not host.unplugs)

    def judge(seen: Seen) -> list[checker.Finding]:
        now, then = seen["database"], before["database"]
        without = replace(
            now, affinity={0: now.affinity[0]}, cpuset={0: now.cpuset[0]},
            vcpus=now.vcpus - surplus, report=then.report,
        )  # fmt: skip
        others = [checker.expect_same(seen[n], before[n]) for n in ("batch", "web")]
        return [checker.expect_same(without, then), *others]

    seen = host.expect(judge)
    assert len(seen["database"].affinity) == 1 + surplus
    start_normal(host)
    guests = {g["name"]: g for g in host.cli_json("guests")}
    residues = [r for r in guests["database"]["residues"] if r["what"] == "vcpu"]
    assert [r["amount"] for r in residues] == [1000] * surplus
    assert guests["database"]["cpu"]["grant"] == seen["database"].quota
    assert host.cli_json("drift") == []
    if surplus:
        restart_guest(host, "database")


def restart_guest(host: LabHost, name: str) -> None:
    """A fresh start, with the vCPUs of its definition."""
    host.virsh("destroy", name)
    host.console(name).write_text("")
    host.start_again(name, timeout_s=60)
    host.wait_ready(name)
    host.settle(name)


# -- libvirtd and guests that go away -------------------------------------------------------------


def test_libvirtd_killed_in_mid_plan(host: LabHost) -> None:
    words = ("allocate", "database", "--memory", "+96M")
    with held(host, "resize-virtio-mem", "after-apply", *words) as client:
        before = {n: o for n, o in host.observe_all().items() if n != "batch"}
        batch = host.observe("batch")
        assert batch.requested < 384 * checker.MIB, "batch has not paid yet"
        host.box.kill_libvirtd()
    code, said = end(client)
    assert code == FAILED, said
    host.box.start_libvirtd()

    def judge(seen: Seen) -> list[checker.Finding]:
        same = [checker.expect_same(seen[n], before[n]) for n in before]
        return [*same, checker.expect_plugged(seen["batch"], 384 * checker.MIB)]

    host.expect(judge, timeout_s=40)
    host.wait(lambda: count_open(host) == 0, "the transaction is closed", timeout_s=40)
    assert host.agent is not None
    assert host.agent.poll() is None
    host.agent_command = AGENT
    start_normal(host)
    done = host.cli(*words)
    assert done.returncode == DONE, done.stderr
    host.expect(lambda seen: [checker.expect_plugged(seen["database"], 160 * checker.MIB)])


def test_guest_destroyed_in_mid_plan(host: LabHost) -> None:
    words = ("allocate", "database", "--memory", "+96M", "--cpu", "+200m")
    alive = [name for name in host.guests if name != "batch"]
    before = {name: host.observe(name, fresh=True) for name in alive}
    with held(host, "set-quota", "after-apply", *words) as client:
        host.virsh("destroy", "batch")
    code, said = end(client)
    assert code == FAILED, said

    def restored() -> bool:
        found = [checker.expect_same(host.observe(n), before[n]) for n in alive]
        return all(ok for ok, _ in found)

    host.wait(restored, "the others are as before")
    assert host.agent is not None
    assert host.agent.poll() is None
    assert host.cli_json("grants") == []
    host.wait(lambda: count_open(host) == 0, "the transaction is closed")
    start_normal(host)  # the other one would stand still again when it places batch
    host.console("batch").write_text("")
    host.start_again("batch")
    host.wait_ready("batch")
    host.settle()


@contextmanager
def throttled(host: LabHost, name: str) -> Iterator[None]:
    """A guest with 1 % of a pCPU cannot answer for its memory in any useful time."""
    host.virsh("schedinfo", name, "--live", "--set", "vcpu_quota=1000")
    try:
        yield
    finally:
        host.virsh("schedinfo", name, "--live", "--set", "vcpu_quota=-1")


def test_guest_that_stops_short_undoes_everything(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    with throttled(host, "batch"):
        done = host.cli("allocate", "database", "--memory", "+320M", "--deadline", "2s")
    assert done.returncode == REFUSED, done.stdout + done.stderr
    assert "guest-uncooperative" in done.stderr
    host.expect_same(before)
    assert host.cli_json("grants") == []


def test_next_victim_tops_up(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    with throttled(host, "batch"):
        done = host.cli("allocate", "database", "--memory", "+96M", "--deadline", f"{allow(3):g}s")
        assert done.returncode == DONE, done.stdout + done.stderr
        loans = {loan["victim_name"]: loan["amounts"] for loan in host.cli_json("loans")}
    assert loans["web"]["memory"] > 0
    assert "plan.topped-up" in audit_kinds(host)
    mib = checker.MIB
    gone = sum(amounts["memory"] for amounts in loans.values())

    def judge(seen: Seen) -> list[checker.Finding]:
        paid = sum(before[n].current - seen[n].current for n in ("batch", "web"))
        return [
            checker.expect_plugged(seen["database"], 160 * mib),
            (abs(paid - gone) <= 2 * checker.MEMORY_TOLERANCE, f"paid {paid}, lent {gone}"),
        ]

    host.expect(judge)
    (grant,) = host.cli_json("grants")
    assert host.cli("release", grant["id"]).returncode == DONE
    host.expect_same(before)


# -- the journal ----------------------------------------------------------------------------------


def test_full_disk(host: LabHost) -> None:
    """On a file system of its own, which is filled to the last byte while the agent runs."""
    small = "/run/vf-small"
    host.kill_agent(signal.SIGTERM)
    host.box.run(["mkdir", "-p", small])
    host.box.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small])
    host.config(agent={"state_dir": small})
    try:
        host.start_agent()
        host.settle()
        before = host.observe_all(fresh=True)
        host.box.run(["sh", "-c", f"cat /dev/zero > {small}/filler"], check=False)
        done = host.cli("allocate", "database", "--memory", "+32M", "--cpu", "+100m")
        assert done.returncode == FAILED, done.stdout + done.stderr
        assert "journal" in done.stderr or "disk" in done.stderr
        assert host.agent is not None
        assert host.agent.poll() is None, host.read_agent_log()
        host.expect_same(before)
        host.box.run(["rm", f"{small}/filler"])
        done = host.cli("allocate", "database", "--memory", "+32M")
        assert done.returncode == DONE, done.stderr
        host.expect(lambda seen: [checker.expect_plugged(seen["database"], 96 * checker.MIB)])
        (grant,) = host.cli_json("grants")
        assert host.cli("release", grant["id"]).returncode == DONE
        assert host.cli("audit", "--verify").returncode == DONE
        host.expect_same(before)
    finally:
        host.kill_agent(signal.SIGTERM)
        host.box.run(["umount", small])
        host.config()


def start_and_fail(host: LabHost) -> tuple[int, str]:
    """Exit code and log of an agent that must not come up."""
    host.start_agent(wait=False)
    assert host.agent is not None
    code = host.agent.wait(allow(30))
    host.agent = None
    return code, host.read_agent_log(5)


def _overwrite_middle(data: bytes) -> bytes:
    return data[:200] + b"\xa5" * (len(data) - 400) + data[-200:]


@pytest.mark.parametrize(
    "spoil", [_overwrite_middle, lambda data: data[: len(data) // 2], lambda _: b"not a database"]
)
def test_corrupt_journal_is_not_guessed_at(host: LabHost, spoil: Any) -> None:
    if host.agent is not None:
        host.kill_agent(signal.SIGTERM)
    before = host.observe_all(fresh=True)
    journal = host.box.path(f"{STATE}/journal.db")
    whole = journal.read_bytes()
    journal.write_bytes(spoil(whole))
    try:
        code, said = start_and_fail(host)
    finally:
        journal.write_bytes(whole)
        for left in journal.parent.glob("journal.db-*"):
            left.unlink()
    assert code == FAILED
    assert "journal" in said
    assert str(STATE) in said
    assert "Traceback" not in said
    host.expect_same(before)
