"""`virsh` by hand beside a running agent: each change leads to the documented reaction.

What the reactions are is in docs/operations.md, "What happens when you change things by hand".
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from lab_host import DATABASE, WEB, Guest, LabHost, checker

from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo.checker import Finding, Observation

Seen = dict[str, "Observation"]

MIB = checker.MIB
ALL = frozenset({0, 1})
PERIOD_S = 2
BATCH = Guest(
    name="batch", priority=10, cpu="200m:900m", max_vcpus=1, virtio_mem=384, plugged=384
)  # fmt: skip
# web's policy says drift=report; this one's says repair.
MENDED = replace(DATABASE, drift="repair")


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfreact{os.getpid()}", tmp_path_factory.mktemp("react") / "lab") as lab:
        lab.config(agent={"drift_interval_s": PERIOD_S})
        lab.start_agent()
        lab.start_guests(BATCH, WEB, MENDED)
        lab.settle()
        yield lab


@pytest.fixture
def same_in_the_end(host: LabHost) -> Iterator[Seen]:
    before = host.observe_all(fresh=True)
    yield before
    host.expect_same(before)


def drifts(host: LabHost, guest: str) -> dict[str, dict[str, Any]]:
    """What `virtfabric drift` shows of a guest, by what differs."""
    return {d["what"]: d for d in host.cli_json("drift") if d["name"] == guest}


def audited(host: LabHost, kind: str) -> list[dict[str, Any]]:
    return [r["body"] for r in host.cli_json("audit") if r["kind"] == kind]


def let_two_periods_pass(host: LabHost) -> None:
    """The guests speak once a second: as good as a clock, and shows that they live."""
    checker.wait_for_news([host.console("web")], lines=2 * PERIOD_S + 1)


# -- vcpupin --------------------------------------------------------------------------------------


def test_vcpupin_is_reported_and_left(host: LabHost, same_in_the_end: Seen) -> None:
    known = len(audited(host, "drift.found"))
    host.virsh("vcpupin", "web", "0", "1", "--live")
    host.wait(lambda: len(audited(host, "drift.found")) > known, "it is told", timeout_s=5)
    let_two_periods_pass(host)
    assert host.observe("web").affinity == {0: frozenset({1})}, "report means hands off"
    (found,) = drifts(host, "web").values()
    assert (found["what"], found["intended"], found["found"]) == ("vcpu 0 affinity", "0-1", "1")
    assert len(audited(host, "drift.found")) == known + 1, "told once"
    assert host.cli("drift", "--repair").returncode == 0
    host.expect(lambda seen: [checker.expect_affinity(seen["web"], ALL)])
    assert drifts(host, "web") == {}


def test_vcpupin_is_repaired_where_the_policy_says_so(host: LabHost, same_in_the_end: Seen) -> None:
    known = len(audited(host, "drift.repaired"))
    host.virsh("vcpupin", "database", "0", "1", "--live")
    took = host.wait(lambda: host.observe("database").affinity == {0: ALL}, "it is mended")
    assert took < allow(8)
    host.wait(lambda: len(audited(host, "drift.repaired")) > known, "it is told")


# -- update-memory-device -------------------------------------------------------------------------


def resize_by_hand(host: LabHost, guest: str, mib: int) -> None:
    host.virsh("update-memory-device", guest, "--live", "--requested-size", f"{mib}MiB")


def test_memory_by_hand_is_reported_and_repair_mends(host: LabHost, same_in_the_end: Seen) -> None:
    resize_by_hand(host, "web", 32)
    host.wait(lambda: "memory" in drifts(host, "web"), "it is shown")
    host.wait(lambda: any(f["what"] == "memory" for f in audited(host, "drift.found")), "told")
    let_two_periods_pass(host)
    assert host.observe("web").requested == 32 * MIB, "report means hands off"
    assert host.cli("drift", "--repair").returncode == 0
    host.expect(lambda seen: [checker.expect_plugged(seen["web"], 64 * MIB)])
    assert drifts(host, "web") == {}


def test_memory_by_hand_is_repaired_where_the_policy_says_so(
    host: LabHost, same_in_the_end: Seen
) -> None:
    known = len(audited(host, "drift.repaired"))
    resize_by_hand(host, "database", 128)
    host.wait(lambda: len(audited(host, "drift.repaired")) > known, "it is told and mended")
    host.expect(lambda seen: [checker.expect_plugged(seen["database"], 64 * MIB)])


# -- destroy and start ----------------------------------------------------------------------------


def test_destroy_sends_loans_home_and_start_admits(host: LabHost) -> None:
    before = host.observe_all(fresh=True)
    done = host.cli("allocate", "database", "--cpu", "+200m", "--memory", "+96M")
    assert done.returncode == 0, done.stderr
    lent = {loan["victim_name"] for loan in host.cli_json("loans")}
    assert lent == {"batch"}
    assert host.observe("batch").settings != before["batch"].settings
    host.virsh("destroy", "database")

    def at_home() -> bool:
        found = [checker.expect_same(host.observe(n), before[n]) for n in ("batch", "web")]
        return all(ok for ok, _ in found)

    host.wait(at_home, "what batch lent is home again")
    assert host.cli_json("loans") == host.cli_json("grants") == []
    assert {g["name"] for g in host.cli_json("guests") if g["cpu"]["grant"]} == {"batch", "web"}
    host.console("database").write_text("")
    assert host.start_guest("database").returncode == 0
    host.wait_ready("database")
    old, mib = before["database"], checker.MIB

    def placed(seen: Seen) -> list[Finding]:
        return [
            checker.expect_quota(seen["database"], old.quota),
            checker.expect_affinity(seen["database"], ALL),
            checker.expect_plugged(seen["database"], 64 * mib),
            checker.expect_same(seen["batch"], before["batch"]),
            checker.expect_same(seen["web"], before["web"]),
        ]

    host.expect(placed)


# -- setvcpus: the last, as a vCPU may not leave again (TCG) --------------------------------------


def test_setvcpus_is_reported(host: LabHost) -> None:
    """Its cap holds the guest at what it was granted, however many vCPUs somebody plugs."""
    before = host.observe_all(fresh=True)
    host.virsh("setvcpus", "web", "2", "--live")
    host.wait(lambda: "vcpus" in drifts(host, "web"), "it is shown")
    found = drifts(host, "web")["vcpus"]
    assert (found["intended"], found["found"]) == ("1", "2")
    told = [f for f in audited(host, "drift.found") if f["what"] == "vcpus"]
    host.wait(lambda: bool(told) or bool(audited(host, "drift.found")), "it is told")
    assert host.cli("drift", "--repair").returncode == 0
    vcpus = 1 if host.unplugs else 2

    def judge(seen: Seen) -> list[Finding]:
        return [
            checker.expect_quota(seen["web"], before["web"].quota),
            checker.expect_vcpus(seen["web"], vcpus),
        ]

    seen = host.expect(judge)
    assert seen["web"].affinity == dict.fromkeys(range(vcpus), ALL)
    for name in ("batch", "database"):
        assert checker.expect_same(host.observe(name), before[name])[0]
