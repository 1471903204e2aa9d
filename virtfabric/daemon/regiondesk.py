"""What people ask about CXL regions: made and taken down as plans, through journal and executor.

It decides nothing about memory of guests: `policy.regionplans` says what stands in the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.undertaking import Undertaking, new_request, summary
from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import MemoryUse
from virtfabric.model.errors import InvalidValueError, Reason, Refusal, RefusedError
from virtfabric.model.units import Bytes
from virtfabric.policy.memoryfaults import check_members
from virtfabric.policy.regionplans import RegionWish, plan_region, plan_region_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.executor import Progress
    from virtfabric.daemon.hostwatch import HostWatch
    from virtfabric.daemon.jobs import Job, Jobs
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.model.cxl import Region
    from virtfabric.model.decision import Decision
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.plan import Plan
    from virtfabric.ports import MemoryTree

    Json = dict[str, Any]

WORDS: Final = ("window", "memdevs", "ways", "granularity", "size", "use")
_MOST_BYTES: Final = 1 << 20


class RegionDesk:
    """Starts the jobs, and shows what they would do."""

    def __init__(
        self,
        *,
        tree: MemoryTree,
        observatory: Observatory,
        conductor: Conductor,
        jobs: Jobs,
        hostwatch: HostWatch,
        look_soon: Callable[[], None],
    ) -> None:
        """`look_soon` has the host looked at again after a change; it must not block."""
        self._tree = tree
        self._observatory = observatory
        self._conductor = conductor
        self._jobs = jobs
        self._hostwatch = hostwatch
        self._look_soon = look_soon

    # -- make -------------------------------------------------------------------------------

    def preview_create(self, wants: Mapping[str, str]) -> Json:
        """The exact steps; nothing changed.

        Raises:
            RefusedError, InvalidValueError
        """
        return self._preview(self._creation(parse_wish(wants), ""))

    def create(self, wants: Mapping[str, str], *, uid: int, by: str) -> Job:
        """Start the job that makes a region.

        Raises:
            RefusedError, InvalidValueError: nothing was begun.
        """
        wish = parse_wish(wants)
        work = self._creation(wish, by)
        self._preview(work)

        def run(_: Job, progress: Progress) -> Json:
            outcome = self._conductor.conduct(work, progress)
            self._hostwatch.follow()
            self._look_soon()
            return summary(work, outcome) | self._describe(wish)

        return self._jobs.start(work.title, run, uid=uid)

    def _creation(self, wish: RegionWish, by: str) -> Undertaking:
        request = new_request()

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
            unfit = check_members(snapshot.books.memory_quarantine, wish.members)
            return unfit or plan_region(
                self._tree.read_memory(), wish, request, snapshot.generation
            )

        members = [str(serial) for serial in wish.members]
        body = {"window": wish.window, "memdevs": members, "use": wish.use.value, "by": by}
        title = f"CXL region of {', '.join(members)}"
        return Undertaking(request, title, place, body=body)

    def _describe(self, wish: RegionWish) -> Json:
        """The region that came of it, with its nodes and what is granted of them."""
        regions = self._tree.read_memory().cxl.regions
        region = next((r for r in regions if {*r.members} == {*wish.members}), None)
        if region is None:
            return {"region": None, "size": 0, "nodes": []}
        capacity = self._observatory.capacity
        nodes = [
            {
                "node": node, "grantable": int(capacity.cxl.get(node, Bytes(0))),
                "withheld": capacity.withheld.get(node, ""),
            }
            for node in region.nodes
        ]  # fmt: skip
        return {"region": region.name, "size": int(region.size), "nodes": nodes}

    # -- take down --------------------------------------------------------------------------

    def preview_destroy(self, name: str) -> Json:
        """The exact steps; nothing changed.

        Raises:
            RefusedError
        """
        self._observatory.refresh_all()
        return self._preview(self._end(self._find(name), ""))

    def destroy(self, name: str, *, uid: int, by: str) -> Job:
        """Start the job that takes a region down. Nothing is granted of its nodes meanwhile.

        Raises:
            RefusedError: nothing was begun.
        """
        region = self._find(name)
        work = self._end(region, by)
        self._observatory.refresh_all()
        self._preview(work)

        def run(_: Job, progress: Progress) -> Json:
            with self._hostwatch.withhold(region.nodes, f"{region.name} is being taken down"):
                outcome = self._conductor.conduct(work, progress)
            self._look_soon()
            return summary(work, outcome) | {"region": region.name}

        return self._jobs.start(work.title, run, uid=uid)

    def _find(self, name: str) -> Region:
        regions = self._tree.read_memory().cxl.regions
        found = next((r for r in regions if r.name == name), None)
        if found is None:
            known = ", ".join(r.name for r in regions) or "none"
            detail = f"there is no CXL region {name!r}; there are: {known}"
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, detail))
        return found

    def _end(self, region: Region, by: str) -> Undertaking:
        request = new_request()

        def place(snapshot: HostSnapshot, _: Decision | None) -> Plan | Refusal:
            memory = self._tree.read_memory()
            # by what it is made of: its name may be another's by now
            now = next((r for r in memory.cxl.regions if _same(r, region)), None)
            if now is None:
                return Refusal(Reason.UNKNOWN_ID, f"{region.name} is gone meanwhile")
            return plan_region_end(snapshot, memory, now, request)

        members = ["?" if serial is None else str(serial) for serial in region.members]
        body = {"region": region.name, "memdevs": members, "by": by}
        return Undertaking(request, f"end of CXL region {region.name}", place, body=body)

    # -- both -------------------------------------------------------------------------------

    def _preview(self, work: Undertaking) -> Json:
        answer = self._conductor.consider(work)
        if isinstance(answer, Refusal):
            raise RefusedError(answer)
        _, _, plan = answer
        return {
            "steps": [{"text": str(s), "data": s.to_json()} for s in plan.steps],
            "generation": plan.generation,
        }


def _same(one: Region, other: Region) -> bool:
    return (one.window, one.members) == (other.window, other.members)


def parse_wish(wants: Mapping[str, str]) -> RegionWish:
    """The words of a request for a region.

    Raises:
        InvalidValueError: names the word and its value.
    """
    for name in wants:
        if name not in WORDS:
            raise InvalidValueError(name, wants[name], f"is not known; known: {', '.join(WORDS)}")
    window = wants.get("window", "")
    if not window:
        raise InvalidValueError("window", window, "is missing; see virtfabric memory")
    texts = [text.strip() for text in wants.get("memdevs", "").split(",") if text.strip()]
    if not texts:
        raise InvalidValueError("memdevs", wants.get("memdevs", ""), "names no memdev")
    members = tuple(Serial.parse(text, field="memdevs") for text in texts)
    ways = _number(wants, "ways")
    if ways not in (None, len(members)):
        raise InvalidValueError("ways", wants["ways"], f"but {len(members)} memdevs are named")
    use = wants.get("use", MemoryUse.MOVABLE.value)
    if use not in (MemoryUse.MOVABLE, MemoryUse.NORMAL):
        raise InvalidValueError("use", use, "is not one of movable, normal")
    size = Bytes.parse(wants["size"], field="size") if "size" in wants else None
    return RegionWish(window, members, size, _number(wants, "granularity"), MemoryUse(use))


def _number(wants: Mapping[str, str], name: str) -> int | None:
    if name not in wants:
        return None
    text = wants[name]
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= _MOST_BYTES:
        raise InvalidValueError(name, text, f"is not a number from 1 to {_MOST_BYTES}")
    return int(text)
