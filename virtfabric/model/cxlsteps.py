"""The steps of a CXL region's life: made, brought online, taken offline, destroyed.

They change the host and no guest. A region is named by the base of its window and the serials of
its members, in the order of interleaving: the kernel's names change between boots.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from virtfabric.model.ids import HOST_ITSELF, GuestId
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from virtfabric.model.cxl import Serial


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfRegion(Step):
    """Base of both.

    Attributes:
        window: first address of the window that the region is in.
        members: memdevs in the order of interleaving.
        deadline_s: until it is brought about; what an undo may take as well.
    """

    guest: GuestId = HOST_ITSELF
    name: str = "host"
    window: int
    members: tuple[Serial, ...]
    deadline_s: float = 60.0

    def to_json(self) -> dict[str, Any]:
        """As for any step; addresses and serials as text, as 64 bits are too many for JSON."""
        place = {"window": f"{self.window:#x}", "members": [str(one) for one in self.members]}
        return Step.to_json(self) | place

    @property
    def region(self) -> str:
        """Which region, for people."""
        return f"CXL region of {', '.join(map(str, self.members))} in window {self.window:#x}"


class RegionPresence(StrEnum):
    """Whether there is a region."""

    ABSENT = "absent"
    PRESENT = "present"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRegion(_OfRegion):
    """Make a volatile region, or destroy it (`after` is absent).

    Made: its decoders are committed and its memory shows as a dax device, which the kernel may have
    brought online by itself. Destroyed: only when none of its memory is online; to destroy one of
    which memory is in use takes the kernel down (measured, Linux 6.12).

    Attributes:
        size: bytes of the whole region.
        granularity: bytes before the next member's turn; of one member alone it means nothing.
    """

    kind: ClassVar[str] = "create-region"
    size: int
    granularity: int = 256
    before: RegionPresence
    after: RegionPresence

    def describe(self) -> str:
        """One line for a person."""
        word = "create" if self.after is RegionPresence.PRESENT else "destroy"
        return f"{self.name}: {word} {self.region}, {Bytes(self.size)}"


class MemoryUse(StrEnum):
    """What the kernel may use a region's memory for."""

    OFFLINE = "offline"
    MOVABLE = "movable"
    """What can be moved away only: it can be taken offline again."""
    NORMAL = "normal"
    """The kernel's own data, too: it stays online for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineMemory(_OfRegion):
    """Bring a region's memory online, as movable or normal, or take it offline.

    Taking it offline moves all pages away first, and gives up at the deadline: the kernel itself
    tries for ever where pages are pinned. It is all online again then.
    """

    kind: ClassVar[str] = "online-memory"
    before: MemoryUse
    after: MemoryUse

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.name}: memory of {self.region} {self.before} -> {self.after}"
