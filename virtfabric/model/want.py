"""The words that say how much of something is wanted; checked alike by the command and the agent.

The command loads this at every start: nothing here may need `dataclasses` (see `errors`).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from virtfabric.model.amounts import Tier
from virtfabric.model.capability import parse_capability
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE: Final = "device:"
"""Before the capability, in a key of what is wanted."""
_DURATION: Final = re.compile(r"([0-9]{1,9})(?:\.[0-9]+)?([smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_E = TypeVar("_E", bound=StrEnum)


class Mode(StrEnum):
    """How an amount is meant."""

    TO = "to"
    BY = "by"


class Want(NamedTuple):
    """One resource of a request: grow or shrink `BY`, or bring `TO` (milli-CPU or bytes)."""

    mode: Mode
    value: int


def parse_duration(text: str, *, field: str) -> float:
    """`90`, `90s`, `10m`, `2h`, `1d` in seconds.

    Raises:
        InvalidValueError: malformed, zero, or above ten years.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidValueError(field, text, "is not a duration", advice="like 90s, 10m or 2h")
    seconds = float(text.strip().rstrip("smhd")) * _SECONDS[match[2]]
    if not 0 < seconds <= 10 * 365 * 86400:
        raise InvalidValueError(field, text, "must be above 0 and at most ten years")
    return seconds


def parse_want(text: str, parse: Callable[..., int], *, field: str) -> Want:
    """`2` (to), `+1` or `-1` (by).

    Raises:
        InvalidValueError: names the field.
    """
    text = text.strip()
    if text[:1] in ("+", "-"):
        amount = int(parse(text[1:], field=field))
        if amount == 0:
            raise InvalidValueError(field, text, "changes nothing")
        return Want(Mode.BY, amount if text[0] == "+" else -amount)
    return Want(Mode.TO, int(parse(text, field=field)))


def parse_number(text: str, low: int, high: int, *, field: str) -> int:
    """A whole number in a range, both ends in it.

    Raises:
        InvalidValueError: anything else.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise InvalidValueError(field, text, f"must be a whole number from {low} to {high}")
    return int(text)


def parse_count(text: str, *, field: str) -> int:
    """A number of functions.

    Raises:
        InvalidValueError: not a whole number from 0 to 256.
    """
    return parse_number(text.strip(), 0, 256, field=field)


def parse_device(key: str, text: str) -> tuple[str, Want]:
    """`device:net.vf` and `2`, `+1` or `-1`.

    Raises:
        InvalidValueError: names the field.
    """
    capability = parse_capability(key.removeprefix(DEVICE), field="device")
    return capability, parse_want(text, parse_count, field=key)


def parse_choice(kind: type[_E], text: str, *, field: str) -> _E:
    """One of the words of an enumeration.

    Raises:
        InvalidValueError: anything else.
    """
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(k.value for k in kind)
        raise InvalidValueError(field, text, f"must be one of {known}") from None


def parse_tier(text: str, *, field: str) -> Tier:
    """`dram` or `cxl`.

    Raises:
        InvalidValueError: anything else.
    """
    return parse_choice(Tier, text, field=field)
