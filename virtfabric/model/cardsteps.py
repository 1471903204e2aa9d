"""The steps that change slices of offload cards: promised, granted, ended; given and taken back.

A slice is named by the key of the request that made it, which stays when it is made anew; the
card's own id for it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from virtfabric.model.ids import HOST_ITSELF, GuestId
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from virtfabric.model.adapter import SliceSpec
    from virtfabric.model.card import HeldSlice


class SlicePresence(StrEnum):
    """How far a slice is there."""

    ABSENT = "absent"
    PROMISED = "promised"
    """Its parts are nobody else's; nobody had to leave for it yet."""
    GRANTED = "granted"


@dataclass(frozen=True, slots=True, kw_only=True)
class BringSlice(Step):
    """Bring a slice of a card to being promised, granted, or gone.

    Reserving all parts of a slice over several cards, then granting all, is what makes it happen on
    all of them or on none.

    Attributes:
        key: of its request.
        card: serial number.
        spec: what it is to have.
        holder: who is to have it; empty for nobody yet.
        victims: slices that end when it is granted, as they were. An undo makes them again, without
            their images.
    """

    kind: ClassVar[str] = "bring-slice"
    guest: GuestId = HOST_ITSELF
    key: str
    card: str
    spec: SliceSpec
    before: SlicePresence
    after: SlicePresence
    holder: str = ""
    victims: tuple[HeldSlice, ...] = ()

    def describe(self) -> str:
        """One line for a person."""
        verbs = {
            SlicePresence.ABSENT: "end" if self.before is SlicePresence.GRANTED else "give up",
            SlicePresence.PROMISED: "reserve",
            SlicePresence.GRANTED: "grant",
        }
        ends = ", ".join(victim.slice for victim in self.victims)
        granting = self.after is SlicePresence.GRANTED and ends
        what = f"slice {self.spec.name}".rstrip()
        line = f"card {self.card}: {verbs[self.after]} {what} ({describe_spec(self.spec)})"
        return f"{line}; {ends} ends for it" if granting else line


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignSlice(Step):
    """Give a slice to a holder (a guest's UUID), or to nobody (empty)."""

    kind: ClassVar[str] = "assign-slice"
    guest: GuestId = HOST_ITSELF
    key: str
    card: str
    before: str
    after: str

    def describe(self) -> str:
        """One line for a person."""
        was, now = self.before or "nobody", self.after or "nobody"
        return f"card {self.card}: slice {self.name or self.key} from {was} to {now}"


def describe_spec(spec: SliceSpec) -> str:
    """What a slice has, for a person."""
    parts = (
        f"{spec.cores} cores" if spec.cores else "",
        str(Bytes(spec.memory)) if spec.memory else "",
        f"x{spec.lanes} link" if spec.lanes else "",
        f"{spec.units} {spec.capability}" if spec.units else "",
        f"priority {spec.priority}",
    )
    return ", ".join(filter(None, parts))
