"""Whether QEMU may lock as much memory as a function needs pinned, asked before the attach.

libvirt raises QEMU's limit itself (prlimit(2)), for which its daemon needs CAP_SYS_RESOURCE; in a
container or an unprivileged session it has none, and the attach fails in the middle of things.

Source: libvirt, qemuDomainGetMemLockLimitBytes: the guest's memory and 1 GiB for the devices. (With
an IOMMU of the guest's own it is the memory once for each function; there libvirt's own refusal is
what is seen: `REFUSAL`.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import GuestGoneError, HypervisorError
from virtfabric.model.units import GIB, Bytes

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.model.guest import GuestState

REFUSAL: Final = "cannot limit locked memory"
"""libvirt's words when prlimit(2) fails."""
ADVICE: Final = (
    "raise LimitMEMLOCK of libvirt's daemon and start the guest again, or set "
    "<memtune><hard_limit> in the guest's definition"
)
_DEVICES: Final = 1 * GIB
_CAP_SYS_RESOURCE: Final = 24
_DAEMONS: Final = ("libvirtd.pid", "virtqemud.pid", "libvirt/libvirtd.pid", "libvirt/virtqemud.pid")


class LockedMemory:
    """Limits of the QEMU processes of one libvirt daemon."""

    def __init__(self, run_root: Path, proc: Path) -> None:
        """`run_root` is where the daemon's pid file is."""
        self._run = run_root
        self._proc = proc

    def check(self, guest: GuestState, pid: int) -> None:
        """Raise HypervisorError when the limit is too small and libvirt may not raise it."""
        needed = Bytes(guest.memory_max + _DEVICES)
        limit = self.read_limit(pid)
        if limit is None or limit >= needed or self._may_raise():
            return
        raise HypervisorError(
            f"{guest.name}: a function needs {needed} of locked memory, QEMU's limit is "
            f"{Bytes(limit)} and libvirt's daemon may not raise it (no CAP_SYS_RESOURCE)",
            advice=ADVICE,
        )

    def read_limit(self, pid: int) -> int | None:
        """Bytes up to which a process's limit can be raised by anybody; None for no limit.

        Raises:
            GuestGoneError: the process is gone.
        """
        try:
            text = (self._proc / str(pid) / "limits").read_text()
        except OSError:
            raise GuestGoneError(f"process {pid} is gone") from None
        match = re.search(r"^Max locked memory\s+\S+\s+(\S+)", text, re.MULTILINE)
        return int(match[1]) if match and match[1].isdecimal() else None

    def _may_raise(self) -> bool:
        """Whether the daemon has the capability; a daemon that is not found is left to try."""
        for name in _DAEMONS:
            try:
                pid = int((self._run / name).read_text())
                status = (self._proc / str(pid) / "status").read_text()
            except (OSError, ValueError):
                continue
            match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
            return match is None or bool(int(match[1], 16) >> _CAP_SYS_RESOURCE & 1)
        return True
