"""`SysfsMemory`: NUMA nodes and CXL memory as they are now, and what changes of them."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.cxl.conditions import read_conditions
from virtfabric.adapters.cxl.inventory import read_inventory
from virtfabric.adapters.cxl.marks import RegionMarks
from virtfabric.adapters.cxl.tools import run_tool
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.adapters.pci.watch import UeventWatcher
from virtfabric.adapters.sysfs import Sysfs
from virtfabric.model.cxl import HostMemory
from virtfabric.model.errors import StepCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.cxl.tools import Tool
    from virtfabric.model.cxl import Condition, CxlInventory

MARKS: Final = Path("/run/virtfabric/regions")
_NODES: Final = "devices/system/node"
_NODE: Final = re.compile(r"node\d+")
_LOOK_S: Final = 0.1
SUBSYSTEMS: Final = ("cxl", "dax", "memory", "node")
"""Devices and regions come and go; blocks of memory go online and offline."""


class SysfsMemory:
    """Implements `ports.MemoryTree`."""

    def __init__(
        self,
        root: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        *,
        marks: Path = MARKS,
        run: Tool = run_tool,
    ) -> None:
        """Read below these; `marks` says which regions are ours. Nothing is read before a call."""
        self._tree = SysTree(root)
        self._sysfs = Sysfs(root, proc)
        self._marks = RegionMarks(marks)
        self._run = run
        self._watchers: list[UeventWatcher] = []
        self._asking = threading.Lock()

    def read_memory(self) -> HostMemory:
        """Nodes by number, and the CXL inventory.

        Raises:
            InvalidValueError: a file does not have the form that the kernel documents.
        """
        return HostMemory(self._sysfs.read_nodes(), self.read_cxl())

    def read_cxl(self) -> CxlInventory:
        """The CXL inventory alone."""
        found = read_inventory(self._tree)
        bases = {window.name: window.base for window in found.windows}
        regions = tuple(
            replace(r, ours=r.window in bases and self._marks.has(bases[r.window], r.members))
            for r in found.regions
        )
        return replace(found, regions=regions)

    def read_conditions(self, cancelled: threading.Event) -> dict[str, Condition]:
        """Health and poison by the kernel's name of the memdev.

        Raises:
            CxlError: `cxl` is not installed or does not answer.
            StepCancelledError: nobody waits for it any more.
        """
        # Poison comes as trace events: of two that listen, one may take the other's.
        while not self._asking.acquire(timeout=_LOOK_S):
            if cancelled.is_set():
                raise StepCancelledError("cancelled while another asked the memdevs")
        try:
            return read_conditions(self._run, cancelled)
        finally:
            self._asking.release()

    def read_broken_pages(self) -> dict[int, int]:
        """Pages that the kernel took out of use since it booted, by node; of Linux 6.3 on.

        Source: Documentation/ABI/stable/sysfs-devices-node, memory_failure/total.
        """
        found = {}
        for name in self._tree.names(_NODES, _NODE):
            text = self._tree.text(f"{_NODES}/{name}/memory_failure/total") or ""
            if text.isdigit():
                found[int(name.removeprefix("node"))] = int(text)
        return found

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` from a thread of its own when CXL devices or memory came or went."""
        watcher = UeventWatcher(changed, SUBSYSTEMS, thread="memory")
        self._watchers.append(watcher)
        watcher.start()

    def close(self) -> None:
        """Stop watching; safe to repeat."""
        while self._watchers:
            self._watchers.pop().close()
