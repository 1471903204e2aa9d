"""A card's flash: an append-only file whose last whole record is the state.

A record is in the file, flushed to the disk, before anybody is told of what it says. Power may go
at any moment: a last record that is not whole is as if it had never been begun. Damage anywhere
else is not guessed away, nor in the first record: it comes with the file, whole or not at all.

Record: magic `VFS1`, length of the text (32 bits, big-endian), its BLAKE2b (16 bytes), JSON text.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC: Final = b"VFS1"
_HEADER: Final = struct.Struct(">4sI16s")
_ROTATE: Final = 1 << 20
"""Bytes, from which on the file is begun anew with the last record."""
MAX_RECORD: Final = 16 << 20


class StateError(VirtfabricError):
    """The card's state cannot be written."""


class StateDamagedError(StateError):
    """The card's state is not what the firmware wrote."""


class StateLog:
    """One file, one writer."""

    def __init__(self, path: Path, *, rotate: int = _ROTATE) -> None:
        """Open or create; what a loss of power left of a last record is cut off.

        Raises:
            StateDamagedError: names the file and the place.
            StateError: it cannot be read or written.
        """
        self.path = path
        self._rotate = rotate
        self._fd = -1
        self._has_remains = False
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with path.open("rb") as file:
                data = file.read()
            self.state, self._end = self._last(data)
            if self._end < len(data):
                os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            self._sync_directory()
        except OSError as error:
            self.close()
            raise StateError(f"the card's state {path}: {error.strerror}") from error
        except StateDamagedError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, state: dict[str, Any]) -> None:
        """Keep a state; when this returns it survives a loss of power.

        Raises:
            StateError: it is not kept, the one before is.
        """
        record = _record(state)
        try:
            if not self._end or self._end + len(record) > self._rotate:
                self._begin_anew(record)
            else:
                self._write(record)
        except OSError as error:
            raise StateError(f"the card's state {self.path}: {error.strerror}") from error
        self.state = state

    def _write(self, record: bytes) -> None:
        if self._has_remains:
            self._cut_off_remains()
        try:
            _write_all(self._fd, record, self._end)
            os.fsync(self._fd)
        except OSError:
            self._has_remains = True
            with suppress(OSError):  # else before the next one, or at the next start
                self._cut_off_remains()
            raise
        self._end += len(record)

    def _cut_off_remains(self) -> None:
        """A shorter record in its place must not end in what was left of a longer one."""
        os.ftruncate(self._fd, self._end)
        self._has_remains = False

    def _begin_anew(self, record: bytes) -> None:
        new = self.path.with_name(self.path.name + ".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, record, 0)
            os.fsync(fd)
            new.rename(self.path)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._end = fd, len(record)
        self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _last(self, data: bytes) -> tuple[dict[str, Any] | None, int]:
        """The last whole record, and where it ends."""
        state, place = None, 0
        while place < len(data):
            text, end = self._next(data, place)
            if text is None:
                break
            state, place = json.loads(text), end
        return state, place

    def _next(self, data: bytes, place: int) -> tuple[bytes | None, int]:
        text, end = _read(data, place)
        if text is None and not self._is_torn(data, place):
            raise StateDamagedError(
                f"the card's state {self.path} is damaged at byte {place}",
                advice="move it away; the card then begins without slices",
            )
        return text, end

    def _is_torn(self, data: bytes, place: int) -> bool:
        """Whether here begins what a loss of power can leave of a last record.

        File systems may have the new length on the disk before the bytes, and these in any order:
        what is missing is zeros.
        """
        rest = data[place:]
        if not any(rest):
            return True
        begins = all(have in (0, meant) for have, meant in zip(rest, _MAGIC, strict=False))
        return bool(place) and begins and not _has_record(data, place + 1)


def _read(data: bytes, place: int) -> tuple[bytes | None, int]:
    """The text of a whole record and where it ends; None, and the same place, if there is none."""
    if len(data) - place >= _HEADER.size:
        magic, length, digest = _HEADER.unpack_from(data, place)
        first = place + _HEADER.size
        text, end = data[first : first + length], first + length
        whole = magic == _MAGIC and end <= len(data)
        if whole and blake2b(text, digest_size=16).digest() == digest:
            return text, end
    return None, place


def _has_record(data: bytes, place: int) -> bool:
    """Whether a whole record begins anywhere from a place on."""
    while (place := data.find(_MAGIC, place)) >= 0:
        if _read(data, place)[0] is not None:
            return True
        place += 1
    return False


def _record(state: dict[str, Any]) -> bytes:
    text = json.dumps(state, separators=(",", ":"), sort_keys=True).encode()
    if len(text) > MAX_RECORD:
        raise StateError(f"the card's state has {len(text)} bytes, more than {MAX_RECORD}")
    return _HEADER.pack(_MAGIC, len(text), blake2b(text, digest_size=16).digest()) + text


def _write_all(fd: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(fd, data, place)
        data, place = data[written:], place + written
