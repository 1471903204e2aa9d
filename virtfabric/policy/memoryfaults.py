"""Memory faults: which memdevs and CXL nodes are not to be trusted, and what follows from it. Pure.

Owns what counts as a fault, which nodes it takes out of use, what keeps it from leaving quarantine,
and the words for an operator. It moves nothing: guests stay where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.memoryquarantine import MemoryFault, MemoryQuarantine
from virtfabric.model.units import Bytes
from virtfabric.policy.regionplans import users_of_node
from virtfabric.policy.tiers import bytes_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from virtfabric.model.cxl import Condition, CxlInventory, HostMemory, Region, Serial
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot

    Quarantined = Mapping[str, MemoryQuarantine]

_SHOWN = 4
"""Poison records that are told."""


def describe_region(cxl: CxlInventory, region: Region) -> str:
    """By what it is made of: its name is another's after the next boot."""
    window = next((f" in window {w.base:#x}" for w in cxl.windows if w.name == region.window), "")
    members = ", ".join("?" if serial is None else str(serial) for serial in region.members)
    return f"CXL region of {members}{window}"


# -- found -----------------------------------------------------------------------------------------


def find_poison(
    cxl: CxlInventory, conditions: Mapping[Serial, Condition], at: float
) -> Iterator[MemoryQuarantine]:
    """Memdevs that list poison, whether a region is made of them or not."""
    for serial in cxl.usable:
        poison = conditions[serial].poison if serial in conditions else ()
        if poison:
            more = f" and {len(poison) - _SHOWN} more" if len(poison) > _SHOWN else ""
            parts = ", ".join(map(str, poison[:_SHOWN])) + more
            region = next((r for r in cxl.regions if serial in r.members), None)
            yield MemoryQuarantine(
                str(serial), MemoryFault.POISON, f"memdev {serial} is poisoned: {parts}", at,
                describe_region(cxl, region) if region else "", region.nodes if region else (),
            )  # fmt: skip


def find_removed(before: CxlInventory, now: HostMemory, at: float) -> Iterator[MemoryQuarantine]:
    """Memdevs that are gone while something of their region is left.

    One that was pulled after its region had ended leaves neither region nor memory. The kernel
    cannot take memory back that is in use: the node stays, and nobody answers for it (measured).
    """
    there = {memdev.serial for memdev in now.cxl.memdevs}
    for region in before.regions:
        nodes = tuple(n for n in region.nodes if is_orphan(now, n))
        if not nodes and not any(_is_rest_of(r, region) for r in now.cxl.regions):
            continue
        for serial in region.members:
            if serial is not None and serial not in there:
                why = f"memdev {serial} was taken out while it was in use"
                name = describe_region(before, region)
                yield MemoryQuarantine(
                    str(serial), MemoryFault.REMOVED, why, at, name, region.nodes
                )  # fmt: skip


def remembered(before: CxlInventory | None, now: HostMemory) -> CxlInventory:
    """What the next look is compared with: whole regions, also those of which a part is left.

    The kernel takes a region apart piece by piece, and a look may come in between.
    """
    whole = [r for r in now.cxl.regions if r.nodes and None not in r.members]
    places = {(r.window, r.base) for r in whole}
    gone = [r for r in (before.regions if before else ()) if (r.window, r.base) not in places]
    left = (
        r
        for r in gone
        if any(is_orphan(now, n) for n in r.nodes)
        or any(_is_rest_of(rest, r) for rest in now.cxl.regions)
    )
    return replace(now.cxl, regions=(*whole, *left))


def _is_rest_of(now: Region, before: Region) -> bool:
    same_place = (now.window, now.base) == (before.window, before.base)
    return same_place and (None in now.members or now.members == before.members)


def is_orphan(memory: HostMemory, number: int) -> bool:
    """Whether a node that was CXL's has memory still, and no region that it is of."""
    node = memory.nodes.get(number)
    return node is not None and node.memory_total > 0 and number not in memory.cxl.node_regions


def find_broken_pages(
    memory: HostMemory, broken: Mapping[int, int], known: Quarantined, at: float
) -> Iterator[MemoryQuarantine]:
    """CXL nodes with more broken pages than are known of."""
    for number, region in memory.cxl.node_regions.items():
        subject, pages = f"node{number}", broken.get(number, 0)
        if pages > (known[subject].pages if subject in known else 0):
            why = f"the kernel has taken {pages} broken pages of node {number} out of use"
            name = describe_region(memory.cxl, region)
            yield MemoryQuarantine(
                subject, MemoryFault.BROKEN_PAGES, why, at, name, (number,), pages
            )


def with_faults(
    known: Quarantined, found: Iterable[MemoryQuarantine], broken: Mapping[int, int] | None = None
) -> Quarantined:
    """With these in quarantine; one that is there already keeps its time, and its first fault.

    Args:
        known: as it is; the answer is this very object where nothing is to change.
        found: what is wrong now.
        broken: the kernel's counters, if they were read: known pages of a former boot are dropped.
    """
    result = dict(known)
    for one in found:
        before = result.get(one.subject)
        if before is None or before.lifted:
            result[one.subject] = one
        elif before.fault is one.fault:
            nodes = tuple(sorted({*before.nodes, *one.nodes}))
            result[one.subject] = replace(
                one, since=before.since, nodes=nodes, region=one.region or before.region
            )
    if broken is not None:
        for subject, entry in known.items():
            counted = sum(broken.get(n, 0) for n in entry.nodes)
            if entry.lifted and counted < entry.pages and result[subject] is entry:
                del result[subject]
    return known if result == known else result


# -- what follows ----------------------------------------------------------------------------------


def in_force(known: Quarantined) -> list[MemoryQuarantine]:
    """Those of which nothing is granted."""
    return [entry for entry in known.values() if not entry.lifted]


def nodes_of(entry: MemoryQuarantine, cxl: CxlInventory) -> tuple[int, ...]:
    """The nodes that it is part of now; those it was, where no sound region became them since."""
    now = {n for r in cxl.regions if entry.subject in map(str, r.members) for n in r.nodes}
    if entry.fault is MemoryFault.BROKEN_PAGES:
        return entry.nodes
    return tuple(sorted(now | {n for n in entry.nodes if n not in cxl.node_regions}))


def withheld_nodes(known: Quarantined, cxl: CxlInventory) -> dict[int, str]:
    """Why nothing is granted of a node, by number."""
    return {
        node: f"in quarantine: {entry.why} (virtfabric memory)"
        for entry in in_force(known)
        for node in nodes_of(entry, cxl)
    }


def check_members(known: Quarantined, members: Sequence[Serial]) -> Refusal | None:
    """Why no region may be made of these memdevs."""
    for serial in members:
        entry = known.get(str(serial))
        if entry is not None and not entry.lifted:
            detail = f"memdev {serial} is in quarantine: {entry.why}; {_release(entry)}"
            return Refusal(Reason.DEVICE_IN_USE, detail)
    return None


def check_release(
    entry: MemoryQuarantine, memory: HostMemory, conditions: Mapping[Serial, Condition]
) -> Refusal | None:
    """Why it may not leave quarantine.

    Args:
        entry: as it stands in the books.
        memory: freshly read.
        conditions: freshly asked, of every memdev that answered.
    """
    orphans = [str(n) for n in entry.nodes if is_orphan(memory, n)]
    if entry.fault is not MemoryFault.BROKEN_PAGES and orphans:
        detail = (
            f"node {', '.join(orphans)} has memory still that nothing answers for: reading it ends "
            "in machine checks; only a reboot of the host takes it away"
        )
        return Refusal(Reason.DEVICE_IN_USE, detail)
    if entry.fault is not MemoryFault.POISON:
        return None
    memdev = next((m for m in memory.cxl.memdevs if str(m.serial) == entry.subject), None)
    if memdev is None or memdev.serial is None:  # taken out, and its region with it
        return None
    if memdev.serial not in conditions:
        detail = f"memdev {entry.subject} does not tell how it does (cxl list --media-errors)"
        return Refusal(Reason.DEVICE_IN_USE, detail)
    poison = conditions[memdev.serial].poison
    if not poison:
        return None
    detail = (
        f"memdev {entry.subject} lists poison still ({', '.join(map(str, poison[:_SHOWN]))}); "
        f"{_clear(memdev.name, poison[0].offset)}"
    )
    return Refusal(Reason.DEVICE_IN_USE, detail)


def _clear(name: str, offset: int) -> str:
    return (
        "replace it, or clear each part, which writes zeroes there: "
        f"echo {offset:#x} > /sys/kernel/debug/cxl/{name}/clear_poison"
    )


def _release(entry: MemoryQuarantine) -> str:
    return f"when it is sane: virtfabric memory release {entry.subject}"


# -- for people ------------------------------------------------------------------------------------


def describe_fault(entry: MemoryQuarantine, snapshot: HostSnapshot, cxl: CxlInventory) -> str:
    """What happened, to whom, what was done about it, and what is left to do."""
    nodes = nodes_of(entry, cxl)
    where = f"node {', '.join(map(str, nodes))}"
    parts = [entry.why]
    if entry.region:
        parts.append(f"it is part of the {entry.region}" + (f", {where}" if nodes else ""))
    parts.append(f"guests with memory there: {_users(snapshot, nodes) or 'none'}")
    done = [f"nothing more of {where} is granted"] if nodes else []
    if entry.fault is not MemoryFault.BROKEN_PAGES:
        done.append(f"no region is made of {entry.subject}")
    parts.append(f"done: {', '.join(done)}; they were not moved")
    return "; ".join((*parts, f"to do: {remedy_for(entry, snapshot, cxl)}"))


def remedy_for(entry: MemoryQuarantine, snapshot: HostSnapshot, cxl: CxlInventory) -> str:
    """The way out, in commands."""
    nodes = nodes_of(entry, cxl)
    steps = [_take_away(snapshot, nodes)] if _users(snapshot, nodes) else []
    if entry.fault is MemoryFault.REMOVED:
        steps.append("reboot the host where the node keeps its memory, as nothing answers for it")
    else:
        regions = [r for r in cxl.regions if {*r.nodes} & {*nodes}]
        steps += [_end(region) for region in regions]
        steps.append("mend or replace the memdev")
    return ", then ".join((*steps, _release(entry)))


def _end(region: Region) -> str:
    if region.ours:
        return f"virtfabric memory region destroy {region.name}"
    return f"take down {region.name}, which was made by hand (daxctl offline-memory, cxl)"


def guests_hit(entry: MemoryQuarantine, snapshot: HostSnapshot, cxl: CxlInventory) -> list[GuestId]:
    """Guests that have memory which may lie there."""
    names = {n for node in nodes_of(entry, cxl) for n in users_of_node(snapshot, node)}
    return sorted(uuid for uuid, guest in snapshot.guests.items() if guest.name in names)


def _users(snapshot: HostSnapshot, nodes: Iterable[int]) -> str:
    found: dict[str, int] = {}
    for node in nodes:
        for name, size in users_of_node(snapshot, node).items():
            found[name] = found.get(name, 0) + size
    return ", ".join(f"{name} {Bytes(size)}" for name, size in sorted(found.items()))


def _take_away(snapshot: HostSnapshot, nodes: Iterable[int]) -> str:
    """Called home from whoever can give it; all others shut down."""
    ways, stuck = [], set()
    for node in nodes:
        able = {g.name for g in snapshot.guests.values() if g.active and _gives(g, node)}
        if able:
            ways.append(f"virtfabric memory reclaim {node} --detach")
        stuck |= users_of_node(snapshot, node).keys() - able
        stuck |= {g.name for g in snapshot.guests.values() if g.active and bytes_on(g, node)[0]}
    if stuck:
        ways.append(f"shut down {', '.join(sorted(stuck))}")
    return "take the memory away from them: " + ", ".join(ways)


def _gives(guest: GuestState, node: int) -> bool:
    """Whether it has memory of the node that it can be asked for."""
    return guest.managed and bytes_on(guest, node)[1] > 0


def describe_broken_dram(number: int, pages: int, snapshot: HostSnapshot) -> str:
    """Broken pages of DRAM are gone from use, and the rest of the node is as it was."""
    users = _users(snapshot, (number,)) or "none"
    return (
        f"the kernel has taken {pages} broken pages of node {number} (DRAM) out of use since the "
        f"host booted; guests bound to the node: {users}; a guest that had one was told by a "
        "machine check, or ended: see dmesg and its log; plan to replace the DIMM"
    )
