"""A sandbox's groups in the cgroup hierarchies of this host, v1 and v2 alike.

They are the sandbox's own by name: whatever is in one belongs to it, or to a crashed one before it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from virtfabric.shim.sandbox_process import SandboxError, wait_until

_UNIFIED_CONTROLLERS = ("cpuset", "cpu", "memory", "io", "pids")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The sandbox's group in one hierarchy of the host."""

    mountpoint: Path
    directory: Path
    unified: bool

    def create(self) -> None:
        """Makes the group; v2 controllers are delegated, v1 cpusets inherit."""
        if self.unified:
            self._delegate_controllers()
        self.directory.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # v1: empty at first, and nothing runs then
            if not self.unified and (self.directory / name).exists():
                (self.directory / name).write_text((self.mountpoint / name).read_text())

    def _delegate_controllers(self) -> None:
        """In the host's root group, for good: who else needs them by the end is not known."""
        offered = (self.mountpoint / "cgroup.controllers").read_text().split()
        control = self.mountpoint / "cgroup.subtree_control"
        for controller in _UNIFIED_CONTROLLERS:
            if controller in offered and controller not in control.read_text().split():
                control.write_text(f"+{controller}")

    def read_members(self) -> set[int]:
        """Host process ids in this group and below."""
        members: set[int] = set()
        for procs in (self.directory, *self.directory.rglob("*/")):
            with contextlib.suppress(OSError):
                members.update(map(int, (procs / "cgroup.procs").read_text().split()))
        return members

    def remove(self) -> bool:
        """Removes the whole subtree; False while something in it is still in use."""
        if not self.directory.exists():
            return True
        below = sorted((p for p in self.directory.rglob("*") if p.is_dir()), reverse=True)
        try:
            for directory in (*below, self.directory):
                directory.rmdir()
        except OSError:
            return False
        return True


def read_cgroups(name: str) -> tuple[Cgroup, ...]:
    """The groups of the sandbox `name`, one in each hierarchy that is mounted; made or not.

    Raises:
        SandboxError: no hierarchy is mounted.
    """
    found: dict[Path, Cgroup] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind in {"cgroup", "cgroup2"} and target.startswith("/sys/fs/cgroup"):
            mount = Path(target)
            found[mount] = Cgroup(mount, mount / f"virtfabric-{name}", kind == "cgroup2")
    if not found:
        raise SandboxError("no cgroup hierarchy is mounted under /sys/fs/cgroup")
    return tuple(found.values())


def remove_cgroups(groups: tuple[Cgroup, ...], name: str) -> None:
    """Kills the members of these groups of the sandbox `name`, and removes the groups.

    Raises:
        SandboxError: they live on.
    """

    def gone() -> bool:
        for member in set[int]().union(*(g.read_members() for g in groups)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        # A list, not a generator: every one gets its turn in each round.
        return all([group.remove() for group in groups])  # noqa: C419

    wait_until(gone, f"removal of the cgroups of sandbox {name}")
