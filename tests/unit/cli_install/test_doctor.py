"""doctor: each finding says what it saw; what is wrong says how to mend it."""

import argparse
import io
import json
from contextlib import redirect_stdout

import pytest

from virtfabric.cli.doctor import (
    Verdict,
    check_apparmor,
    check_bus_policy,
    check_cgroups,
    check_hypervisor,
    check_state_dir,
    check_version,
    examine,
)
from virtfabric.cli.main import main
from virtfabric.config import AgentConfig, Config


@pytest.mark.parametrize(
    ("number", "verdict"),
    [(9_000_000, Verdict.OK), (11_003_000, Verdict.OK), (8_010_000, Verdict.FAIL)],
)
def test_versions(number, verdict):
    finding = check_version("libvirt", number, (9, 0, 0))
    assert finding.verdict is verdict
    assert bool(finding.mend) is (verdict is Verdict.FAIL)


def write(root, path, text):
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def test_cgroups(tmp_path):
    write(tmp_path, "proc/cgroups", "#name hierarchy num enabled\ncpu 1 1 1\ncpuset 2 1 0\n")
    [finding] = check_cgroups(tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert finding.detail.startswith("version 1")
    assert "cpuset" in finding.mend
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory\n")
    [finding] = check_cgroups(tmp_path)
    assert finding.verdict is Verdict.OK
    assert finding.detail.startswith("version 2")


def test_apparmor_and_bus_policy(tmp_path):
    assert next(check_apparmor(tmp_path)).verdict is Verdict.WARN
    write(tmp_path, "sys/module/apparmor/parameters/enabled", "Y\n")
    assert next(check_apparmor(tmp_path)).verdict is Verdict.OK
    assert next(check_bus_policy(Config(), tmp_path)).verdict is Verdict.FAIL
    write(tmp_path, "etc/dbus-1/system.d/org.virtfabric1.conf", "<busconfig/>")
    assert next(check_bus_policy(Config(), tmp_path)).verdict is Verdict.OK


def test_state_directory(tmp_path):
    state = tmp_path / "state"
    config = Config(agent=AgentConfig(state_dir=state))
    assert next(check_state_dir(config)).verdict is Verdict.WARN
    state.mkdir(mode=0o755)
    finding = next(check_state_dir(config))
    assert finding.verdict is Verdict.FAIL
    assert f"chmod 0700 {state}" in finding.mend


def test_unreachable_libvirt_prints_nothing_itself(capfd):
    pytest.importorskip("libvirt")
    [finding] = check_hypervisor("qemu:///system?socket=/nonexistent/libvirt-sock")
    assert finding.verdict is Verdict.FAIL
    assert "/nonexistent/libvirt-sock" in finding.detail
    assert capfd.readouterr() == ("", "")


def test_libvirts_own_test_driver_is_reachable():
    pytest.importorskip("libvirt")
    findings = list(check_hypervisor("test:///default"))
    assert [f.name for f in findings] == ["libvirt", "qemu", "libvirt nodes"]
    assert findings[0].verdict is Verdict.OK


def test_a_broken_configuration_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path))
    (tmp_path / "x.toml").write_text("[agnet]\n")
    args = argparse.Namespace(
        config=tmp_path / "x.toml", uri="test:///default", bus=f"unix:path={tmp_path}/no-bus"
    )
    findings = {f.name: f for f in examine(args)}
    assert findings["configuration"].verdict is Verdict.FAIL
    assert "did you mean agent?" in findings["configuration"].detail
    assert findings["agent"].verdict is Verdict.FAIL
    assert {"cgroups", "kvm", "apparmor", "hooks", "bus policy", "state"} <= set(findings)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path))
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(
            [
                "doctor",
                "--json",
                "--config",
                str(tmp_path),
                "--uri",
                "test:///default",
                "--bus",
                f"unix:path={tmp_path}/no-bus",
            ]
        )
    document = json.loads(out.getvalue())
    assert code == 1
    assert document["healthy"] is False
    assert all(c["mend"] for c in document["checks"] if c["verdict"] == "fail")
