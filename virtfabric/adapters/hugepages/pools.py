"""The kernel's pools of huge pages, one for each node and page size: reading and resizing.

Knows nothing of who a page is for. Roots are arguments. Source:
Documentation/admin-guide/mm/hugetlbpage.rst and mm/hugetlb.c (Linux 6.1): `nr_hugepages` of a node
shows surplus pages as well, and what is written there is the size without them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.errors import HugePagesError
from virtfabric.model.host import HugePages
from virtfabric.model.hugepages import PoolKey
from virtfabric.model.units import KIB, Bytes

log = logging.getLogger(__name__)

GLOBAL: Final = "kernel/mm/hugepages"
_NODES: Final = "devices/system/node"
_SIZE: Final = re.compile(r"hugepages-(\d+)kB")
_NODE: Final = re.compile(r"node(\d+)")
_MEM_FREE: Final = re.compile(r"MemFree:\s+(\d+) kB")


def read_huge_pages(sys: SysTree, node: int | None) -> tuple[HugePages, ...]:
    """The pools of a node, smallest pages first; None is a kernel without NUMA."""
    home = GLOBAL if node is None else f"{_NODES}/node{node}/hugepages"
    sizes = sorted(int(name[10:-2]) for name in sys.names(home, _SIZE))
    return tuple(_read_pool(sys, f"{home}/hugepages-{kib}kB", kib) for kib in sizes)


def _read_pool(sys: SysTree, home: str, kib: int) -> HugePages:
    free = _read_count(sys, f"{home}/free_hugepages")
    # the kernel keeps this one for the host as a whole: a promise binds no node
    reserved = _read_count(sys, f"{GLOBAL}/hugepages-{kib}kB/resv_hugepages")
    return HugePages(
        size=Bytes(kib * KIB),
        total=_read_count(sys, f"{home}/nr_hugepages"),
        free=free,
        reserved=min(free, reserved),
        surplus=_read_count(sys, f"{home}/surplus_hugepages"),
    )


def _read_count(sys: SysTree, path: str) -> int:
    text = sys.text(path) or ""
    return int(text) if text.isdigit() else 0


Write = Callable[[Path, str], object]


class PoolFiles:
    """Sysfs' side of the pools."""

    def __init__(self, root: Path, proc: Path, write: Write) -> None:
        """Nothing is touched before a call; `write` writes a file of these."""
        self._root, self._proc, self._write = root, proc, write
        self._sys = SysTree(root)

    def read_all(self) -> dict[PoolKey, HugePages]:
        """Every pool."""
        names = self._sys.names(_NODES, _NODE)
        if not names:
            return {PoolKey(0, p.size): p for p in read_huge_pages(self._sys, None)}
        numbers = [int(name.removeprefix("node")) for name in names]
        return {PoolKey(n, p.size): p for n in numbers for p in read_huge_pages(self._sys, n)}

    def exists(self, pool: PoolKey) -> bool:
        """Whether the host has such a pool."""
        return self._sys.text(f"{self._home(pool)}/nr_hugepages") is not None

    def read(self, pool: PoolKey) -> HugePages:
        """One pool.

        Raises:
            HugePagesError: the host has none such.
        """
        if not self.exists(pool):
            raise HugePagesError(f"this host has no pool of {pool}")
        return _read_pool(self._sys, self._home(pool), pool.page // KIB)

    def resize(self, pool: PoolKey, size: int) -> int:
        """Ask for a size, and say which one it is now: the kernel makes what it can.

        Raises:
            HugePagesError: the kernel does not take it.
        """
        path = self._root / self._home(pool) / "nr_hugepages"
        try:
            self._write(path, f"{size}\n")
        except OSError as error:
            raise HugePagesError(f"{path}: {error.strerror}") from error
        return self.read(pool).persistent

    def compact(self, node: int) -> None:
        """Let the kernel move pages together; where it does not offer that, nothing happens.

        Returns when it is done, which takes seconds on a large node. Source:
        Documentation/ABI/stable/sysfs-devices-node, Documentation/admin-guide/sysctl/vm.rst.
        """
        own = self._root / _NODES / f"node{node}" / "compact"
        everywhere = self._proc / "sys/vm/compact_memory"
        path = own if own.exists() else everywhere
        if not path.exists():
            return
        try:
            self._write(path, "1\n")
        except OSError as error:
            log.warning("%s: %s; what is free stays scattered", path, error.strerror)

    def free_memory(self, node: int) -> Bytes:
        """Bytes that nobody uses on a node; page cache is in use."""
        text = self._sys.text(f"{_NODES}/node{node}/meminfo")
        if text is None:
            text = SysTree(self._proc).text("meminfo") or ""
        found = _MEM_FREE.search(text)
        return Bytes(int(found[1]) * KIB if found else 0)

    def _home(self, pool: PoolKey) -> str:
        own = f"{_NODES}/node{pool.node}"
        base = f"{own}/hugepages" if (self._root / own).is_dir() else GLOBAL
        return f"{base}/hugepages-{pool.page // KIB}kB"
