"""What the kernel enforces on a guest: quota, weight and CPUs, read from its control groups.

Reads only: libvirt owns and writes these files. The verifier looks here and not into libvirt's
answers. Source: Documentation/scheduler/sched-bwc.rst, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import Final

from virtfabric.model.errors import GuestGoneError, VerificationError
from virtfabric.model.units import CpuSet

# libvirt splits a guest's threads into these below the group of the whole guest.
_PART: Final = re.compile(r"emulator|vcpu\d+|iothread\d+")
_V1_SHARES: Final = 1024
_V2_WEIGHT: Final = 100


class Version(IntEnum):
    """Which interface the cpu controller has here (a hybrid host has it on v1)."""

    V1 = 1
    V2 = 2


class Cgroups:
    """The control groups of one machine."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        """Read below these; nothing is touched before a call."""
        self._root = root
        self._proc = proc

    @property
    def version(self) -> Version:
        """v2 when the root itself is a unified hierarchy."""
        return Version.V2 if (self._root / "cgroup.controllers").exists() else Version.V1

    def from_shares(self, shares: int) -> int:
        """Policy shares (100 is the kernel's default) as libvirt's `cpu_shares` here."""
        if self.version is Version.V2:
            return min(10_000, max(1, shares))
        return min(262_144, max(2, round(shares * _V1_SHARES / 100)))

    def to_shares(self, raw: int) -> int:
        """The reverse of `from_shares`."""
        return raw if self.version is Version.V2 else max(1, round(raw * 100 / _V1_SHARES))

    def guest_path(self, pid: int, controller: str) -> Path:
        """The group of the whole guest that this process (or thread) belongs to.

        Raises:
            GuestGoneError: there is no such process.
            VerificationError: the controller is not mounted.
        """
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text().splitlines()
        except OSError as error:
            raise GuestGoneError(f"process {pid} is gone: {error.strerror}") from None
        wanted = "" if self.version is Version.V2 else controller
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if wanted in controllers.split(","):
                base = self._root / controller if wanted else self._root
                return _whole_guest(base / path.lstrip("/"))
        raise VerificationError(f"process {pid} is in no group of the {controller} controller")

    def read_quota(self, pid: int) -> int:
        """Cap of the whole guest in milli-CPU, -1 when it is not capped.

        Raises:
            VerificationError: the files are not there.
        """
        quotas = [_read_quota(group) for group in self._levels(pid, "cpu")]
        return min((quota for quota in quotas if quota >= 0), default=-1)

    def read_raw_shares(self, pid: int) -> frozenset[int]:
        """Weight of the whole guest in libvirt's units.

        With systemd on v2 there are two levels (the scope and libvirt's own below it) and which
        one carries the weight depends on libvirt's version, so both are told.

        Raises:
            VerificationError: the files are not there.
        """
        name = "cpu.weight" if self.version is Version.V2 else "cpu.shares"
        return frozenset(int(_read(group / name)) for group in self._levels(pid, "cpu"))

    def read_cpus(self, pid: int) -> CpuSet:
        """pCPUs that the whole guest may use; empty where the cpuset controller sets no bound."""
        group = self.guest_path(pid, "cpuset")
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if (group / name).exists():
                return CpuSet.parse(_read(group / name), field=str(group / name))
        return CpuSet()

    def _levels(self, pid: int, controller: str) -> list[Path]:
        group = self.guest_path(pid, controller)
        return [group, group.parent] if group.name == "libvirt" else [group]


def _whole_guest(group: Path) -> Path:
    return group.parent if _PART.fullmatch(group.name) else group


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise VerificationError(f"{path}: {error.strerror}") from None


def _read_quota(group: Path) -> int:
    if (group / "cpu.max").exists():
        quota, period = _read(group / "cpu.max").split()
    else:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if quota == "max" or int(quota) < 0:
        return -1
    return round(int(quota) * 1000 / int(period))
