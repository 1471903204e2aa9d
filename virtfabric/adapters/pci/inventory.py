"""`SysfsDeviceTree`: every PCIe function of the host, from sysfs. Reads only.

Source: Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.census import DEVICES, Census, read_bus
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.adapters.pci.uses import read_uses
from virtfabric.adapters.pci.watch import DeviceWatcher
from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from virtfabric.model.device import DeviceNews, PciAddress, PciFunction, VfSettings

    ReadSettings = Callable[[PciAddress], Mapping[PciAddress, VfSettings]]
    """What a PF keeps for each of its VFs."""

log = logging.getLogger(__name__)


class SysfsDeviceTree:
    """The host's functions; a DeviceTree."""

    def __init__(
        self,
        root: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        settings: ReadSettings | None = None,
    ) -> None:
        """Read below these, and VF settings by `settings`; nothing is touched before a call."""
        self._sys, self._proc = root, proc
        self._lock = threading.Lock()
        self._census = Census(SysTree(root), SysTree(proc))
        self._read_settings: ReadSettings = settings or (lambda _: {})
        self._settings: dict[PciAddress, VfSettings] = {}
        self._watchers: list[DeviceWatcher] = []

    def read_functions(
        self,
        only: Collection[PciAddress] | None = None,
        settings: Collection[PciAddress] | None = None,
    ) -> dict[PciAddress, PciFunction]:
        """See `ports.DeviceTree`; in order.

        Raises:
            InvalidValueError: a file does not have the form that the kernel documents.
        """
        with self._lock:
            reading = self._census.read(only)
            functions = reading.joined()
            self._ask_settings(functions, reading.newcomers, only if settings is None else settings)
            return functions | {
                vf: replace(functions[vf], settings=kept) for vf, kept in self._settings.items()
            }

    def _ask_settings(
        self,
        functions: dict[PciAddress, PciFunction],
        newcomers: frozenset[PciAddress],
        asked: Collection[PciAddress] | None,
    ) -> None:
        """What the PFs of these VFs, or of all, keep for them now; of other VFs as told last."""
        pf_of = {vf: one.pf for vf, one in functions.items() if one.pf is not None}
        pfs = {pf for vf, pf in pf_of.items() if asked is None or vf in newcomers or vf in asked}
        old = self._settings.items()
        known = {vf: kept for vf, kept in old if vf in pf_of and pf_of[vf] not in pfs}
        for pf in sorted(pfs, key=lambda pf: pf.parts):
            try:
                told = self._read_settings(pf)
            except VirtfabricError as error:  # the PF is going away, or its driver is
                log.warning("VF settings of PF %s are not known: %s", pf, error)
                continue
            known |= {vf: kept for vf, kept in told.items() if vf in functions}
        self._settings = known

    def watch(self, changed: Callable[[DeviceNews], None]) -> None:
        """Call `changed` from a thread of its own when functions or their uses have changed."""
        watcher = DeviceWatcher(changed, sys=self._sys, proc=self._proc)
        self._watchers.append(watcher)
        watcher.start()

    def close(self) -> None:
        """Stop watching; safe to repeat."""
        while self._watchers:
            self._watchers.pop().close()


class CurrentUses:
    """How the host uses a function at this very moment: asked before a driver is taken away."""

    def __init__(self, root: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        """Read below these; nothing is read before a call."""
        self._sys, self._proc = SysTree(root), SysTree(proc)

    def __call__(self, address: PciAddress) -> tuple[str, ...]:
        """For people; empty when it does not."""
        bus = {one: self._sys.link(f"{DEVICES}/{one}") for one in read_bus(self._sys)}
        homes = {one: home for one, home in bus.items() if home is not None}
        asked = [address] if address in homes else []
        uses = read_uses(self._sys, self._proc, homes, asked, displays=asked)
        return tuple(map(str, uses.of(address)))


def read_functions(sys: SysTree, proc: SysTree) -> dict[PciAddress, PciFunction]:
    """All functions of any two trees, without VF settings."""
    return Census(sys, proc).read().joined()
