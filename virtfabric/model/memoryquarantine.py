"""Memory that nothing is granted of until an operator says so: poisoned, pulled out, broken."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class MemoryFault(StrEnum):
    """What is wrong with it."""

    POISON = "poison"
    """A memdev lists parts that lost their content."""
    REMOVED = "removed"
    """A memdev went while a region was made of it."""
    BROKEN_PAGES = "broken-pages"
    """The kernel took pages of a node out of use (hwpoison, after a machine check)."""


@dataclass(frozen=True, slots=True)
class MemoryQuarantine:
    """A memdev or a CXL node of which nothing is granted.

    Attributes:
        subject: the memdev's serial (`0x100`), or `node2` where only the node is known.
        why: what happened.
        since: UNIX seconds.
        region: the CXL region that it is or was part of, for people; empty for none.
        nodes: what that region was the memory of when it happened.
        pages: broken pages that are known of; the kernel's counter begins anew at a boot.
        lifted: an operator knows of these pages; it is kept only so that they are not told again.
    """

    subject: str
    fault: MemoryFault
    why: str
    since: float
    region: str = ""
    nodes: tuple[int, ...] = ()
    pages: int = 0
    lifted: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the journal and for clients."""
        return {
            "subject": self.subject, "fault": self.fault.value, "why": self.why,
            "since": self.since, "region": self.region, "nodes": list(self.nodes),
            "pages": self.pages, "lifted": self.lifted,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryQuarantine:
        """The reverse of `to_json`."""
        return cls(
            data["subject"], MemoryFault(data["fault"]), data["why"], data["since"],
            data["region"], tuple(data["nodes"]), data["pages"], data["lifted"],
        )  # fmt: skip
