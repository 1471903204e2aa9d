"""Memory that failed: poisoned, pulled out, broken. Put into quarantine, told, let out by command.

What counts as a fault and what to do about it is `policy.memoryfaults`' to say. Nothing here moves
memory: of a node in quarantine nothing more is granted, and who has some is named.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from virtfabric.daemon.memoryviews import by_serial
from virtfabric.model.cxl import CxlInventory
from virtfabric.model.errors import Reason, Refusal, RefusedError, VirtfabricError
from virtfabric.policy.memoryfaults import (
    check_release,
    describe_broken_dram,
    describe_fault,
    find_broken_pages,
    find_poison,
    find_removed,
    guests_hit,
    in_force,
    nodes_of,
    remedy_for,
    remembered,
    with_faults,
    withheld_nodes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.cxl import Condition, HostMemory, Serial
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import Books
    from virtfabric.model.memoryquarantine import MemoryQuarantine
    from virtfabric.ports import AuditLog, Clock, Journal, MemoryTree

    Json = dict[str, Any]

log = logging.getLogger(__name__)


class MemoryWatch:
    """Thread-safe. Told by whoever looks: after a change, every so often, when memdevs were asked.

    Of what it finds nothing is granted once the host is followed again: the callers see to that.
    """

    def __init__(
        self,
        *,
        tree: MemoryTree,
        observatory: Observatory,
        ledger: Ledger,
        journal: Journal,
        audit: AuditLog,
        notices: Notices,
        jobs: Jobs,
        clock: Clock,
        follow: Callable[[], None],
    ) -> None:
        """`follow` has what may be granted resolved anew."""
        self._tree = tree
        self._observatory = observatory
        self._ledger = ledger
        self._journal = journal
        self._audit = audit
        self._notices = notices
        self._jobs = jobs
        self._clock = clock
        self._follow = follow
        self._lock = threading.Lock()
        self._before: CxlInventory | None = None
        known = ledger.view().books.memory_quarantine
        self._told = {entry.subject: entry for entry in in_force(known)}  # by an agent before

    # -- looking ----------------------------------------------------------------------------------

    def look(self) -> None:
        """Compare with the last look: memdevs that went, pages that broke. Asks no memdev.

        Raises:
            VirtfabricError: the disk is full; a later look does it.
        """
        memory, broken = self._read(), self._tree.read_broken_pages()
        if memory is None:
            return
        with self._lock:
            before, now = self._before, self._clock.now()
            known = self._ledger.view().books.memory_quarantine
            found = list(find_broken_pages(memory, broken, known, now))
            if before is not None:
                found += find_removed(before, memory, now)
            self._put(found, broken)
            # only now: what could not be stored is found again
            self._before = remembered(before, memory)
            self._tell(memory.cxl)
            self._tell_dram(memory, broken)

    def judge(self, conditions: Mapping[Serial, Condition]) -> bool:
        """What memdevs just told of themselves; whether anything went into quarantine for it.

        Raises:
            VirtfabricError: as for `look`.
        """
        memory = self._read()
        if memory is None:
            return False
        with self._lock:
            changed = self._put(list(find_poison(memory.cxl, conditions, self._clock.now())))
            self._tell(memory.cxl)
        return changed

    def _read(self) -> HostMemory | None:
        try:
            return self._tree.read_memory()
        except (VirtfabricError, OSError) as error:  # in the middle of a change
            log.warning("memory cannot be read: %s", error)
            return None

    def _put(
        self, found: Collection[MemoryQuarantine], broken: Mapping[int, int] | None = None
    ) -> bool:
        def change(books: Books) -> Books:
            entries = dict(with_faults(books.memory_quarantine, found, broken))
            return replace(books, memory_quarantine=entries)

        books = self._ledger.view().books
        if change(books) == books:
            return False
        self._ledger.commit(None, change, self._journal.store_books)
        return True

    def withheld(self) -> Mapping[int, str]:
        """Nodes of which nothing may be granted, with why."""
        known = self._ledger.view().books.memory_quarantine
        if not in_force(known):
            return {}
        memory = self._read()
        with self._lock:
            before = self._before
        cxl = memory.cxl if memory is not None else before
        return withheld_nodes(known, cxl or CxlInventory())

    # -- telling ----------------------------------------------------------------------------------

    def _tell(self, cxl: CxlInventory) -> None:
        """An alert for each, as long as it lasts; an audit record when it came and when it went."""
        snapshot = self._observatory.snapshot()
        entries = {e.subject: e for e in in_force(snapshot.books.memory_quarantine)}
        for subject, entry in entries.items():
            text = describe_fault(entry, snapshot, cxl)
            known = self._told.get(subject)
            if known is None or known.why != entry.why:
                hit = guests_hit(entry, snapshot, cxl)
                self._record("memory.quarantined", entry, hit, {"text": text})
            self._notices.alert(f"memory {subject}", text)
        for subject in self._told.keys() - entries.keys():
            self._notices.settle(f"memory {subject}")
        self._told = entries

    def _tell_dram(self, memory: HostMemory, broken: Mapping[int, int]) -> None:
        snapshot = self._observatory.snapshot()
        for number in memory.nodes.keys() - snapshot.topology.cxl_nodes:
            topic, pages = f"broken pages of node {number}", broken.get(number, 0)
            if pages and number not in memory.cxl.node_regions:
                self._notices.alert(topic, describe_broken_dram(number, pages, snapshot))
            else:
                self._notices.settle(topic)

    def _record(
        self, kind: str, entry: MemoryQuarantine, guests: Sequence[GuestId], more: Json
    ) -> None:
        body = {"subject": entry.subject, "fault": entry.fault.value, "why": entry.why} | more
        try:
            self._audit.append(kind, [entry.subject, *guests], body)
        except VirtfabricError as error:
            log.error("%s of %s cannot be recorded: %s", kind, entry.subject, error)
        self._notices.publish(kind, body)

    # -- asked ------------------------------------------------------------------------------------

    def show(self) -> list[Json]:
        """What is in quarantine, by subject, with the way out."""
        snapshot, memory = self._observatory.snapshot(), self._read()
        entries = in_force(snapshot.books.memory_quarantine)
        if memory is None or not entries:
            return []
        return [
            {
                "subject": entry.subject, "fault": entry.fault.value, "why": entry.why,
                "since": entry.since, "region": entry.region or None,
                "nodes": list(nodes_of(entry, memory.cxl)),
                "remedy": remedy_for(entry, snapshot, memory.cxl),
            }
            for entry in sorted(entries, key=lambda entry: entry.subject)
        ]  # fmt: skip

    def release(self, subject: str, *, uid: int, by: str) -> Job:
        """Start the job that lets it out, after a fresh look: the memdevs are asked, in seconds.

        Raises:
            RefusedError: it is not in quarantine.
        """
        entry = self._find(subject)

        def run(job: Job, _: Any) -> Json:
            conditions = self._ask(job.cancelled)
            memory = self._tree.read_memory()
            refusal = check_release(entry, memory, conditions)
            if refusal is not None:
                raise RefusedError(refusal)
            with self._lock:
                books = self._ledger.commit(
                    None, lambda books: _released(books, entry), self._journal.store_books
                )
                if entry.subject in (e.subject for e in in_force(books.memory_quarantine)):
                    raise RefusedError(_worse(books.memory_quarantine[entry.subject]))
                self._forget(entry)
                self._record("memory.released", entry, (), {"by": by})
                self._tell(memory.cxl)
            self._follow()
            return {"subject": entry.subject, "was": entry.why}

        return self._jobs.start(f"release of {entry.subject} from quarantine", run, uid=uid)

    def _forget(self, entry: MemoryQuarantine) -> None:
        """What is left of its region is known, and no news at the next look."""
        if self._before is not None:
            sound = [r for r in self._before.regions if entry.subject not in map(str, r.members)]
            self._before = replace(self._before, regions=tuple(sound))

    def _find(self, subject: str) -> MemoryQuarantine:
        entry = self._ledger.view().books.memory_quarantine.get(subject)
        if entry is None or entry.lifted:
            detail = f"{subject} is not in quarantine (virtfabric memory)"
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, detail))
        return entry

    def _ask(self, cancelled: threading.Event) -> Mapping[Serial, Condition]:
        found = self._tree.read_memory().cxl
        if not found.memdevs:
            return {}
        return by_serial(found, self._tree.read_conditions(cancelled), self._tree.read_memory().cxl)


def _released(books: Books, entry: MemoryQuarantine) -> Books:
    """Without it, unless there is something new; of broken pages their number is kept."""
    entries = dict(books.memory_quarantine)
    now = entries.pop(entry.subject, None)
    if now is not None and (now.why != entry.why or entry.pages):
        entries[entry.subject] = now if now.why != entry.why else replace(now, lifted=True)
    return replace(books, memory_quarantine=entries)


def _worse(entry: MemoryQuarantine) -> Refusal:
    return Refusal(Reason.STALE, f"{entry.subject}: meanwhile something new was found: {entry.why}")
