"""Fields: reading what a peer or a file said, one checked value after the other. Pure.

An error names the field by its path (`slice.qos.priority`) and the value. Whoever reads a table
ends with `finish`, which refuses fields that nobody asked for.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any, Final, TypeVar

from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MAX_BYTES, Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

MAX_TEXT: Final = 1024
"""Characters of one value, unless a field has another limit."""
MAX_ENTRIES: Final = 4096
MAX_LISTED: Final = 1 << 18
"""Numbers that the lists of one document (`0-3,8`) may stand for, each list counted once."""
_MAX_DIGITS: Final = 19
_SHOWN: Final = 60
"""Characters of a wrong value that an error repeats."""
_NONE: Final = object()

Choice = TypeVar("Choice", bound="StrEnum")


def parse_json(body: bytes) -> Fields:
    """The body of a message: one JSON object, whole numbers only, no name twice.

    Raises:
        InvalidValueError: anything else.
    """
    try:
        document = json.loads(
            body.decode(),
            object_pairs_hook=_refuse_repeated,
            parse_int=_whole_number,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except InvalidValueError:
        raise
    except (ValueError, RecursionError) as error:
        problem = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidValueError("body", shown(body), f"is not JSON: {problem}") from None
    return Fields(document)


def format_json(form: dict[str, Any]) -> bytes:
    """The body of a message."""
    return json.dumps(form, separators=(",", ":"), allow_nan=False).encode()


def shown(value: object) -> object:
    """A value as short as an error needs it."""
    if isinstance(value, bytes | str) and len(value) > _SHOWN:
        return value[:_SHOWN]
    if isinstance(value, list | dict):
        return f"({len(value)} entries)"
    return value


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidValueError(str(shown(name)), "", "is there twice")
        found[name] = value
    return found


def _whole_number(text: str) -> int:
    return int(text) if len(text) <= _MAX_DIGITS else _refuse_number(text)


def _refuse_number(text: str) -> int:
    raise InvalidValueError("body", shown(text), "is not a whole number of at most 19 digits")


class _Lists:
    """Lists of pCPUs or nodes in one document; each is read once, as most are there many times.

    Eight characters can stand for 65,536 numbers: a frame must not be more than a machine holds.
    """

    def __init__(self) -> None:
        self._known: dict[str, CpuSet] = {}
        self._left = MAX_LISTED

    def read(self, text: str, field: str) -> CpuSet:
        """What a list stands for.

        Raises:
            InvalidValueError: it is none, or one too many.
        """
        found = self._known.get(text)
        if found is None:
            if "^" in text:
                raise InvalidValueError(field, shown(text), "is not a list like 0-3,8")
            found = CpuSet.parse(text, field=field)
            self._left -= len(found)
            if self._left < 0:
                problem = f"is one too many: {MAX_LISTED} numbers in one document"
                raise InvalidValueError(field, shown(text), problem)
            self._known[text] = found
        return found


class Fields:
    """One table of a document."""

    def __init__(
        self, document: object, place: str = "", *, units: bool = False,
        lists: _Lists | None = None,
    ) -> None:  # fmt: skip
        """Begin to read.

        Args:
            document: what JSON or TOML gave.
            place: path of the table in its document, for errors.
            units: whether sizes may be text (`512MiB`), as people write them.
            lists: of the document, for a table in another one.

        Raises:
            InvalidValueError: not a table.
        """
        if not isinstance(document, dict):
            raise InvalidValueError(place or "body", shown(document), "is not a table")
        self._document = document
        self._place = place
        self._units = units
        self._lists = lists or _Lists()
        self._asked: list[str] = []

    def path(self, name: str) -> str:
        """The field as an error names it."""
        return f"{self._place}.{name}" if self._place else name

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._document

    def fail(self, name: str, problem: str) -> InvalidValueError:
        """The error for one field."""
        return InvalidValueError(self.path(name), shown(self._document.get(name)), problem)

    def finish(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            InvalidValueError: names the first such field, and the nearest that there is.
        """
        for name in self._document:
            if name not in self._asked:
                near = difflib.get_close_matches(str(name)[:_SHOWN], self._asked, n=1, cutoff=0.5)
                advice = f"did you mean {near[0]}?" if near else ""
                field = self.path(str(shown(name)))
                value = shown(self._document[name])
                raise InvalidValueError(field, value, "is not a known field", advice=advice)

    def _get(self, name: str, default: object) -> Any:
        self._asked.append(name)
        value = self._document.get(name, default)
        if value is _NONE:
            raise InvalidValueError(self.path(name), None, "is missing")
        return value

    def text(
        self, name: str, default: object = _NONE, *, most: int = MAX_TEXT, empty: bool = False
    ) -> str:
        """Text; by default neither missing nor empty."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, "is not text")
        if len(value) > most or (not value and not empty and value != default):
            raise self.fail(name, f"is not text of 1 to {most} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValueError(self.path(name), ascii(value), "is not Unicode text") from None
        return value

    def number(
        self, name: str, default: object = _NONE, *, least: int = 0, most: int = (1 << 63) - 1
    ) -> int:
        """A whole number, bounds included."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(name, f"is not a whole number from {least} to {most}")
        return value

    def size(self, name: str, default: object = _NONE) -> Bytes:
        """Bytes."""
        value = self._get(name, default)
        if self._units and isinstance(value, str):
            return Bytes.parse(value, field=self.path(name))
        return Bytes(self.number(name, default, most=MAX_BYTES))

    def flag(self, name: str, default: object = _NONE) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "is not true or false")
        return value

    def choice(self, name: str, kind: type[Choice], default: object = _NONE) -> Choice:
        """One of some words."""
        value = self.text(name, default)
        if value not in set(kind):
            raise self.fail(name, f"is not one of {', '.join(kind)}")
        return kind(value)

    def parsed(self, name: str, parse: Callable[[str], Any]) -> Any:
        """Text that a function reads which knows no paths."""
        value = self.text(name)
        try:
            return parse(value)
        except InvalidValueError as error:
            raise self.fail(name, f"is wrong: {error}") from None

    def listed(self, name: str, text: str) -> CpuSet:
        """pCPUs or nodes that a text of this field stands for; the empty one for none."""
        return self._lists.read(text, self.path(name))

    def table(self, name: str, default: object = _NONE) -> Fields:
        """A table in this one."""
        value = self._get(name, default)
        return Fields(value, self.path(name), units=self._units, lists=self._lists)

    def tables(
        self, name: str, default: object = _NONE, *, most: int = MAX_ENTRIES
    ) -> list[Fields]:
        """A list of tables."""
        return [
            Fields(entry, f"{self.path(name)}[{n}]", units=self._units, lists=self._lists)
            for n, entry in enumerate(self._list(name, default, most))
        ]

    def numbers(
        self, name: str, default: object = _NONE, *, most: int = (1 << 63) - 1
    ) -> tuple[int, ...]:
        """A list of whole numbers from 0."""
        found = self._list(name, default, MAX_ENTRIES)
        for entry in found:
            if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry <= most:
                raise self.fail(name, f"holds something else than numbers from 0 to {most}")
        return tuple(found)

    def rows(self, name: str, width: int, *, most: int) -> list[list[int]]:
        """A list of lists of so many whole numbers from 0."""
        found = self._list(name, _NONE, MAX_ENTRIES)
        for row in found:
            if (
                not isinstance(row, list)
                or len(row) != width
                or not all(
                    isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= most for n in row
                )
            ):
                raise self.fail(name, f"holds something else than {width} numbers up to {most}")
        return found

    def texts(self, name: str, default: object = _NONE, *, most: int = MAX_TEXT) -> tuple[str, ...]:
        """A list of texts."""
        entries = {str(n): entry for n, entry in enumerate(self._list(name, default, MAX_ENTRIES))}
        inner = Fields(entries, self.path(name))
        return tuple(inner.text(place, most=most) for place in entries)

    def figures(self, name: str, default: object = _NONE) -> dict[str, int]:
        """A table of whole numbers from 0 by name."""
        value = self._get(name, default)
        inner = Fields(value, self.path(name))
        if len(value) > MAX_ENTRIES or any(len(entry) > MAX_TEXT for entry in value):
            raise self.fail(name, "has too many entries, or too long names")
        if not all(entry.isprintable() for entry in value):
            raise self.fail(name, "has a name that cannot be printed")
        return {entry: inner.number(entry) for entry in value}

    def _list(self, name: str, default: object, most: int) -> list[Any]:
        value = self._get(name, default)
        if not isinstance(value, list | tuple) or len(value) > most:
            raise self.fail(name, f"is not a list of at most {most} entries")
        return list(value)
