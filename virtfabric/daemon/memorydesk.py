"""What people ask about memory, and what the agent says of it unasked: CXL that came, went, failed.

It decides nothing and changes nothing. How memdevs do is asked in a thread of its own: a poison
list takes seconds for each memdev, and nobody who looks at memory waits for that.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.memoryviews import by_serial, memory_view, with_conditions
from virtfabric.model.cxl import HostMemory
from virtfabric.model.errors import StepCancelledError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.daemon.notices import Notices
    from virtfabric.model.cxl import Condition, CxlInventory, Serial
    from virtfabric.model.ids import GuestId
    from virtfabric.ports import Clock, MemoryTree, PageTree

    Json = dict[str, Any]

log = logging.getLogger(__name__)
_ALERT: Final = "cxl"
_NOT_YET: Final = "health and poison of the memdevs have not been asked yet"
_END_S: Final = 10.0
ASK_EVERY_S: Final = 600.0
"""Poison has no event of the kernel's but a trace; 7 s for each memdev were measured."""


class MemoryDesk:
    """Thread-safe: every reading stands for itself."""

    def __init__(
        self,
        tree: MemoryTree,
        pages: PageTree,
        notices: Notices,
        clock: Clock,
        *,
        judge: Callable[[Mapping[Serial, Condition]], None],
        name_of: Callable[[GuestId], str],
    ) -> None:
        """Nothing is read before `start` or `show`.

        `judge` is given what memdevs told of themselves, in the thread that asked; it must not
        block for long.
        """
        self._tree = tree
        self._pages = pages
        self._name_of = name_of
        self._notices = notices
        self._clock = clock
        self._judge = judge
        self._due = 0.0
        self._lock = threading.Lock()
        self._seen: frozenset[str] | None = None
        self._conditions: Mapping[str, Condition] = {}
        self._unknown = _NOT_YET
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._asker = threading.Thread(target=self._ask_forever, name="memdevs", daemon=True)

    def show(self, quarantine: Sequence[Json] = ()) -> Json:
        """Nodes, windows, regions, memdevs, ports and problems, read anew; health as last asked."""
        memory = self._tree.read_memory()
        with self._lock:
            conditions, unknown = self._conditions, self._unknown
        notes = (unknown,) if unknown and memory.cxl.memdevs else ()
        found = HostMemory(memory.nodes, with_conditions(memory.cxl, conditions))
        return memory_view(found, self._pages.read_pools(), self._name_of, notes, quarantine)

    def start(self, changed: Callable[[], None] | None = None) -> None:
        """Note what there is, and follow what changes: `changed`, if given, sees to the look."""
        self._asker.start()
        self._tree.watch(changed or self.look)
        self.look()

    def look(self) -> None:
        """Something may have changed: say what did since the last look.

        The memdevs are asked where something did, and every so often: it keeps each one busy.
        """
        changed = self._compare()
        if changed or self._clock.monotonic() >= self._due:
            self._due = self._clock.monotonic() + ASK_EVERY_S
            self._wanted.set()

    def _compare(self) -> bool:
        """Whether memdevs or regions are others than at the last look."""
        with self._lock:
            try:
                found = self._tree.read_memory().cxl
            except (VirtfabricError, OSError) as error:  # in the middle of a change
                log.warning("memory cannot be read: %s", error)
                return False
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
        return before != seen

    def _ask_forever(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended.is_set():
                return
            self._ask()

    def _ask(self) -> None:
        try:
            before = self._tree.read_memory().cxl
            if not before.memdevs:
                return
            conditions, unknown = self._tree.read_conditions(self._ended), ""
            told = by_serial(before, conditions, self._tree.read_memory().cxl)
        except StepCancelledError:
            return
        except (VirtfabricError, OSError) as error:
            conditions, told = {}, {}
            unknown = f"health and poison of the memdevs are not known: {error}"
            log.warning("%s", unknown)
        with self._lock:
            self._conditions, self._unknown = conditions, unknown
        self._compare()
        self._judge(told)

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
