"""Returnability: of every byte that a guest has, who can have it back, and why not.

Two properties that have nothing to do with each other: memory is *reclaimable* where the guest can
be made to give it to the host, and sits on a node that is *offlinable* where the host can give
that node back to a pool. Owns both answers, in words; what follows from them is for others
(`tierterms`, `deviceterms`, `victims`).

Source: Documentation/admin-guide/mm/memory-hotplug.rst (ZONE_MOVABLE, what cannot be offlined).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.amounts import Tier
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.units import GIB, Bytes, CpuSet
from virtfabric.policy.tiers import device_nodes, fixed_parts
from virtfabric.policy.tierterms import has_functions

if TYPE_CHECKING:
    from virtfabric.model.guest import FixedMemory, GuestState
    from virtfabric.model.ledger import HostSnapshot

_POOLED: Final = "it is on huge pages ({}): what the guest gives is good for their pool only"


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """A part of a guest's memory that is alike in both respects.

    Attributes:
        what: where it is: `cell 0`, `virtio-mem ua-vm0`.
        nodes: of the host, that it is bound to; empty where it is bound to none.
        why_not_reclaimable, why_not_offlinable: empty where it is.
    """

    what: str
    size: Bytes
    tier: Tier
    nodes: CpuSet
    why_not_reclaimable: str = ""
    why_not_offlinable: str = ""

    @property
    def reclaimable(self) -> bool:
        """Guest to host."""
        return not self.why_not_reclaimable

    @property
    def offlinable(self) -> bool:
        """Host to pool."""
        return not self.why_not_offlinable

    def __str__(self) -> str:
        where = f"node {self.nodes}" if self.nodes else "any node"
        parts = [
            f"{self.size} of {self.tier.upper()} ({self.what}, {where})",
            _words("reclaimable", self.why_not_reclaimable),
            _words("offlinable", self.why_not_offlinable),
        ]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For clients, as documented in docs/dbus-api.md."""
        return {
            "what": self.what, "size": int(self.size), "tier": self.tier.value,
            "nodes": list(self.nodes), "reclaimable": self.reclaimable,
            "why_not_reclaimable": self.why_not_reclaimable, "offlinable": self.offlinable,
            "why_not_offlinable": self.why_not_offlinable,
        }  # fmt: skip


def _words(word: str, why_not: str) -> str:
    return f"not {word}: {why_not}" if why_not else word


def held_memory(guest: GuestState, snapshot: HostSnapshot) -> tuple[HeldMemory, ...]:
    """Everything that a guest has now, part by part; empty for one that does not run."""
    if not guest.active:
        return ()
    if guest.mechanism is MemoryMechanism.BALLOON:
        return _ballooned(guest, snapshot)
    found = [_fixed(guest, part, part.size, snapshot) for part in fixed_parts(guest)]
    for device in guest.virtio_mem:
        nodes, what = device_nodes(guest, device), f"virtio-mem {device.alias}".rstrip()
        page = snapshot.topology.page_of(device.page)
        why = _POOLED.format(page) if page else ""
        found.append(_held(guest, what, device.current, nodes, why, snapshot, page))
    return tuple(part for part in found if part.size)


def reclaimable(guest: GuestState, tier: Tier, snapshot: HostSnapshot) -> int:
    """Bytes of a tier that the guest could be made to give; loans are never of more than that."""
    parts = held_memory(guest, snapshot)
    return sum(part.size for part in parts if part.tier is tier and part.reclaimable)


def _ballooned(guest: GuestState, snapshot: HostSnapshot) -> tuple[HeldMemory, ...]:
    """What the balloon left, of each part in proportion to its size.

    Nobody can tell which pages a balloon took.
    """
    why = _why_no_balloon(guest, snapshot)
    whole = max(1, int(guest.boot_memory))
    found, left = [], int(guest.memory_current)
    parts = fixed_parts(guest)
    for number, part in enumerate(parts, 1):
        share = int(guest.memory_current) * int(part.size) // whole
        size = left if number == len(parts) else share
        left -= size
        page = snapshot.topology.page_of(part.page)
        found.append(_held(guest, part.what, Bytes(size), part.host_nodes, why, snapshot, page))
    return tuple(part for part in found if part.size)


def _why_no_balloon(guest: GuestState, snapshot: HostSnapshot) -> str:
    if has_functions(guest, snapshot):
        return "a PCIe function pins it, a balloon would free nothing"
    if guest.on_huge_pages:
        return "it is on huge pages, of which a balloon frees hardly any"
    if not snapshot.lend_ballooned:
        return "only its balloon could free it, and nothing enforces that (memory.lend_ballooned)"
    return ""


def why_it_stays(part: FixedMemory) -> str:
    """Why nobody can make a guest give it."""
    if part.what.startswith("dimm"):
        return "the guest may have pages on the DIMM that cannot move"
    return "the guest booted with it"


def _fixed(guest: GuestState, part: FixedMemory, size: Bytes, snapshot: HostSnapshot) -> HeldMemory:
    page = snapshot.topology.page_of(part.page)
    return _held(guest, part.what, size, part.host_nodes, why_it_stays(part), snapshot, page)


def _held(
    guest: GuestState,
    what: str,
    size: Bytes,
    nodes: CpuSet,
    why: str,
    snapshot: HostSnapshot,
    page: Bytes,
) -> HeldMemory:
    cxl = snapshot.topology.cxl_nodes
    tier = Tier.CXL if nodes and nodes <= cxl else Tier.DRAM
    stays = _why_not_offlinable(guest, nodes, snapshot) or _why_page_stays(page)
    return HeldMemory(what, size, tier, nodes, why, stays)


def _why_page_stays(page: Bytes) -> str:
    """Source: mm/hugetlb.c and mm/memory_hotplug.c (Linux 6.1), do_migrate_range."""
    if page >= GIB:
        return f"it is on gigantic pages ({page}), which cannot move"
    if page:
        return f"it is on huge pages ({page}), which move only where another node has such pages"
    return ""


def _why_not_offlinable(guest: GuestState, nodes: CpuSet, snapshot: HostSnapshot) -> str:
    """The node's own reason first: it is the same for everybody on it."""
    if not nodes:
        return "it is bound to no node"
    for number in nodes:
        node = snapshot.topology.nodes.get(number)
        if node is None:
            return f"node {number} is not there"
        if not node.offlinable:
            return node.why_not_offlinable or f"node {number} is not of ZONE_MOVABLE alone"
    if has_functions(guest, snapshot):
        return "a PCIe function of the guest pins its pages"
    if guest.locked_memory:
        return "the guest's memory is locked"
    return ""
