"""Values that hosts and guests are made of, as they are on the wire. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import Amounts, Key
from virtfabric.model.ids import GuestId
from virtfabric.model.units import Bytes
from virtfabric.protocol.adapterforms import MAX_NAME

if TYPE_CHECKING:
    from virtfabric.model.units import CpuSet
    from virtfabric.protocol.fields import Fields

MAX_SET: Final = 1 << 16
"""Characters of a list of pCPUs."""
_NO_PAGE: Final = "default"
"""Of memory on huge pages of no named size."""


def form_of_amounts(amounts: Amounts) -> dict[str, int]:
    """Amounts as figures; none is below zero."""
    return amounts.to_json()


def read_amounts(fields: Fields, name: str) -> Amounts:
    """The reverse.

    Raises:
        InvalidValueError: names the field.
    """
    found = fields.figures(name)
    for key in found:
        if not key or len(key) > MAX_NAME:
            raise fields.fail(name, f"has a name that is not of 1 to {MAX_NAME} characters")
    return Amounts({Key.parse(key): value for key, value in found.items()})


def read_guest_id(fields: Fields, name: str) -> GuestId:
    """A UUID."""
    guest: GuestId = fields.parsed(name, GuestId.parse)
    return guest


def read_set(fields: Fields, name: str) -> CpuSet:
    """Numbers of pCPUs or nodes as `0-3,8`; none where it is left out."""
    return fields.listed(name, fields.text(name, "", empty=True, most=MAX_SET))


def read_bytes(fields: Fields, name: str) -> Bytes:
    """A size that only another program writes: in bytes."""
    return Bytes(fields.number(name))


def form_of_page(page: Bytes | None) -> str:
    """Bytes of huge pages; `0` for small ones, `default` for those of no named size."""
    return _NO_PAGE if page is None else str(int(page))


def read_page(fields: Fields, name: str) -> Bytes | None:
    """The reverse."""
    text = fields.text(name, "0", most=19)
    if text == _NO_PAGE:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise fields.fail(name, f"is neither bytes nor {_NO_PAGE!r}")
    return Bytes(int(text))
