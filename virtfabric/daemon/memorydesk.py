"""What people ask about memory, and what the agent says of it unasked: CXL that came, went, failed.

It decides nothing and changes nothing. How memdevs do is asked in a thread of its own: a poison
list takes seconds for each memdev, and nobody who looks at memory waits for that.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.memoryviews import memory_view, with_conditions
from virtfabric.model.cxl import HostMemory
from virtfabric.model.errors import StepCancelledError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.notices import Notices
    from virtfabric.model.cxl import Condition, CxlInventory
    from virtfabric.model.ids import GuestId
    from virtfabric.ports import MemoryTree, PageTree

    Json = dict[str, Any]

log = logging.getLogger(__name__)
_ALERT: Final = "cxl"
_NOT_YET: Final = "health and poison of the memdevs have not been asked yet"
_END_S: Final = 10.0


class MemoryDesk:
    """Thread-safe: every reading stands for itself."""

    def __init__(
        self,
        tree: MemoryTree,
        pages: PageTree,
        notices: Notices,
        name_of: Callable[[GuestId], str],
    ) -> None:
        """Nothing is read before `start` or `show`."""
        self._tree = tree
        self._pages = pages
        self._name_of = name_of
        self._notices = notices
        self._lock = threading.Lock()
        self._seen: frozenset[str] | None = None
        self._conditions: Mapping[str, Condition] = {}
        self._unknown = _NOT_YET
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._asker = threading.Thread(target=self._ask_forever, name="memdevs", daemon=True)

    def show(self) -> Json:
        """Nodes, windows, regions, memdevs, ports and problems, read anew; health as last asked."""
        memory = self._tree.read_memory()
        with self._lock:
            conditions, unknown = self._conditions, self._unknown
        notes = (unknown,) if unknown and memory.cxl.memdevs else ()
        found = HostMemory(memory.nodes, with_conditions(memory.cxl, conditions))
        return memory_view(found, self._pages.read_pools(), self._name_of, notes)

    def start(self, changed: Callable[[], None] | None = None) -> None:
        """Note what there is, and follow what changes: `changed`, if given, sees to the look."""
        self._asker.start()
        self._tree.watch(changed or self.look)
        self.look()

    def look(self) -> None:
        """Something may have changed: say what did since the last look, and ask the memdevs."""
        self._compare()
        self._wanted.set()

    def _compare(self) -> None:
        with self._lock:
            try:
                found = self._tree.read_memory().cxl
            except (VirtfabricError, OSError) as error:  # in the middle of a change
                log.warning("memory cannot be read: %s", error)
                return
            seen = _lines(found)
            before, self._seen = self._seen, seen
            problems = with_conditions(found, self._conditions).problems
        if before is not None and before != seen:
            came, went = sorted(seen - before), sorted(before - seen)
            self._notices.publish("memory.changed", {"came": came, "went": went})
        if problems:
            self._notices.alert(_ALERT, "; ".join(problems))
        else:
            self._notices.settle(_ALERT)

    def _ask_forever(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended.is_set():
                return
            self._ask()

    def _ask(self) -> None:
        try:
            if not self._tree.read_memory().cxl.memdevs:
                return
            conditions, unknown = self._tree.read_conditions(self._ended), ""
        except StepCancelledError:
            return
        except (VirtfabricError, OSError) as error:
            conditions, unknown = {}, f"health and poison of the memdevs are not known: {error}"
            log.warning("%s", unknown)
        with self._lock:
            self._conditions, self._unknown = conditions, unknown
        self._compare()

    def close(self) -> None:
        """Follow nothing any more; safe to repeat."""
        self._tree.close()
        self._ended.set()
        self._wanted.set()
        if self._asker.is_alive():
            self._asker.join(_END_S)


def _lines(found: CxlInventory) -> frozenset[str]:
    """What of CXL comes and goes, in words."""
    memdevs = (f"memdev {m.label}" for m in found.memdevs)
    regions = (
        f"region of {', '.join('?' if s is None else str(s) for s in r.members)}"
        + "".join(f", node {d.node} {d.state}" for d in r.dax)
        for r in found.regions
    )
    return frozenset((*memdevs, *regions))
