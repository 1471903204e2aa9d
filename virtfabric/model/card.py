"""Offload cards as a host sees them: what each told last, and whether it is to be believed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.adapter import AdapterId, SliceId, SliceSpec
from virtfabric.model.image import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.adapter import AdapterBooks
    from virtfabric.model.image import ImageManifest


class CardCondition(StrEnum):
    """How a link is. Published; the words that users see."""

    CONNECTED = "connected"
    LOST = "lost"
    """It is tried again and again."""
    DISTRUSTED = "distrusted"
    """It lied; nothing is tried until an operator says so."""


@dataclass(frozen=True, slots=True)
class SliceProgram:
    """What the accelerators of a slice do. `image` is empty for none."""

    phase: Phase = Phase.BLANK
    image: str = ""


@dataclass(frozen=True, slots=True)
class CardView:
    """One card as it was last told of.

    Attributes:
        why: what is wrong; empty while it is connected.
        boot: differs after each start of the card; empty where it was never there.
        books: as last told; None where it never was. Kept while the card is lost.
        programs: by slice.
        badges: `Badge.code` of each slice that has a PCI function.
        readings: figures by subject, as the card measures them.
    """

    serial: AdapterId
    condition: CardCondition = CardCondition.LOST
    why: str = "not connected yet"
    boot: str = ""
    software: str = ""
    books: AdapterBooks | None = None
    programs: Mapping[SliceId, SliceProgram] = field(default_factory=dict)
    badges: Mapping[SliceId, str] = field(default_factory=dict)
    readings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked for something, and what it has is known."""
        return self.condition is CardCondition.CONNECTED and self.books is not None


class CardNewsKind(StrEnum):
    """What a card's link tells by itself."""

    CONNECTED = "connected"
    LOST = "lost"
    DISTRUSTED = "distrusted"
    RESTARTED = "restarted"
    """It has started anew since it was seen last; told before CONNECTED."""
    REFUSED = "refused"
    """A frame of it could not be taken: another version, or not to be read."""
    EVENT = "event"
    """The card told of something that happened on it: `what`, `slice`."""


@dataclass(frozen=True, slots=True)
class CardNews:
    """Something happened to a card or its link.

    Attributes:
        what: the kind of event in the card's words (`slice-reclaimed`), for EVENT only.
    """

    serial: AdapterId
    kind: CardNewsKind
    detail: str
    what: str = ""
    slice: str = ""


@dataclass(frozen=True, slots=True)
class SignedImage:
    """An image with its bytes, as an operator hands it over."""

    manifest: ImageManifest
    signature: str
    data: bytes


@dataclass(frozen=True, slots=True)
class HeldSlice:
    """A slice that this host had made, as its books have it.

    Attributes:
        key: idempotency key of its request, `HOST/REQUEST/PART`: how it is known on the card.
        card: which one it is on.
        slice: the card's id for it.
        wish: what it is a part of: parts of one slice over several cards share it.
        part: what this part was asked to be.
        transient: made for a guest's request; it ends when no guest has its function.
    """

    key: str
    card: AdapterId
    slice: SliceId
    wish: str
    part: SliceSpec
    holder: str = ""
    transient: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "key": self.key, "card": self.card, "slice": self.slice, "wish": self.wish,
            "part": self.part.to_json(), "holder": self.holder, "transient": self.transient,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeldSlice:
        """The reverse of `to_json`."""
        return cls(
            data["key"], AdapterId(data["card"]), SliceId(data["slice"]), data["wish"],
            SliceSpec.from_json(data["part"]), data["holder"], data.get("transient", False),
        )  # fmt: skip


ARBITER_ANSWER_S: Final = 1.0


class Fallback(StrEnum):
    """What is done while the card that is to decide does not. Published; the words of users."""

    OWN = "own"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Carded:
    """*Carded* mode.

    Attributes:
        card: serial number of the one that decides.
        answer_s: in which it has to answer; an answer takes it milliseconds.
    """

    card: str
    fallback: Fallback = Fallback.OWN
    answer_s: float = ARBITER_ANSWER_S
