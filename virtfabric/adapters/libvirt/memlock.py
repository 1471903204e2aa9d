"""Whether QEMU may lock as much memory as a function needs pinned, asked before the attach.

libvirt raises QEMU's limit itself (prlimit(2)), for which its daemon needs CAP_SYS_RESOURCE; in a
container or an unprivileged session it has none, and the attach fails in the middle of things.
With an IOMMU of the guest's own libvirt's own refusal is what is seen: `REFUSAL`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.memlock import read_lock_limit
from virtfabric.model.errors import HypervisorError
from virtfabric.policy.memlock import check_lock, lock_needed

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.model.guest import GuestState

REFUSAL: Final = "cannot limit locked memory"
"""libvirt's words when prlimit(2) fails."""
ADVICE: Final = (
    "raise LimitMEMLOCK of libvirt's daemon and start the guest again, or set "
    "<memtune><hard_limit> in the guest's definition"
)
_DAEMONS: Final = ("libvirtd.pid", "virtqemud.pid", "libvirt/libvirtd.pid", "libvirt/virtqemud.pid")


class LockedMemory:
    """Limits of the QEMU processes of one libvirt daemon."""

    def __init__(self, run_root: Path, proc: Path) -> None:
        """`run_root` is where the daemon's pid file is."""
        self._run = run_root
        self._proc = proc

    def check(self, guest: GuestState, pid: int) -> None:
        """Raise HypervisorError when the limit is too small and libvirt may not raise it.

        Raises:
            GuestGoneError: QEMU has ended.
        """
        limit = read_lock_limit(pid, self._find_daemon(), proc=self._proc)
        refusal = check_lock(guest.name, lock_needed(guest.memory_max, 1), limit)
        if refusal is not None:
            raise HypervisorError(refusal.detail, advice=ADVICE)

    def _find_daemon(self) -> int | None:
        """None where it is not found: it is left to try."""
        for name in _DAEMONS:
            try:
                pid = int((self._run / name).read_text())
            except (OSError, ValueError):
                continue
            if (self._proc / str(pid)).exists():
                return pid
        return None
