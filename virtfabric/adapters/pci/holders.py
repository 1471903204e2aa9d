"""Who holds a function through vfio: the processes with its group or device file open.

Read from /proc, as libvirt's and QEMU's events come before the kernel has let go (QEMU tells
DEVICE_DELETED, and libvirt has told DEVICE_REMOVED, while the vfio file was still open).

Source: Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.model.device import VFIO_PCI, PciAddress
from virtfabric.model.errors import DeviceError, DeviceGoneError, StepCancelledError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.adapters.pci.functionfiles import FunctionFiles

_FIRST_POLL_S: Final = 0.002
_LAST_POLL_S: Final = 0.1
_CLOSING_S: Final = 1.0
"""A file is gone from /proc before the kernel has closed it: what is still enabled after this with
nobody holding it was left so by a driver that had it before. With another driver than vfio-pci this
time is all that there is to go by."""


class VfioHolders:
    """Looks into the processes below one `proc` root."""

    def __init__(self, files: FunctionFiles, proc: Path = Path("/proc")) -> None:
        """Nothing is read before a call."""
        self._files = files
        self._proc = proc

    def nodes(self, address: PciAddress) -> frozenset[str]:
        """The files through which a process can hold it: its group's, and its own (iommufd)."""
        found = set()
        group = self._files.link(address, "iommu_group")
        if group is not None:
            found.add(f"/dev/vfio/{group}")
        own = self._files.path(address) / "vfio-dev"
        if own.is_dir():
            found |= {f"/dev/vfio/devices/{entry.name}" for entry in own.iterdir()}
        return frozenset(found)

    def holds(self, pid: int, address: PciAddress) -> bool:
        """Whether a process has one of those files open."""
        return self._has_open(pid, self.nodes(address))

    def processes(self, address: PciAddress, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """Process ids that hold it or, through the group's file, a sibling of its group."""
        nodes = self.nodes(address)
        pids = self._pids() if among is None else among
        return tuple(pid for pid in pids if self._has_open(pid, nodes))

    def is_openable(self, address: PciAddress) -> bool:
        """Whether a vfio driver has it: vfio-pci, or one that the kernel shows as such.

        Source: drivers/vfio/vfio_main.c, `vfio-dev` (Linux 6.1, where vfio-pci has it as well).
        """
        bound = self._files.driver(address)
        return bound == VFIO_PCI or (bool(bound) and self._files.has(address, "vfio-dev"))

    def is_open(self, address: PciAddress) -> bool:
        """Whether somebody uses this very function through vfio.

        vfio-pci enables a function when it is opened and disables it when it is closed, so the
        kernel's count tells it from a sibling whose group is open
        (drivers/vfio/pci/vfio_pci_core.c, vfio_pci_core_enable). Its files are asked as well: a
        driver that had it before may have left it enabled. Of another vfio driver nobody knows when
        it enables a function: there whoever has its files open counts as its user, also one that
        has a sibling of its group only.
        """
        return self._may_be_open(address) and bool(self.processes(address))

    def _may_be_open(self, address: PciAddress) -> bool:
        if self._files.driver(address) != VFIO_PCI:
            return self.is_openable(address)
        return (self._files.read(address, "enable") or "0") != "0"

    def wait_closed(
        self, address: PciAddress, timeout_s: float, cancelled: threading.Event | None = None
    ) -> None:
        """Until nobody uses the function any more; one that vanished is closed.

        The kernel sends no event for it, so it is looked at, every 2 ms at first.

        Raises:
            DeviceError: still in use after `timeout_s`; names the processes.
            StepCancelledError: the caller gave up.
        """
        until = time.monotonic() + timeout_s
        seen_held = time.monotonic()
        pause = _FIRST_POLL_S
        while self._may_still_be_open(address):
            who = self.processes(address)
            now = time.monotonic()
            if who:
                seen_held = now
            elif now - seen_held >= _CLOSING_S:
                return
            if now >= until:
                words = ", ".join(map(str, who)) or "unknown"
                raise DeviceError(
                    f"PCI function {address} is still open after {timeout_s:g} s (process {words})",
                    advice="the guest's QEMU has not let go of it; see its log",
                )
            if (cancelled or threading.Event()).wait(min(pause, until - now)):
                raise StepCancelledError("cancelled by the caller")
            pause = min(pause * 1.5, _LAST_POLL_S)

    def _may_still_be_open(self, address: PciAddress) -> bool:
        try:
            return self._may_be_open(address)
        except DeviceGoneError:
            return False

    def _pids(self) -> list[int]:
        return [int(entry.name) for entry in self._proc.iterdir() if entry.name.isdecimal()]

    def _has_open(self, pid: int, nodes: frozenset[str]) -> bool:
        # Of every process of the host, again and again: in strings, as in `tree`.
        directory = f"{self._proc}/{pid}/fd"
        try:
            descriptors = os.listdir(directory)  # noqa: PTH208
        except OSError:  # it ended
            return False
        for descriptor in descriptors:
            try:
                if os.readlink(f"{directory}/{descriptor}") in nodes:  # noqa: PTH115
                    return True
            except OSError:  # closed meanwhile
                continue
        return False
