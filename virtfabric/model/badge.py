"""What a PCIe function says about the slice that it is, and what came of checking it.

Anybody's hardware may say anything of itself: a badge is a claim until the card that it names has
said the same over its own link (`policy.badges`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from virtfabric.model.adapter import AdapterId, SliceId

BADGE_DIGITS: Final = 32
"""Hexadecimal digits of `Badge.code`."""


@dataclass(frozen=True, slots=True)
class Badge:
    """Read from a function's configuration space.

    Attributes:
        card: serial number.
        slice: the card's id for it.
        code: `BADGE_DIGITS` hexadecimal digits that nobody can guess who was not told by the card.
    """

    card: str
    slice: str
    code: str

    def __str__(self) -> str:
        return f"{self.slice} of card {self.card}"


@dataclass(frozen=True, slots=True)
class SliceFunction:
    """The slice that a function is, as its card confirmed.

    Attributes:
        key: of the request that made it.
        holder: who is to use it (a guest's UUID); empty for nobody yet.
    """

    card: AdapterId
    slice: SliceId
    key: str
    capability: str
    holder: str = ""

    def __str__(self) -> str:
        return f"{self.slice} of card {self.card}"
