from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.cgroups import Cgroups, Version
from virtfabric.model.errors import GuestGoneError, VerificationError
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from pathlib import Path

GUEST = "machine/qemu-1-g0.libvirt-qemu"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def v1(tmp_path: Path) -> Cgroups:
    lines = (f"4:cpuset:/{GUEST}/emulator", f"3:cpu,cpuacct:/{GUEST}/vcpu0", "1:name=systemd:/x")
    write(tmp_path, {"proc/7/cgroup": "\n".join(lines) + "\n"})
    write(
        tmp_path / "cg",
        {
            f"cpu/{GUEST}/cpu.cfs_quota_us": "150000\n",
            f"cpu/{GUEST}/cpu.cfs_period_us": "100000\n",
            f"cpu/{GUEST}/cpu.shares": "2048\n",
            f"cpu/{GUEST}/vcpu0/cpu.cfs_quota_us": "-1\n",
            f"cpuset/{GUEST}/cpuset.cpus": "0-1,5\n",
        },
    )
    return Cgroups(tmp_path / "cg", tmp_path / "proc")


@pytest.fixture
def v2(tmp_path: Path) -> Cgroups:
    scope = "machine.slice/machine-qemu\\x2d1\\x2dg0.scope"
    write(tmp_path, {"proc/7/cgroup": f"0::/{scope}/libvirt/emulator\n"})
    write(
        tmp_path / "cg",
        {
            "cgroup.controllers": "cpuset cpu memory\n",
            f"{scope}/cpu.max": "max 100000\n",
            f"{scope}/cpu.weight": "250\n",
            f"{scope}/libvirt/cpu.max": "50000 100000\n",
            f"{scope}/libvirt/cpu.weight": "100\n",
            f"{scope}/libvirt/cpuset.cpus.effective": "0-3\n",
        },
    )
    return Cgroups(tmp_path / "cg", tmp_path / "proc")


def test_v1(v1: Cgroups) -> None:
    assert v1.version is Version.V1
    assert v1.read_quota(7) == 1500
    assert v1.read_raw_shares(7) == {2048}
    assert v1.read_cpus(7) == CpuSet([0, 1, 5])
    assert str(v1.guest_path(7, "cpu")).endswith(f"cg/cpu/{GUEST}")


def test_v1_uncapped(v1: Cgroups) -> None:
    (v1.guest_path(7, "cpu") / "cpu.cfs_quota_us").write_text("-1\n")
    assert v1.read_quota(7) == -1


def test_v2_looks_at_scope_and_at_libvirts_own_level(v2: Cgroups) -> None:
    assert v2.version is Version.V2
    assert v2.read_quota(7) == 500
    assert v2.read_raw_shares(7) == {100, 250}
    assert v2.read_cpus(7) == CpuSet([0, 1, 2, 3])


@pytest.mark.parametrize("shares", [1, 2, 50, 99, 100, 101, 250, 10_000])
def test_shares_survive_the_units_of_both_versions(v1: Cgroups, v2: Cgroups, shares: int) -> None:
    for cgroups in (v1, v2):
        assert cgroups.to_shares(cgroups.from_shares(shares)) == shares


def test_the_kernels_default_is_a_hundred(v1: Cgroups) -> None:
    assert v1.from_shares(100) == 1024


def test_a_process_that_is_gone(v1: Cgroups) -> None:
    with pytest.raises(GuestGoneError):
        v1.read_quota(8)


def test_a_controller_that_is_not_mounted(v1: Cgroups) -> None:
    with pytest.raises(VerificationError, match="blkio"):
        v1.guest_path(7, "blkio")
