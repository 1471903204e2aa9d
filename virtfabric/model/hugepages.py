"""Huge pages: the pools of a host, what a guest has of them, and the step that makes more.

A pool belongs to whoever set its size; only the pages that this agent added for a guest are its
own to take away. A tally beside the pool says how many that are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from virtfabric.model.amounts import Key, ResourceClass, node_locality
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.host import HugePages
    from virtfabric.model.ids import GuestId


class PoolKey(NamedTuple):
    """Which pool: one node's, of one page size (bytes)."""

    node: int
    page: int

    @property
    def amount_key(self) -> Key:
        """The coordinate by which plans reserve its pages."""
        return Key(ResourceClass(f"huge-pages-{self.page >> 10}kB"), node_locality(self.node))

    def __str__(self) -> str:
        return f"huge pages of {Bytes(self.page)} on node {self.node}"


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool now.

    Attributes:
        made: pages in it that this agent made, by guest.
    """

    pages: HugePages
    made: Mapping[GuestId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HugePools:
    """The pools of a host.

    Attributes:
        free_memory: bytes that nobody uses, by node; page cache is in use.
    """

    pools: Mapping[PoolKey, Pool] = field(default_factory=dict)
    free_memory: Mapping[int, Bytes] = field(default_factory=dict)

    def of_size(self, page: int) -> dict[int, Pool]:
        """By node."""
        return {key.node: pool for key, pool in self.pools.items() if key.page == page}

    def made_for(self, guest: GuestId) -> dict[PoolKey, int]:
        """What this agent made for a guest."""
        return {
            key: pool.made[guest] for key, pool in self.pools.items() if pool.made.get(guest, 0)
        }

    @property
    def sizes(self) -> list[int]:
        """Bytes of the pages that the host offers, smallest first."""
        return sorted({key.page for key in self.pools})


@dataclass(frozen=True, slots=True)
class HeldPages:
    """Pages of one pool that a guest has, or counts on until it runs.

    Attributes:
        made: how many of them this agent made; the others were there.
    """

    node: int
    page: int
    count: int
    made: int = 0

    @property
    def key(self) -> PoolKey:
        """Of which pool."""
        return PoolKey(self.node, self.page)

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {"node": self.node, "page": self.page, "count": self.count, "made": self.made}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeldPages:
        """The reverse of `to_json`."""
        return cls(data["node"], data["page"], data["count"], data["made"])


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeHugePages(Step):
    """Have so many huge pages in a pool that were made for this guest, and enough of it free.

    `before` and `after` count what was made for the guest, whatever else is in the pool, so that
    repeating is safe and two guests, or an administrator, may use one pool. Source:
    Documentation/admin-guide/mm/hugetlbpage.rst.

    Attributes:
        node: whose pool.
        page: bytes of one page.
        free: how many must be free and promised to nobody afterwards: the guest is about to take
            them, and a page that is missing then is a guest that dies.
    """

    kind: ClassVar[str] = "make-huge-pages"
    node: int
    page: int
    before: int
    after: int
    free: int = 0
    deadline_s: float = 30.0

    @property
    def pool(self) -> PoolKey:
        """Which pool."""
        return PoolKey(self.node, self.page)

    def describe(self) -> str:
        """One line for a person."""
        if self.before == self.after:
            return f"{self.name}: {self.free} free {self.pool}"
        return f"{self.name}: {self.pool} made for it {self.before} -> {self.after}"
