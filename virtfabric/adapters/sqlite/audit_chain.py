"""The audit chain itself: what is signed, and how a chain is checked.

Knows records and keys, no files and no tables. Each record's MAC covers the MAC before it:

    mac(n) = HMAC-SHA256(key, mac(n-1) || canonical JSON of [seq, at, kind, subjects, body])

Canonical JSON has sorted keys, no spaces, and ASCII only. So whoever has the key can check a log
with ten lines of code of his own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from virtfabric.model.errors import InvalidValueError
from virtfabric.ports import AuditRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GENESIS: Final = hashlib.sha256(b"virtfabric audit log, version 1").hexdigest()
"""The MAC before the first record."""

_HEAD = re.compile(r"([0-9]{1,18}):([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record's sequence number and MAC; prints as `SEQ:MAC`."""

    sequence: int = 0
    mac: str = GENESIS

    @classmethod
    def parse(cls, text: str, *, field: str = "head") -> Self:
        """Read `SEQ:MAC`.

        Raises:
            InvalidValueError: malformed.
        """
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise InvalidValueError(
                field,
                text,
                "is not an audit head",
                advice="it looks like 42:9f86d081... (64 digits)",
            )
        return cls(int(match[1]), match[2].lower())

    def __str__(self) -> str:
        return f"{self.sequence}:{self.mac}"


class RawRecord(NamedTuple):
    """A record as it is stored; `subjects` and `body` are canonical JSON."""

    sequence: int
    at: float
    kind: str
    subjects: str
    body: str
    mac: str

    def decoded(self) -> AuditRecord:
        """As the port has it."""
        return AuditRecord(
            self.sequence, self.at, self.kind, tuple(json.loads(self.subjects)),
            json.loads(self.body), self.mac,
        )  # fmt: skip


_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: object) -> str:
    """The one way to write `value` as JSON.

    Raises:
        InvalidValueError: it is not JSON (NaN included).
    """
    try:
        # Twice: keys that are not text become text at the first pass, and sort as such only in
        # the second.
        return _CANONICAL.encode(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InvalidValueError("audit.body", value, f"is not JSON: {error}") from None


def make_record(
    key: bytes,
    previous: Head,
    at: float,
    kind: str,
    subjects: Iterable[str],
    body: Mapping[str, Any],
) -> RawRecord:
    """The record that follows `previous`."""
    names = list(dict.fromkeys(_storable(name) for name in subjects))
    texts = canonical(names), canonical(dict(body))
    bare = RawRecord(previous.sequence + 1, float(at), _storable(kind), *texts, "")
    return bare._replace(mac=_mac(key, previous.mac, _content(bare)))


def _storable(text: str) -> str:
    """Without lone surrogates, which SQLite takes in JSON's escapes but not in a column."""
    return text.encode("utf-8", "replace").decode()


def _content(record: RawRecord) -> str:
    head = _CANONICAL.encode([record.sequence, record.at, record.kind])
    return f"{head[:-1]},{record.subjects},{record.body}]"


def _mac(key: bytes, previous_mac: str, content: str) -> str:
    message = bytes.fromhex(previous_mac) + content.encode()
    return hmac.digest(key, message, "sha256").hex()


def _is_intact(key: bytes, previous_mac: str, record: RawRecord) -> bool:
    """Whether a stored record is the one that was signed behind `previous_mac`.

    Each column is read by itself first: else text could be moved from one into the next without
    changing what is signed.
    """
    try:
        subjects, body = json.loads(record.subjects), json.loads(record.body)
        content = _CANONICAL.encode([record.sequence, record.at, record.kind, subjects, body])
        expected = _mac(key, previous_mac, content)
    except (ValueError, TypeError):
        return False
    return content == _content(record) and hmac.compare_digest(
        expected.encode(), str(record.mac).encode()
    )


class ChainCheck:
    """Walks over a chain, oldest record first, and keeps the first problem it finds."""

    def __init__(self, key: bytes, wanted: Iterable[tuple[str, Head]]) -> None:
        """Heads that the chain must contain, each with the place it comes from."""
        self._key = key
        self._wanted = [(where, head) for where, head in wanted if head.sequence > 0]
        self.records = 0
        self.head = Head()
        self.problem = ""

    def take(self, record: RawRecord) -> bool:
        """Check the next record; False when it is not worth going on."""
        self.problem = self._gap(record.sequence) or self._content(record) or self._heads(record)
        if not self.problem:
            self.records += 1
            self.head = Head(record.sequence, record.mac)
        return not self.problem

    def finish(self) -> None:
        """Check that nothing is missing at the end."""
        if self.problem:
            return
        for where, head in self._wanted:
            if head.sequence > self.head.sequence:
                missing = _span(self.head.sequence + 1, head.sequence)
                self.problem = (
                    f"{missing} missing: the log was cut off after record {self.head.sequence} "
                    f"({where} has {head.sequence})"
                )
                return

    def _gap(self, sequence: int) -> str:
        expected = self.head.sequence + 1
        if sequence == expected:
            return ""
        if sequence > expected:
            return f"{_span(expected, sequence - 1)} missing"
        return f"record {sequence} is out of order"

    def _content(self, record: RawRecord) -> str:
        if _is_intact(self._key, self.head.mac, record):
            return ""
        return (
            f"record {record.sequence} was edited, inserted or moved, "
            "or the key is not the one that it was written with"
        )

    def _heads(self, record: RawRecord) -> str:
        for where, head in self._wanted:
            if head.sequence == record.sequence and head.mac != record.mac:
                return f"record {record.sequence} is not the one that {where} has: it was rewritten"
        return ""


def _span(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first}-{last} are"
