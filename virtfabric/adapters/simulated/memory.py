"""CXL memory of a simulated host, and what the kernel would do with it.

Tests change it as people and hardware do: `plug`, `remove`, `replace_memdev`. Thread-safe under
the host's lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from virtfabric.model.amounts import Tier
from virtfabric.model.cxl import CxlInventory, DaxDevice, HostMemory, MemoryState, Region
from virtfabric.model.errors import CxlError
from virtfabric.model.host import NumaNode
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.policy.nearness import LOCAL

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from virtfabric.model.cxl import Condition, Memdev, Serial
    from virtfabric.model.host import HostTopology


class SimulatedMemory:
    """Implements `ports.MemoryTree`.

    Attributes:
        cxl: the inventory; a test may replace it.
        conditions: what memdevs tell, by name.
        stuck: nodes whose memory does not go offline.
        broken: pages that the kernel took out of use, by node.
    """

    def __init__(self, lock: threading.RLock, read_topology: Callable[[], HostTopology]) -> None:
        self._lock = lock
        self._read_topology = read_topology
        self._changed: Callable[[], None] | None = None
        self.cxl = CxlInventory()
        self.conditions: dict[str, Condition] = {}
        self.stuck: set[int] = set()
        self.broken: dict[int, int] = {}
        self._orphans: dict[int, NumaNode] = {}

    # -- what the port asks ---------------------------------------------------------------------

    def read_memory(self) -> HostMemory:
        """The host's nodes, those that regions became among them."""
        with self._lock:
            return HostMemory(self._read_topology().nodes, self.cxl)

    def nodes(self) -> dict[int, NumaNode]:
        """The nodes that regions became."""
        with self._lock:
            return self._orphans | {
                dax.node: _node(dax.node, dax)
                for region in self.cxl.regions
                for dax in region.dax
                if dax.node is not None and dax.state is MemoryState.ONLINE
            }

    def read_conditions(self, cancelled: threading.Event) -> dict[str, Condition]:
        """As they were set."""
        with self._lock:
            return dict(self.conditions)

    def read_broken_pages(self) -> dict[int, int]:
        """As they were set."""
        with self._lock:
            return dict(self.broken)

    def watch(self, changed: Callable[[], None]) -> None:
        """Told by the same thread that changes something."""
        self._changed = changed

    def close(self) -> None:
        """Tell nobody any more."""
        self._changed = None

    # -- what happens beside the agent ----------------------------------------------------------

    def plug(self, memdev: Memdev) -> None:
        """A memdev is there from now on."""
        with self._lock:
            self.cxl = replace(self.cxl, memdevs=(*self.cxl.memdevs, memdev))
        self._tell()

    def remove(self, serial: Serial) -> None:
        """A memdev is taken out without a word."""
        with self._lock:
            left = tuple(m for m in self.cxl.memdevs if m.serial != serial)
            self.cxl = replace(self.cxl, memdevs=left)
        self._tell()

    def pull(self, serial: Serial) -> None:
        """A memdev is pulled while a region is made of it (device_del of one in use, Linux 6.12).

        The region loses its place and its dax device; what of its memory was online stays, as
        nobody could take it offline, and shows as a node without CPUs like any other.
        """
        with self._lock:
            for region in self.cxl.regions:
                if serial in region.members:
                    left = (n for n in self.nodes().values() if n.number in region.nodes)
                    self._orphans |= {n.number: replace(n, tier=Tier.DRAM) for n in left}
                    rest = tuple(None if s == serial else s for s in region.members)
                    broken = replace(region, members=rest, committed=False, dax=())
                    others = tuple(r for r in self.cxl.regions if r is not region)
                    self.cxl = replace(self.cxl, regions=(*others, broken))
        self.remove(serial)

    def reboot(self) -> None:
        """Regions, memory that nobody answers for and the kernel's counters end with a boot."""
        with self._lock:
            self.cxl = replace(self.cxl, regions=())
            self._orphans, self.broken = {}, {}
        self._tell()

    def put_region(self, region: Region) -> None:
        """A region is there, or is another than it was."""
        with self._lock:
            others = tuple(r for r in self.cxl.regions if r.name != region.name)
            self.cxl = replace(self.cxl, regions=(*others, region))
        self._tell()

    # -- for the handlers, under the host's lock ------------------------------------------------

    def make_region(
        self, base: int, members: Sequence[Serial], size: int, granularity: int
    ) -> None:
        """What `cxl create-region` does, and what the kernel does by itself: memory goes online.

        Raises:
            CxlError: there is no such window.
        """
        window = self.cxl.window_at(base)
        if window is None:
            raise CxlError(f"there is no window at {base:#x}")
        taken = {r.name for r in self.cxl.regions}
        number = next(n for n in range(len(taken) + 1) if f"region{n}" not in taken)
        nodes = {*self._read_topology().nodes, *self.cxl.node_regions}
        used = sum(r.size for r in self.cxl.regions if r.window == window.name)
        dax = DaxDevice(
            f"dax{number}.0", Bytes(size), max(nodes) + 1, MemoryState.ONLINE, movable=True
        )
        self.put_region(
            Region(
                f"region{number}", window.name, base + used, Bytes(size), ways=len(members),
                granularity=granularity, members=tuple(members), committed=True, ours=True,
                dax=(dax,),
            )
        )  # fmt: skip

    def drop_region(self, region: Region) -> None:
        """What `cxl destroy-region` does."""
        self.cxl = replace(
            self.cxl, regions=tuple(r for r in self.cxl.regions if r.name != region.name)
        )
        self._tell()

    def set_state(self, region: Region, state: MemoryState, *, movable: bool) -> None:
        """What `daxctl` does.

        Raises:
            CxlError: a node that is stuck does not go offline.
        """
        if state is MemoryState.OFFLINE and self.stuck & set(region.nodes):
            raise CxlError(f"memory of {region.name} does not go offline: Device or resource busy")
        dax = tuple(replace(d, state=state, movable=movable) for d in region.dax)
        self.put_region(replace(region, dax=dax))

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed()


def _node(number: int, dax: DaxDevice) -> NumaNode:
    return NumaNode(
        number, CpuSet(), dax.size, dax.size, distances={number: LOCAL}, tier=Tier.CXL,
        offlinable=dax.movable,
        why_not_offlinable="" if dax.movable else "its memory is in ZONE_NORMAL",
    )  # fmt: skip
