"""Sysfs of a host with pools of huge pages, and what its kernel does when they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.adapters.hugepages.handler import HugePagesHandler, SysfsHugePages
from virtfabric.model.hugepages import PoolKey
from virtfabric.model.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = PoolKey(0, 2 * MIB)
LARGE = PoolKey(1, GIB)
NODES = "devices/system/node"


class PageKernel:
    """Two nodes, pools of 2 MiB and 1 GiB; files follow what is written, as in mm/hugetlb.c.

    Attributes:
        used: pages that somebody has, by pool.
        whole: of each node, bytes that are free and lie together; `compact` adds `scattered`.
        written: paths, in order.
    """

    def __init__(self, directory: Path, *, numa: bool = True) -> None:
        self.sys, self.proc = directory / "sys", directory / "proc"
        self.tallies = directory / "run" / "hugepages"
        self.numa = numa
        self.nodes = (0, 1) if numa else (0,)
        self.whole = dict.fromkeys(self.nodes, 8 * GIB)
        self.scattered = dict.fromkeys(self.nodes, 0)
        self.sizes = {PoolKey(n, page): 0 for n in self.nodes for page in (2 * MIB, GIB)}
        self.used = dict.fromkeys(self.sizes, 0)
        self.reserved = {2 * MIB: 0, GIB: 0}
        self.written: list[str] = []
        self._shown: dict[Path, str] = {}
        (self.proc / "sys/vm").mkdir(parents=True)
        (self.proc / "sys/vm/compact_memory").write_text("")
        for node in self.nodes if numa else ():
            (self.sys / NODES / f"node{node}").mkdir(parents=True)
            (self.sys / NODES / f"node{node}/compact").write_text("")
        self.show()

    @property
    def pages(self) -> SysfsHugePages:
        return SysfsHugePages(self.sys, self.proc, tallies=self.tallies, write=self.write)

    @property
    def handler(self) -> HugePagesHandler:
        return HugePagesHandler(self.pages)

    def home(self, pool: PoolKey) -> Path:
        name = f"hugepages-{pool.page // KIB}kB"
        if not self.numa:
            return self.sys / "kernel/mm/hugepages" / name
        return self.sys / NODES / f"node{pool.node}/hugepages" / name

    def total(self, pool: PoolKey) -> int:
        """Those that are in use stay, whatever the size is."""
        return max(self.sizes[pool], self.used[pool])

    def show(self) -> None:
        """Bring the files to what there is; the others are not written again."""
        shown = dict(self._texts())
        for path, text in shown.items():
            if self._shown.get(path) != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        self._shown = shown

    def _texts(self) -> Iterator[tuple[Path, str]]:
        for pool in self.sizes:
            home, total = self.home(pool), self.total(pool)
            yield home / "nr_hugepages", f"{total}\n"
            yield home / "free_hugepages", f"{total - self.used[pool]}\n"
            yield home / "surplus_hugepages", f"{total - self.sizes[pool]}\n"
            promised = self.sys / "kernel/mm/hugepages" / home.name / "resv_hugepages"
            yield promised, f"{self.reserved[pool.page]}\n"
        for node in self.nodes:
            free = (self.whole[node] + self.scattered[node]) // KIB
            start = f"Node {node} " if self.numa else ""
            text = f"{start}MemTotal: {16 * GIB // KIB} kB\n{start}MemFree: {free} kB\n"
            own = self.sys / NODES / f"node{node}/meminfo"
            yield own if self.numa else self.proc / "meminfo", text

    def set(self, pool: PoolKey, size: int) -> None:
        """An administrator's `echo`."""
        self.write(self.home(pool) / "nr_hugepages", f"{size}\n")

    def use(self, pool: PoolKey, count: int) -> None:
        """Somebody has so many pages from now on."""
        self.used[pool] = count
        self.show()

    def write(self, path: Path, text: str) -> None:
        self.written.append(
            str(path.relative_to(self.sys if self.sys in path.parents else self.proc))
        )
        if path.name.startswith("compact"):
            nodes = [int(path.parent.name[4:])] if path.name == "compact" else self.nodes
            for node in nodes:
                self.whole[node] += self.scattered[node]
                self.scattered[node] = 0
        else:
            self._shown.pop(path)  # the kernel answers with what it made of it
            pool = next(p for p in self.sizes if self.home(p) == path.parent)
            by = int(text) - self.sizes[pool]
            by = min(by, self.whole[pool.node] // pool.page) if by > 0 else by
            self.sizes[pool] += by
            self.whole[pool.node] -= by * pool.page
        self.show()
