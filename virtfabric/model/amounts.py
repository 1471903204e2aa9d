"""Amounts: a vector over (resource class, locality).

CPU counts in milli-CPU and memory in bytes. Card and fabric add classes without touching the
core, so nothing here or in the arbiter knows a closed list of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final, NamedTuple, NewType, Self

from virtfabric.model.units import Bytes, MilliCpu

ResourceClass = NewType("ResourceClass", str)
Locality = NewType("Locality", str)

CPU: Final = ResourceClass("cpu")
MEMORY: Final = ResourceClass("memory")
HOST: Final = Locality("host")


class Tier(StrEnum):
    """What kind of memory a NUMA node has."""

    DRAM = "dram"
    CXL = "cxl"
    """A CXL region became the node."""


_TIER: Final = "tier:"
_CXL: Final = Locality(f"{_TIER}{Tier.CXL}")


def node_locality(node: int) -> Locality:
    """The locality of a NUMA node."""
    return Locality(f"node:{node}")


class Key(NamedTuple):
    """One coordinate of the vector."""

    resource: ResourceClass
    locality: Locality = HOST

    def __str__(self) -> str:
        return self.resource if self.locality == HOST else f"{self.resource}@{self.locality}"

    @property
    def words(self) -> str:
        """For people: `CXL memory` where `str` says `memory@tier:cxl`."""
        return "CXL memory" if self == CXL_KEY else str(self)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reverse of `str`."""
        resource, _, locality = text.partition("@")
        return cls(ResourceClass(resource), Locality(locality or HOST))


CPU_KEY: Final = Key(CPU)
MEMORY_KEY: Final = Key(MEMORY)
"""DRAM, wherever on the host."""
CXL_KEY: Final = Key(MEMORY, _CXL)
MEMORY_KEYS: Final = {Tier.DRAM: MEMORY_KEY, Tier.CXL: CXL_KEY}


def tier_of(key: Key) -> Tier | None:
    """The tier whose memory a coordinate counts; None for any other coordinate."""
    return next((tier for tier, its in MEMORY_KEYS.items() if its == key), None)


class Amounts(Mapping[Key, int]):
    """An immutable vector; absent keys count as 0 and zero entries are not stored."""

    __slots__ = ("_by_key",)

    def __init__(self, by_key: Mapping[Key, int] | None = None) -> None:
        self._by_key = {k: int(v) for k, v in sorted((by_key or {}).items()) if v}

    @classmethod
    def of(cls, *, cpu: int = 0, memory: int = 0) -> Self:
        """Host-wide CPU (milli-CPU) and memory (bytes)."""
        return cls({Key(CPU): cpu, Key(MEMORY): memory})

    @property
    def cpu(self) -> MilliCpu:
        """Host-wide CPU."""
        return MilliCpu(self[Key(CPU)])

    @property
    def memory(self) -> Bytes:
        """Host-wide memory: DRAM."""
        return Bytes(self[MEMORY_KEY])

    @property
    def all_memory(self) -> Bytes:
        """Memory of every tier together."""
        return Bytes(sum(self[key] for key in MEMORY_KEYS.values()))

    def __getitem__(self, key: Key) -> int:
        return self._by_key.get(key, 0)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts({k: self[k] + other[k] for k in {*self, *other}})

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts({k: self[k] - other[k] for k in {*self, *other}})

    def __neg__(self) -> Amounts:
        return Amounts({k: -v for k, v in self.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Amounts) and self._by_key == other._by_key

    def __hash__(self) -> int:
        return hash(tuple(self._by_key.items()))

    def with_value(self, key: Key, value: int) -> Amounts:
        """A copy in which one coordinate is `value`."""
        return Amounts({**self._by_key, key: value})

    def fits_in(self, other: Amounts) -> bool:
        """Whether no coordinate exceeds the other's."""
        return all(self[k] <= other[k] for k in {*self, *other})

    def positive(self) -> Amounts:
        """Only the coordinates above zero."""
        return Amounts({k: v for k, v in self.items() if v > 0})

    def __str__(self) -> str:
        return ", ".join(f"{k.words} {format_amount(k, v)}" for k, v in self.items()) or "nothing"

    def __repr__(self) -> str:
        return f"Amounts({self})"

    def to_json(self) -> dict[str, int]:
        """`{"cpu": 1500, "memory": 67108864}`; keys are `class` or `class@locality`."""
        return {str(k): v for k, v in self.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Self:
        """The reverse of `to_json`."""
        return cls({Key.parse(k): int(v) for k, v in data.items()})


def format_amount(key: Key, value: int) -> str:
    """One amount for a person: `1.5` CPUs, `64MiB`."""
    if key.resource == CPU:
        return str(MilliCpu(value))
    if key.resource == MEMORY:
        return str(Bytes(value))
    return str(value)
