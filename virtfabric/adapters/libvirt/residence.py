"""Where a guest's memory lies: its pages by NUMA node, and which of them are out of place.

Attaching a function pins all of a guest's memory. The kernel cannot pin what lies in ZONE_MOVABLE,
so it moves it first: memory that is bound to a movable CXL node silently lands on another one
(measured with Linux 6.12: `bind:1 N0=...`, and no error anywhere). Only numa_maps tells.

Source: Documentation/filesystems/proc.rst, numa_maps; mm/mempolicy.c, mpol_to_str.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import GuestGoneError
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BOUND: Final = re.compile(r"bind(?:=static|=relative|\+\w+)*[:=]([\d,-]+)")
_ON_NODE: Final = re.compile(r"N(\d+)=(\d+)")
_PAGE_SIZE: Final = re.compile(r"kernelpagesize_kB=(\d+)")
_FILE: Final = re.compile(r"file=(\S+)")
_GUEST_FILES: Final = ("/memfd:", "/dev/hugepages", "/dev/shm")


@dataclass(frozen=True, slots=True)
class Residence:
    """Bytes that lie outside the nodes that they are bound to, by node."""

    outside: dict[int, int]

    def strayed_since(self, before: Residence) -> dict[int, int]:
        """Bytes more than `before`, by the node where they should not be."""
        more = {n: size - before.outside.get(n, 0) for n, size in self.outside.items()}
        return {node: size for node, size in sorted(more.items()) if size > 0}


def read_residence(proc: Path, pid: int, allowed: CpuSet) -> Residence:
    """Read a process's numa_maps.

    Args:
        proc: the kernel's view of the processes.
        pid: QEMU's.
        allowed: nodes of its control group, which bind what has no policy of its own.

    Raises:
        GuestGoneError: the process is gone.
    """
    outside: dict[int, int] = {}
    try:
        with (proc / str(pid) / "numa_maps").open() as lines:
            for line in lines:
                for node, size in _read_strays(line, allowed):
                    outside[node] = outside.get(node, 0) + size
    except OSError:
        raise GuestGoneError(f"process {pid} is gone") from None
    return Residence(outside)


def is_bound(proc: Path, pid: int, node: int) -> bool:
    """Whether a process has memory that is bound to this node and to no other.

    Raises:
        GuestGoneError: the process is gone.
    """
    try:
        with (proc / str(pid) / "numa_maps").open() as lines:
            return any(_binding(line) == CpuSet((node,)) for line in lines)
    except OSError:
        raise GuestGoneError(f"process {pid} is gone") from None


def bound_size(proc: Path, pid: int, nodes: CpuSet) -> Bytes:
    """Bytes of address space that a process has bound to exactly these nodes.

    The kernel binds what was bound to a node to the others of the control group when the node
    goes, and does not turn that back when it returns (measured with Linux 6.12: `bind:1` is
    `bind:0` from then on; mm/mempolicy.c, mpol_rebind_nodemask).

    Raises:
        GuestGoneError: the process is gone.
    """
    try:
        with (proc / str(pid) / "numa_maps").open() as lines:
            bound = {line.split(maxsplit=1)[0] for line in lines if _binding(line) == nodes}
        with (proc / str(pid) / "maps").open() as lines:
            areas = (line.split(maxsplit=1)[0].split("-") for line in lines)
            size = sum(int(end, 16) - int(start, 16) for start, end in areas if start in bound)
    except OSError:
        raise GuestGoneError(f"process {pid} is gone") from None
    return Bytes(size)


def _binding(line: str) -> CpuSet | None:
    """The nodes of a mapping's own policy; None where it has none."""
    _, policy, *_ = line.split()
    bound = _BOUND.match(policy)
    return CpuSet.parse(bound[1], field="numa_maps.bind") if bound else None


def _read_strays(line: str, allowed: CpuSet) -> Iterator[tuple[int, int]]:
    file = _FILE.search(line)
    if file and not file[1].startswith(_GUEST_FILES):
        return  # a library's pages lie wherever somebody read it first
    bound = _binding(line)
    home = allowed if bound is None else bound
    size = _PAGE_SIZE.search(line)
    unit = int(size[1]) << 10 if size else 4096
    for node, pages in _ON_NODE.findall(line):
        if int(node) not in home:
            yield int(node), int(pages) * unit


def format_strays(strays: dict[int, int]) -> str:
    """`12MiB on node 0, 4KiB on node 2`."""
    return ", ".join(f"{Bytes(size)} on node {node}" for node, size in strays.items())
