"""What people ask about memory, and what the agent says of it unasked: CXL that came, went, failed.

It decides nothing and changes nothing.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.memoryviews import memory_view, with_conditions
from virtfabric.model.cxl import HostMemory
from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from virtfabric.daemon.notices import Notices
    from virtfabric.model.cxl import CxlInventory
    from virtfabric.ports import MemoryTree

    Json = dict[str, Any]

log = logging.getLogger(__name__)
_ALERT: Final = "cxl"


class MemoryDesk:
    """Thread-safe: every reading stands for itself."""

    def __init__(self, tree: MemoryTree, notices: Notices) -> None:
        """Nothing is read before `start` or `show`."""
        self._tree = tree
        self._notices = notices
        self._lock = threading.Lock()
        self._seen: frozenset[str] | None = None

    def show(self) -> Json:
        """Nodes, windows, regions, memdevs, ports and problems, read and asked anew."""
        memory = self._tree.read_memory()
        notes: tuple[str, ...] = ()
        if memory.cxl.memdevs:
            try:
                known = with_conditions(memory.cxl, self._tree.read_conditions())
                memory = HostMemory(memory.nodes, known)
            except VirtfabricError as error:
                notes = (f"health and poison of the memdevs are not known: {error}",)
        return memory_view(memory, notes)

    def start(self) -> None:
        """Note what there is, and follow what changes."""
        self._tree.watch(self.look)
        self.look()

    def look(self) -> None:
        """Something may have changed: say what did since the last look."""
        with self._lock:
            try:
                found = self._tree.read_memory().cxl
            except (VirtfabricError, OSError) as error:  # in the middle of a change
                log.warning("memory cannot be read: %s", error)
                return
            seen = _lines(found)
            before, self._seen = self._seen, seen
            if before is not None and before != seen:
                came, went = sorted(seen - before), sorted(before - seen)
                self._notices.publish("memory.changed", {"came": came, "went": went})
            if found.problems:
                self._notices.alert(_ALERT, "; ".join(found.problems))
            else:
                self._notices.settle(_ALERT)

    def close(self) -> None:
        """Follow nothing any more; safe to repeat."""
        self._tree.close()


def _lines(found: CxlInventory) -> frozenset[str]:
    """What of CXL comes and goes, in words."""
    memdevs = (f"memdev {m.label}" for m in found.memdevs)
    regions = (
        f"region of {', '.join('?' if s is None else str(s) for s in r.members)}"
        + "".join(f", node {d.node} {d.state}" for d in r.dax)
        for r in found.regions
    )
    return frozenset((*memdevs, *regions))
