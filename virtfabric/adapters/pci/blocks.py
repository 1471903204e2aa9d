"""Block devices of the host and what is made of them: partitions, LVM, RAID, NVMe multipath.

Reads only. Sources: Documentation/ABI/stable/sysfs-block, proc(5).
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.device import HostUse, UseKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from virtfabric.adapters.pci.tree import SysTree

_ANY: Final = re.compile(r".+")
_PATH: Final = re.compile(r"nvme(\d+)c\d+n(\d+)")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


@dataclass(slots=True)
class Block:
    """A block device, whole or partition.

    Attributes:
        home: its path below `devices`.
        number: `259:0`.
        label: what people call it; of a device-mapper one, its name there.
        holders: devices that are made of it.
        above: all that is reached through it: partitions, holders, the head of a path.
    """

    name: str
    home: str
    number: str
    label: str
    holders: list[str]
    above: list[str]


@dataclass(frozen=True, slots=True)
class _Users:
    """Who uses block devices: mount points by device number or name, swaps by name."""

    mounts: Mapping[str, Sequence[str]]
    swaps: frozenset[str]
    btrfs: frozenset[str]


def read_blocks(sys: SysTree, asked: Callable[[str], bool]) -> dict[str, Block]:
    """The block devices at places that are asked for and all that is made of them, by name."""
    homes = {name: sys.link(f"class/block/{name}") for name in sys.names("class/block", _ANY)}
    parts: dict[str, list[str]] = {}
    for name, home in homes.items():
        disk = posixpath.basename(posixpath.dirname(home or ""))
        if disk in homes:
            parts.setdefault(disk, []).append(name)
    blocks: dict[str, Block] = {}
    open_names = [name for name, home in homes.items() if home is not None and asked(home)]
    while open_names:
        name = open_names.pop()
        home = homes.get(name)
        if home is not None and name not in blocks:
            blocks[name] = _read_block(sys, name, home, parts.get(name, []))
            open_names += blocks[name].above
    return blocks


def _read_block(sys: SysTree, name: str, home: str, parts: list[str]) -> Block:
    holders = sys.names(f"{home}/holders", _ANY)
    # With multipath the namespace is a virtual device, and only its paths are below functions.
    path = _PATH.fullmatch(name)
    heads = [] if path is None else [f"nvme{path[1]}n{path[2]}"]
    return Block(
        name=name,
        home=home,
        number=sys.text(f"{home}/dev") or "",
        label=sys.text(f"{home}/dm/name") or name,
        holders=holders,
        above=[*holders, *parts, *heads],
    )


def read_block_users(sys: SysTree, proc: SysTree) -> _Users:
    """Mounts, swaps and members of mounted btrfs file systems."""
    mounts: dict[str, list[str]] = {}
    for keys, point in _read_mounts(proc):
        for key in keys:
            mounts.setdefault(key, []).append(point)
    members = (
        sys.names(f"fs/btrfs/{one}/devices", _ANY)
        for one in sys.names("fs/btrfs", re.compile(r"[0-9a-f-]{36}"))
    )
    swaps = (proc.text("swaps") or "").splitlines()[1:]
    return _Users(
        mounts=mounts,
        swaps=frozenset(posixpath.basename(line.split()[0]) for line in swaps if line.strip()),
        btrfs=frozenset(name for names in members for name in names),
    )


def _read_mounts(proc: SysTree) -> Iterator[tuple[list[str], str]]:
    """For each mount, what it may be known by (device number, names of devices) and where it is.

    btrfs, bcachefs and overlays have a device number of no device; then the source is what tells.
    """
    for line in (proc.text("self/mountinfo") or "").splitlines():
        front, _, back = line.partition(" - ")
        fields, source = front.split(), [*back.split(), "", ""][1]
        if len(fields) < 5:
            continue
        names = [posixpath.basename(s) for s in source.split(":") if s.startswith("/dev/")]
        yield [fields[2], *names], _ESCAPE.sub(lambda m: chr(int(m[1], 8)), fields[4])


def find_reached(roots: Sequence[str], blocks: Mapping[str, Block]) -> list[Block]:
    """These block devices and everything made of them, each once."""
    found: dict[str, Block] = {}
    open_names = list(roots)
    while open_names:
        block = blocks.get(open_names.pop(0))
        if block is not None and block.name not in found:
            found[block.name] = block
            open_names += block.above
    return list(found.values())


def find_uses(block: Block, users: _Users) -> Iterator[HostUse]:
    """How the host uses one block device itself."""
    keys = dict.fromkeys((block.number, block.name, block.label))
    points = sorted(
        {p for key in keys for p in users.mounts.get(key, ())}, key=lambda p: (len(p), p)
    )
    if points:
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        yield HostUse(UseKind.MOUNTED, f"{block.label} on {points[0]}{more}")
    elif block.name in users.btrfs:
        yield HostUse(UseKind.MOUNTED, f"{block.label} is part of a mounted btrfs")
    if users.swaps & keys.keys():
        yield HostUse(UseKind.SWAP, block.label)
    for holder in block.holders:
        yield HostUse(UseKind.STACKED, f"{block.label} is part of {holder}")
