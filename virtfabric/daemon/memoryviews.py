"""What `memory` shows: nodes and CXL inventory -> JSON-ready values. Pure.

The shapes are documented in docs/dbus-api.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.model.cxl import (
        Condition,
        CxlInventory,
        CxlPort,
        HostMemory,
        Memdev,
        Region,
        Serial,
        Window,
    )
    from virtfabric.model.host import NumaNode
    from virtfabric.model.hugepages import HugePools
    from virtfabric.model.ids import GuestId

    Json = dict[str, Any]


def by_serial(
    before: CxlInventory, told: Mapping[str, Condition], after: CxlInventory
) -> dict[Serial, Condition]:
    """What memdevs told, by serial: names are given anew when one is plugged meanwhile."""
    names = {m.name: serial for serial, m in before.usable.items()}
    same = {m.name for serial, m in after.usable.items() if names.get(m.name) == serial}
    return {names[name]: condition for name, condition in told.items() if name in same}


def with_conditions(found: CxlInventory, conditions: Mapping[str, Condition]) -> CxlInventory:
    """An inventory that tells how its memdevs do, with what is wrong among the problems."""
    memdevs = tuple(
        replace(m, condition=conditions[m.name]) if m.name in conditions else m
        for m in found.memdevs
    )
    problems = []
    for memdev in memdevs:
        told, who = memdev.condition, f"memdev {memdev.label} ({memdev.name})"
        if told.health not in ("", "ok"):
            problems.append(f"{who}: it says {told.health}")
        if told.poison:
            parts = "; ".join(map(str, told.poison))
            problems.append(f"{who}: poisoned {parts}{_hit(found, memdev)}")
    return replace(found, memdevs=memdevs, problems=(*found.problems, *problems))


def _hit(found: CxlInventory, memdev: Memdev) -> str:
    """Which nodes' users read from a memdev."""
    regions = [r for r in found.regions if memdev.serial is not None and memdev.serial in r.members]
    nodes = sorted({node for region in regions for node in region.nodes})
    if not nodes:
        return ""
    return f", part of the memory of node {', '.join(map(str, nodes))}: take it offline"


def memory_view(
    memory: HostMemory,
    pools: HugePools,
    name_of: Callable[[GuestId], str],
    notes: tuple[str, ...] = (),
    quarantine: Sequence[Json] = (),
) -> Json:
    """Everything; `notes` are problems beside those of the inventory."""
    cxl = memory.cxl
    regions = cxl.node_regions
    return {
        "nodes": [
            _node(node, regions.get(number)) | {"huge_pages": _pools(number, pools, name_of)}
            for number, node in sorted(memory.nodes.items())
        ],
        "windows": [_window(window, cxl) for window in cxl.windows],
        "regions": [_region(region, cxl) for region in cxl.regions],
        "memdevs": [_memdev(memdev, cxl) for memdev in cxl.memdevs],
        "ports": [_port(port) for port in cxl.ports],
        "quarantine": list(quarantine),
        "problems": [*cxl.problems, *notes],
    }


def _node(node: NumaNode, region: Region | None) -> Json:
    return {
        "node": node.number, "tier": node.tier.value, "cpus": str(node.cpus),
        "total": int(node.memory_total), "free": int(node.memory_free),
        "offlinable": node.offlinable, "why_not_offlinable": node.why_not_offlinable,
        "distances": {str(other): far for other, far in node.distances.items()},
        "bandwidth": node.access.bandwidth, "latency": node.access.latency,
        "region": region.name if region else None,
    }  # fmt: skip


def _pools(node: int, pools: HugePools, name_of: Callable[[GuestId], str]) -> list[Json]:
    """One entry for each page size, smallest first; what was made is told by the guest's name."""
    return [
        {
            "size": key.page, "total": pool.pages.total, "free": pool.pages.free,
            "reserved": pool.pages.reserved,
            "made": {name_of(guest): count for guest, count in sorted(pool.made.items())},
        }
        for key, pool in sorted(pools.pools.items())
        if key.node == node
    ]  # fmt: skip


def _window(window: Window, cxl: CxlInventory) -> Json:
    used = sum(region.size for region in cxl.regions if region.window == window.name)
    return {
        "name": window.name, "base": f"{window.base:#x}", "size": int(window.size),
        "free": max(0, int(window.size) - used), "ram": window.ram, "pmem": window.pmem,
        "ways": window.ways, "granularity": window.granularity, "targets": list(window.targets),
    }  # fmt: skip


def _region(region: Region, cxl: CxlInventory) -> Json:
    window = next((w for w in cxl.windows if w.name == region.window), None)
    return {
        "name": region.name, "window": f"{window.base:#x}" if window else None,
        "base": f"{region.base:#x}", "size": int(region.size), "mode": region.mode,
        "ways": region.ways, "granularity": region.granularity,
        "members": [None if serial is None else str(serial) for serial in region.members],
        "committed": region.committed, "ours": region.ours,
        "dax": [
            {
                "name": dax.name, "size": int(dax.size), "node": dax.node,
                "state": dax.state.value, "movable": dax.movable,
            }
            for dax in region.dax
        ],
        "problems": list(region.problems),
    }  # fmt: skip


def _memdev(memdev: Memdev, cxl: CxlInventory) -> Json:
    serial = memdev.serial
    region = next((r for r in cxl.regions if serial is not None and serial in r.members), None)
    return {
        "name": memdev.name, "serial": None if serial is None else str(serial),
        "ram": int(memdev.ram), "pmem": int(memdev.pmem), "node": memdev.node,
        "address": memdev.address, "port": memdev.port or None, "firmware": memdev.firmware,
        "health": memdev.condition.health or None,
        "poison": [
            {"offset": p.offset, "length": p.length, "source": p.source}
            for p in memdev.condition.poison
        ],
        "region": region.name if region else None, "usable": memdev.usable,
        "problems": list(memdev.problems),
    }  # fmt: skip


def _port(port: CxlPort) -> Json:
    return {
        "name": port.name, "kind": port.kind.value, "parent": port.parent or None,
        "device": port.device, "decoders": port.decoders,
    }  # fmt: skip
