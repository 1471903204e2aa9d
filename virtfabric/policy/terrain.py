"""Terrain: the host as a search for pCPUs sees it, and what one dedicated guest wants of it.

Owns tables and distances. It must not search (`policy.offers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from virtfabric.model.policy import Smt
from virtfabric.policy.nearness import distance

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.model.host import HostTopology
    from virtfabric.model.ids import GuestId
    from virtfabric.model.units import CpuSet


@dataclass(frozen=True)
class Terrain:
    """The host's tables that the search walks, made once for a layout.

    `managed` and `housekeeping` are plain frozensets: `isdisjoint` walks a subclass in Python.
    """

    topology: HostTopology
    managed: frozenset[int]
    housekeeping: frozenset[int]

    @cached_property
    def cores_of(self) -> dict[int, tuple[CpuSet, ...]]:
        """Cores with a managed pCPU, by node; those with the fewest housekeeping pCPUs first."""
        by_node: dict[int, list[CpuSet]] = {}
        seen: set[int] = set()
        for number in sorted(self.managed):
            if number not in seen:
                pcpu = self.topology.pcpus[number]
                seen |= pcpu.siblings
                by_node.setdefault(pcpu.node, []).append(pcpu.siblings)
        for cores in by_node.values():
            cores.sort(key=lambda core: len(core & self.housekeeping))
        return {node: tuple(cores) for node, cores in sorted(by_node.items())}

    def node(self, cpu: int) -> int:
        """The node of a pCPU."""
        return self.topology.pcpus[cpu].node

    def siblings(self, cpu: int) -> CpuSet:
        """The threads of a pCPU's core, itself included."""
        return self.topology.pcpus[cpu].siblings

    def distance(self, a: int, b: int) -> int:
        """How much farther than local node `b` is from node `a`, in SLIT units."""
        return distance(self.topology, a, b)

    def nearest(self, homes: Iterable[int]) -> list[int]:
        """Nodes with managed pCPUs, nearest to any of `homes` first."""
        wanted = tuple(homes)

        def rank(node: int) -> tuple[int, int, int]:
            far = min((self.distance(node, h) for h in wanted), default=0)
            return far, int(node not in wanted), node

        return sorted(self.cores_of, key=rank)

    def kept_empty(self, order: Iterable[int], smt: Smt) -> set[int]:
        """Managed siblings that nobody else may use beside these pCPUs."""
        if smt is Smt.PREFER:
            return set()
        own = set(order)
        return {s for cpu in own for s in self.siblings(cpu) if s in self.managed} - own


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one dedicated guest needs.

    Attributes:
        held: pCPU of each vCPU until now; empty for a guest that is placed for the first time.
        pins: the operator's pins by vCPU number: hard constraints.
        home: nodes of its memory, empty where nothing is known.
        pullable: nodes that its memory may follow to; empty for a guest that is not movable.
    """

    guest: GuestId
    count: int
    smt: Smt = Smt.PREFER
    held: tuple[int, ...] = ()
    pins: tuple[tuple[int, CpuSet], ...] = ()
    home: frozenset[int] = frozenset()
    pullable: frozenset[int] = frozenset()
