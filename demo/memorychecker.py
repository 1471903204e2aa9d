"""The judge of the CXL demo: verdicts on what `memorysight` saw.

It imports nothing from virtfabric and asks the agent nothing. What is right comes from whoever
asks: which memdevs make a region, how much of which node a guest should have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from demo.checker import Finding

MIB = 1 << 20
TOLERANCE = 4 * MIB
"""What virtio-mem may stick short of, see docs/architecture.md."""
OVERHEAD = 16 * MIB
"""Of 128 MiB that a guest is given, so much at most is its kernel's own (64 bytes a page)."""


@dataclass(frozen=True, slots=True)
class RegionSight:
    """A region by `cxl list`; `serials` in the order of interleaving."""

    name: str
    size: int
    committed: bool
    serials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceSight:
    """A memory device in the live XML; `nodes`: of the host."""

    alias: str
    nodes: str
    requested: int
    current: int


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """A guest.

    Attributes:
        pid: of its QEMU, None when it does not run.
        inside: MemTotal as the guest itself tells it, bytes.
        functions: how many `<hostdev>` there are.
        pages: bytes by node where they lie, by the nodes that they are bound to (`-`: none).
    """

    pid: int | None
    ready: bool
    inside: int
    devices: tuple[DeviceSight, ...]
    functions: int
    pages: dict[str, dict[int, int]]

    def on_node(self, node: int) -> int:
        """Bytes that lie there, bound or not."""
        return sum(there.get(node, 0) for there in self.pages.values())

    @property
    def holdings(self) -> tuple[object, ...]:
        """What a request may change."""
        return (self.devices, self.functions)


@dataclass(frozen=True, slots=True)
class MemorySight:
    """Host and guests at one moment; `nodes`: total and free bytes of those online."""

    nodes: dict[int, tuple[int, int]]
    memdevs: tuple[str, ...]
    regions: tuple[RegionSight, ...]
    movable: tuple[bool, ...]
    guests: dict[str, GuestMemory]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `memorysight` printed."""
        return cls(
            nodes={int(n): (seen["total"], seen["free"]) for n, seen in data["nodes"].items()},
            memdevs=tuple(data["memdevs"]),
            regions=tuple(
                RegionSight(r["name"], r["size"], r["committed"], tuple(r["serials"]))
                for r in data["regions"]
            ),
            movable=tuple(data["movable"]),
            guests={
                name: GuestMemory(
                    pid=seen["pid"],
                    ready=seen["ready"],
                    inside=seen["inside"],
                    devices=tuple(DeviceSight(**device) for device in seen["devices"]),
                    functions=seen["functions"],
                    pages={
                        bound: {int(node): size for node, size in there.items()}
                        for bound, there in seen["pages"].items()
                    },
                )
                for name, seen in data["guests"].items()
            },
        )


def _judge(what: str, *, found: object, ok: bool) -> Finding:
    return (ok, what if ok else f"{what}: no, found {found}")


def expect_region(seen: MemorySight, serials: tuple[str, ...], node: int) -> list[Finding]:
    """One region, of just these memdevs, whose memory is a node that can be taken back."""
    found = [region.serials for region in seen.regions if region.committed]
    total = seen.nodes.get(node, (0, 0))[0]
    return [
        _judge(
            f"cxl list: one region, committed, of {', '.join(serials)}",
            found=seen.regions, ok=found == [serials] and len(seen.regions) == 1,
        ),
        _judge(
            f"the kernel has node {node} online, with {total // MIB} MiB",
            found=sorted(seen.nodes), ok=total > 0,
        ),
        _judge(
            "daxctl list: its memory is movable", found=seen.movable,
            ok=bool(seen.movable) and all(seen.movable),
        ),
    ]  # fmt: skip


def expect_no_region(seen: MemorySight, node: int) -> list[Finding]:
    """No region, no dax device, no memory of the node."""
    return [
        _judge("cxl list: no region", found=seen.regions, ok=not (seen.regions or seen.movable)),
        _judge(f"the kernel has no node {node}", found=seen.nodes, ok=node not in seen.nodes),
    ]


def expect_plugged(seen: MemorySight, guest: str, node: int, size: int) -> list[Finding]:
    """The guest has so much of the node: by its live XML, and by the kernel's binding."""
    now = seen.guests[guest]
    there = [device for device in now.devices if device.nodes == str(node)]
    requested, current = (sum(getattr(d, w) for d in there) for w in ("requested", "current"))
    bound = now.pages.get(str(node))
    strayed = {n: size for n, size in (bound or {}).items() if n != node and size}
    return [
        _judge(
            f"{guest}: {size // MIB} MiB of node {node} in its live XML, requested and plugged",
            found=there, ok=requested == size and abs(current - size) <= (TOLERANCE if size else 0),
        ),
        _judge(
            f"{guest}: numa_maps has memory bound to node {node}, and no page of it elsewhere",
            found=now.pages, ok=bound is not None and not strayed,
        ),
    ]  # fmt: skip


def expect_touched(seen: MemorySight, guest: str, node: int) -> Finding:
    """Pages of the guest lie there."""
    size = seen.guests[guest].on_node(node)
    what = f"{guest}: numa_maps has {size >> 10} KiB of its pages on node {node}"
    return _judge(what, found=seen.guests[guest].pages, ok=size > 0)


def expect_nothing_on(seen: MemorySight, guest: str, node: int) -> Finding:
    """No page of the guest lies there."""
    size = seen.guests[guest].on_node(node)
    return _judge(
        f"{guest}: numa_maps has no page on node {node}", found=f"{size >> 10} KiB", ok=not size
    )


def expect_grown(seen: MemorySight, before: MemorySight, guest: str, by: int) -> Finding:
    """The guest itself tells of so much more memory than before; 0: of as much as before."""
    grown = seen.guests[guest].inside - before.guests[guest].inside
    ok = by - OVERHEAD - TOLERANCE <= grown <= by if by else abs(grown) <= TOLERANCE
    what = f"{guest}: inside, MemTotal is {grown / MIB:+.0f} MiB of what it was"
    return _judge(what, found=seen.guests[guest].inside, ok=ok)


def expect_same_processes(seen: MemorySight, before: MemorySight) -> Finding:
    """No guest was restarted."""
    then = {name: guest.pid for name, guest in before.guests.items() if guest.pid}
    now = {name: seen.guests[name].pid for name in then}
    ok = now == then and bool(then)
    return _judge("the guests are the same processes as before", found=now, ok=ok)


def expect_unchanged(seen: MemorySight, before: MemorySight) -> Finding:
    """Regions, nodes, and what each guest has, are as they were."""
    then = {name: guest.holdings for name, guest in before.guests.items()}
    now = {name: seen.guests[name].holdings for name in then if name in seen.guests}
    same = (seen.regions, seen.nodes.keys(), now) == (before.regions, before.nodes.keys(), then)
    return _judge("nothing changed in kernel and libvirt", found=(seen.regions, now), ok=same)


def expect_host_as_found(seen: MemorySight, first: MemorySight) -> Finding:
    """The same nodes, memdevs and regions."""
    found = (sorted(seen.nodes), seen.memdevs, seen.regions, seen.movable)
    ok = found == (sorted(first.nodes), first.memdevs, first.regions, first.movable)
    return _judge("nodes, memdevs and regions are as found", found=found, ok=ok)
