"""A host's picture in parts that fit into frames, and the whole of them again. Pure.

A picture is named after what it shows, so that the same host has the same name, and an answer says
which host it was made of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ledger import Books
from virtfabric.protocol.codec import BY_TYPE
from virtfabric.protocol.fields import format_json
from virtfabric.protocol.messages import HostPicture

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ledger import HostSnapshot

GUESTS: Final = 128
"""In one part, with as many of their holdings, grants, loans and residues; some KiB each."""
MAX_GUESTS: Final = 8192
MAX_PICTURE: Final = 32 << 20
"""Bytes of all bodies; so many guests with a grant and a loan each have less than half of it."""


def split_picture(snapshot: HostSnapshot) -> tuple[HostPicture, ...]:
    """What is to be sent of a host; at least one part."""
    books = snapshot.books
    rows = list(
        zip_longest(
            _pieces(snapshot.guests.values()), _pieces(books.holdings.values()),
            _pieces(books.grants.values()), _pieces(books.loans.values()),
            _pieces(books.residues), fillvalue=(),
        )
    ) or [((), (), (), (), ())]  # fmt: skip
    bare = replace(snapshot, guests={}, books=Books())
    parts = [
        HostPicture("unnamed", n, len(rows), None if n else bare, tuple(guests), _books(*some))
        for n, (guests, *some) in enumerate(rows)
    ]
    name = _name(parts)
    return tuple(replace(part, picture=name) for part in parts)


def _pieces(entries: Iterable[Any]) -> list[tuple[Any, ...]]:
    found = tuple(entries)
    return [found[first : first + GUESTS] for first in range(0, len(found), GUESTS)]


def _books(holdings: Any, grants: Any, loans: Any, residues: Any) -> Books:
    return Books(
        holdings={one.guest: one for one in holdings}, grants={one.id: one for one in grants},
        loans={one.id: one for one in loans}, residues=tuple(residues),
    )  # fmt: skip


def _name(parts: Iterable[HostPicture]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(format_json(BY_TYPE[HostPicture].form(part)))
    return digest.hexdigest()


@dataclass(slots=True)
class PictureFrame:
    """What came of a picture so far, and the last one that is whole."""

    name: str = ""
    whole: HostSnapshot | None = None
    _parts: list[HostPicture] = field(default_factory=list)
    _size: int = 0

    def add(self, part: HostPicture, size: int = 0) -> None:
        """One part, in its turn; part 0 begins anew.

        Args:
            part: of a picture.
            size: bytes of its body.

        Raises:
            InvalidValueError: out of turn, too large, or something is in two parts.
        """
        if part.part == 0:
            self._parts, self._size = [], 0
        expected = len(self._parts)
        same = not self._parts or _same_picture(self._parts[0], part)
        if part.part != expected or not same:
            self._parts = []
            raise InvalidValueError("part", part.part, f"came, not {expected} of the same picture")
        self._size += size
        if self._size > MAX_PICTURE:
            self._parts = []
            raise InvalidValueError("parts", self._size, f"bytes are more than {MAX_PICTURE}")
        self._parts.append(part)
        if len(self._parts) < part.parts:
            return
        parts, self._parts = self._parts, []
        self.whole = _join(parts)
        self.name = part.picture


def _same_picture(first: HostPicture, part: HostPicture) -> bool:
    return (first.picture, first.parts) == (part.picture, part.parts)


def _join(parts: list[HostPicture]) -> HostSnapshot:
    host = parts[0].host
    assert host is not None, "read with part 0"
    guests: dict[Any, GuestState] = {}
    for part in parts:
        _add(guests, {guest.uuid: guest for guest in part.guests}, "guests")
    if len(guests) > MAX_GUESTS:
        raise InvalidValueError("guests", len(guests), f"are more than {MAX_GUESTS}")
    books = Books(residues=tuple(one for part in parts for one in part.books.residues))
    for part in parts:
        _add(books.holdings, part.books.holdings, "books.holdings")
        _add(books.grants, part.books.grants, "books.grants")
        _add(books.loans, part.books.loans, "books.loans")
    return replace(host, guests=guests, books=books)


def _add(found: dict[Any, Any], more: Mapping[Any, Any], field_name: str) -> None:
    for key, one in more.items():
        if key in found:
            raise InvalidValueError(field_name, key, "is in two parts")
        found[key] = one
