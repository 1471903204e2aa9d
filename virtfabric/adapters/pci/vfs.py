"""The VFs of a pool: made once when a PF has none, never changed while there is any.

A write to `sriov_numvfs` takes every VF of the PF away, those of running guests too; so the number
is written from 0 only. The host's own driver is kept off the new VFs: they belong to guests.

Source: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci (sriov_*).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.nvmeadmin import NvmeAdmin, Resource
from virtfabric.model.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.pci.binding import Uses
    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.model.device import PciAddress

_LIVE_S: Final = 30.0
_POLL_S: Final = 0.02


class VfPools:
    """Implements `ports.VfMaker`."""

    def __init__(
        self,
        files: FunctionFiles,
        uses: Uses,
        dev: Path = Path("/dev"),
        admin: Callable[[Path], NvmeAdmin] = NvmeAdmin,
    ) -> None:
        """`uses` is asked before a controller is reset; `dev` is where `nvme0` is."""
        self._files = files
        self._uses = uses
        self._dev = dev
        self._admin = admin

    def ensure(self, pf: PciAddress, count: int) -> int:
        """Give a PF `count` VFs if it has none; how many it has now, which may be another number.

        Raises:
            DeviceGoneError
            DeviceError: it can have no VFs, or not so many.
        """
        most = self._read_count(pf, "sriov_totalvfs")
        if not 0 < count <= most:
            raise DeviceError(f"PF {pf}: {count} VFs asked for, it can have {most}")
        if there := self._read_count(pf, "sriov_numvfs"):
            return there
        self._make(pf, count)
        return self._read_count(pf, "sriov_numvfs")

    def _make(self, pf: PciAddress, count: int) -> None:
        # It stays off: udev loads the VFs' driver when it hears of them, and would bind them then
        # (measured: igbvf, with autoprobe back on right after). An override still binds any driver.
        if self._files.has(pf, "sriov_drivers_autoprobe"):
            self._files.write(pf, "sriov_drivers_autoprobe", "0")
        self._files.write(pf, "sriov_numvfs", str(count))

    def _read_count(self, pf: PciAddress, name: str) -> int:
        text = self._files.read(pf, name)
        if text is None:
            raise DeviceError(f"PCI function {pf} is no PF: it can have no VFs")
        return int(text)

    def ensure_nvme(self, pf: PciAddress, queues: int) -> None:
        """Give each VF of an NVMe PF `queues` queues (admin queue included) and bring it online.

        A VF that is online already is left as it is: a guest may be using it. The primary gives up
        its flexible resources for it when none are left, which takes a reset of the controller.

        Raises:
            DeviceGoneError
            DeviceError: no NVMe controller, too little to distribute, or the host uses the PF.
        """
        name = self._find_controller(pf)
        admin = self._admin(self._dev / name)
        wanted = {Resource.QUEUES: queues, Resource.INTERRUPTS: max(1, queues - 1)}
        count = len(self._files.vfs(pf))
        offline = [s for s in admin.read_secondaries() if s.number < count and not s.online]
        if not offline:
            return
        self._make_room(pf, admin, {r: n * len(offline) for r, n in wanted.items()})
        for secondary in offline:
            for resource, amount in wanted.items():
                admin.assign(secondary.controller, resource, amount)
            admin.bring_online(secondary.controller)

    def _make_room(self, pf: PciAddress, admin: NvmeAdmin, needed: dict[Resource, int]) -> None:
        own, flexible = admin.read_flexible()
        short = [r for r, amount in needed.items() if flexible[r].free < amount]
        for resource in short:
            there = flexible[resource]
            if there.total - there.with_vfs < needed[resource]:
                raise DeviceError(
                    f"NVMe controller {pf}: its VFs need {needed[resource]} "
                    f"{resource.name.lower()}, {there.total - there.with_vfs} can be given"
                )
        if not short:
            return
        if uses := self._uses(pf):
            raise DeviceError(
                f"NVMe controller {pf} has to be reset so that its VFs get queues, and is in use "
                f"by the host: {'; '.join(uses)}"
            )
        for resource in short:
            admin.take_from_primary(own, resource)
        self._reset(pf)

    def _reset(self, pf: PciAddress) -> None:
        """Reset the controller, and wait until its driver has brought it back."""
        controller = self._files.path(pf) / "nvme" / self._find_controller(pf)
        try:
            self._files.put(controller / "reset_controller", "1")
        except OSError as error:
            raise DeviceError(f"NVMe controller {pf}: reset: {error.strerror}") from error
        until = time.monotonic() + _LIVE_S
        while (state := (controller / "state").read_text().strip()) != "live":
            if time.monotonic() > until:
                raise DeviceError(f"NVMe controller {pf} is {state} {_LIVE_S:g} s after its reset")
            time.sleep(_POLL_S)  # the kernel sends no event for it

    def _find_controller(self, pf: PciAddress) -> str:
        directory = self._files.path(pf) / "nvme"
        names = sorted(e.name for e in directory.iterdir()) if directory.is_dir() else []
        if not names:
            raise DeviceError(f"PCI function {pf} is no NVMe controller that its driver serves")
        return names[0]
