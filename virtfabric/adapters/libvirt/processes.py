"""QEMU's processes and threads, as the kernel shows them.

Reads only /run/libvirt and /proc; no monitor command, so that it neither waits for nor taints a
guest.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import GuestGoneError
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from virtfabric.model.ids import GuestId

# QEMU names them with `-name debug-threads=on`, which libvirt always gives.
_VCPU: Final = re.compile(r"CPU (\d+)/")
_SMP: Final = re.compile(r"(?:cpus=)?(\d+)")


class QemuProcesses:
    """The QEMU processes of one libvirtd."""

    def __init__(self, run_root: Path = Path("/run"), proc: Path = Path("/proc")) -> None:
        """`run_root` is where libvirt's `libvirt/qemu/NAME.pid` are."""
        self._pids = run_root / "libvirt" / "qemu"
        self._proc = proc

    def find_pid(self, guest: GuestId, name: str) -> int | None:
        """The process of a guest, checked against its command line; None when there is none."""
        try:
            pid = int((self._pids / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return self._search(guest)
        return pid if self._runs(pid, guest) else self._search(guest)

    def _search(self, guest: GuestId) -> int | None:
        numbers = (entry.name for entry in self._proc.iterdir() if entry.name.isdecimal())
        return next((int(n) for n in numbers if self._runs(int(n), guest)), None)

    def _runs(self, pid: int, guest: GuestId) -> bool:
        # libvirt's QEMU has `-uuid UUID`; a pid file may be stale and its number reused.
        return (self._read_option(pid, "-uuid") or "").lower() == guest

    def read_boot_vcpus(self, pid: int) -> int:
        """vCPUs that QEMU was started with, which libvirt cannot unplug; 1 where that is not told.

        `<vcpu hotpluggable='yes'>` of the definition are not among them: libvirt plugs those in
        before the guest runs. The live XML does not tell them apart (libvirt 9.0, 11.3).
        """
        match = _SMP.match(self._read_option(pid, "-smp") or "")
        return max(1, int(match[1])) if match else 1

    def _read_option(self, pid: int, option: str) -> str | None:
        """The value of an option on QEMU's command line; None when it, or the process, is gone."""
        try:
            arguments = (self._proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        values = (value for flag, value in pairwise(arguments) if flag == option.encode())
        found = next(values, None)
        return None if found is None else found.decode(errors="replace")

    def read_vcpu_threads(self, pid: int) -> dict[int, int]:
        """Kernel thread id by vCPU number; what is here is plugged, whatever libvirt believes.

        Empty when the process is gone.
        """
        threads: dict[int, int] = {}
        try:
            tasks = list((self._proc / str(pid) / "task").iterdir())
        except OSError:
            return {}
        for task in tasks:
            try:
                match = _VCPU.match((task / "comm").read_text())
            except OSError:  # it ended meanwhile
                continue
            if match:
                threads[int(match[1])] = int(task.name)
        return dict(sorted(threads.items()))

    def is_emulated(self, threads: dict[int, int]) -> bool:
        """Whether QEMU runs these vCPU threads (as `read_vcpu_threads` gave them) under TCG."""
        for tid in threads.values():
            try:
                return (self._proc / str(tid) / "comm").read_text().rstrip().endswith("/TCG")
            except OSError:  # it ended meanwhile; ask the next
                continue
        return False

    def read_affinity(self, pid: int, tid: int) -> CpuSet:
        """pCPUs that the scheduler lets a thread run on.

        Raises:
            GuestGoneError: the thread is gone.
        """
        return self._read_status(pid, tid, "Cpus_allowed_list")

    def read_nodes(self, pid: int, tid: int) -> CpuSet:
        """NUMA nodes that a thread may allocate on.

        Raises:
            GuestGoneError: the thread is gone.
        """
        return self._read_status(pid, tid, "Mems_allowed_list")

    def _read_status(self, pid: int, tid: int, field: str) -> CpuSet:
        path = self._proc / str(pid) / "task" / str(tid) / "status"
        try:
            match = re.search(rf"^{field}:\s*(\S*)$", path.read_text(), re.MULTILINE)
        except OSError:
            raise GuestGoneError(f"thread {tid} of process {pid} is gone") from None
        return CpuSet.parse(match[1] if match else "", field=field)
