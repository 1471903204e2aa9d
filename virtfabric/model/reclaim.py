"""Memory that is called home: what a guest tells of it, what is asked of whom, and what came."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from virtfabric.model.amounts import MEMORY_KEY, Key
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.guest import MemoryMechanism
    from virtfabric.model.ids import GuestId


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a guest told of its memory a moment ago, by its balloon driver; bytes.

    Attributes:
        usable: what it could do without before it swaps (MemAvailable); its page cache is in it.
        free: what nobody in it uses (MemFree).
        total: all that it sees (MemTotal).
    """

    usable: int
    free: int = 0
    total: int = 0


class Push(StrEnum):
    """How hard a guest is asked."""

    SPARE = "spare"
    """For what it tells that it can do without, or tells nothing about."""
    PRESSED = "pressed"
    """For more than that, which its policy allows (`<memory escalate='press'>`)."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory that is wanted back.

    Attributes:
        key: DRAM or CXL memory.
        size: bytes.
        node: of the host, where it matters; None for any of the tier.
        deadline_s: for each victim, all of its devices together.
        detach: whether devices on the node leave their guests when they are empty.
    """

    key: Key = MEMORY_KEY
    size: int = 0
    node: int | None = None
    deadline_s: float = 30.0
    detach: bool = False


@dataclass(frozen=True, slots=True)
class ReclaimPart:
    """What one device of one victim is asked for; `alias` is empty for a balloon.

    Attributes:
        size: bytes, in whole blocks.
        deadline_s: its part of the victim's time.
        detach: whether the device leaves the guest afterwards: it is empty then.
    """

    guest: GuestId
    name: str
    mechanism: MemoryMechanism
    alias: str
    node: int | None
    size: int
    push: Push
    deadline_s: float
    detach: bool = False

    def __str__(self) -> str:
        where = self.alias if self.node is None else f"{self.alias} (node {self.node})"
        how = f"{self.mechanism} {where}".rstrip()
        more = ", more than it says it can spare" if self.push is Push.PRESSED else ""
        end = ", then the device is detached" if self.detach else ""
        return f"{self.name}: {Bytes(self.size)} by {how} within {self.deadline_s:.3g} s{more}{end}"

    def to_json(self) -> dict[str, Any]:
        """For journal, audit and clients."""
        return {
            "guest": self.guest, "name": self.name, "mechanism": self.mechanism.value,
            "alias": self.alias, "node": self.node, "size": self.size, "push": self.push.value,
            "deadline_s": round(self.deadline_s, 3), "detach": self.detach, "text": str(self),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReclaimPlan:
    """Who is asked for what, in the order in which they are asked.

    Attributes:
        given: by victim, what it gave before this plan was made (it stopped short, or gave all).
        notes: sentences about those that are asked for less than they could be, or for nothing.
    """

    claim: Claim
    parts: tuple[ReclaimPart, ...] = ()
    given: Mapping[GuestId, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def gift(self, guest: GuestId) -> int:
        """All that a victim gives by this plan, what it gave before included."""
        return self.given.get(guest, 0) + sum(p.size for p in self.parts if p.guest == guest)

    @property
    def planned(self) -> int:
        """Bytes that it brings home when everybody gives what is asked."""
        return sum(self.given.values()) + sum(part.size for part in self.parts)

    @property
    def short(self) -> int:
        """Bytes of the claim that nobody is asked for."""
        return max(0, self.claim.size - self.planned)

    def to_json(self) -> dict[str, Any]:
        """For journal, audit and clients."""
        claim = self.claim
        return {
            "resource": str(claim.key), "node": claim.node, "asked": claim.size,
            "planned": self.planned, "short": self.short,
            "parts": [part.to_json() for part in self.parts], "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Yield:
    """What came of asking one victim for one kind of memory.

    Attributes:
        freed: of `asked`; the rest is still out.
        why: it is; empty where all came.
    """

    guest: GuestId
    name: str
    key: Key
    asked: int
    freed: int
    why: str = ""

    @property
    def out(self) -> int:
        """Bytes that are still with the guest."""
        return max(0, self.asked - self.freed)

    def __str__(self) -> str:
        told = f"{self.name}: {Bytes(self.freed)} of {Bytes(self.asked)} came home"
        return f"{told}, {Bytes(self.out)} still out: {self.why}" if self.out else told

    def to_json(self) -> dict[str, Any]:
        """For audit and clients."""
        return {
            "guest": self.guest, "name": self.name, "resource": str(self.key),
            "asked": self.asked, "freed": self.freed, "out": self.out, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recall:
    """How memory that leaves guests is to leave them.

    Attributes:
        nodes: devices on these go first.
        detach: whether empty devices on them leave their guests.
        stuck: by guest and alias, the size below which a device did not go when it was asked.
    """

    nodes: frozenset[int] = frozenset()
    detach: bool = False
    stuck: Mapping[tuple[GuestId, str], int] = field(default_factory=dict)

    def least_of(self, guest: GuestId) -> dict[str, int]:
        """Of one guest, by alias."""
        return {alias: size for (one, alias), size in self.stuck.items() if one == guest}
