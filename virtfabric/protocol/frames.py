r"""Frames: how messages between a card and a host lie on a byte stream. Pure.

Every frame of every version begins with the same 20 bytes, so that a frame which cannot be read
can still be passed over: magic `VF`, version and kind (1 byte each), then big-endian 32-bit words:
the sender's number for it, the number that it answers (0: none), and the lengths of body and tail.
The body is JSON, the tail plain bytes. docs/card-protocol.md has it as a table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC: Final = b"VF"
MAX_BODY: Final = 1 << 20
"""Bytes. An inventory of 1,000 slices has 500 KiB."""
MAX_TAIL: Final = 256 << 10
MAX_NUMBER: Final = (1 << 32) - 1
_HEADER: Final = struct.Struct(">2sBBIIII")
HEADER_SIZE: Final = _HEADER.size
MAX_FRAME: Final = HEADER_SIZE + MAX_BODY + MAX_TAIL


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; what is in the body is for `messages` to say."""

    version: int
    kind: int
    number: int
    about: int = 0
    body: bytes = b""
    tail: bytes = b""

    def encode(self) -> bytes:
        """The bytes on the wire.

        Raises:
            InvalidValueError: body or tail are too large for any receiver.
        """
        _check_lengths(len(self.body), len(self.tail))
        header = _HEADER.pack(
            MAGIC, self.version, self.kind, self.number, self.about, len(self.body), len(self.tail)
        )
        return header + self.body + self.tail


def _check_lengths(body: int, tail: int) -> None:
    for field, length, most in (("body", body, MAX_BODY), ("tail", tail, MAX_TAIL)):
        if length > most:
            raise InvalidValueError(field, length, f"is more than {most} bytes")


class FrameDecoder:
    """Takes a stream in any split. Holds one frame at most, beside the bytes just fed.

    Where one frame ends and the next begins is lost with a wrong header: after the error there is
    nothing more to be had.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken: InvalidValueError | None = None

    @property
    def held(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Each frame that is whole now, in order.

        Every byte is taken, also when the caller stops in between: what is left comes with the
        next call.

        Raises:
            InvalidValueError: not a frame of this protocol, or too large; and again at each call.
        """
        self._buffer += data
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        place = 0
        try:
            while (found := self._next(place)) is not None:
                frame, place = found
                yield frame
        finally:
            del self._buffer[:place]

    def _next(self, place: int) -> tuple[Frame, int] | None:
        if self._broken is not None:
            raise self._broken
        if len(self._buffer) - place < HEADER_SIZE:
            self._check_start(place)
            return None
        _, version, kind, number, about, body, tail = _HEADER.unpack_from(self._buffer, place)
        self._check_start(place)
        try:
            _check_lengths(body, tail)
        except InvalidValueError as error:
            self._break(error)
        first = place + HEADER_SIZE
        if len(self._buffer) < first + body + tail:
            return None
        middle, end = first + body, first + body + tail
        whole = memoryview(self._buffer)
        frame = Frame(
            version, kind, number, about, bytes(whole[first:middle]), bytes(whole[middle:end])
        )
        whole.release()
        return frame, end

    def _check_start(self, place: int) -> None:
        start = bytes(self._buffer[place : place + len(MAGIC)])
        if not MAGIC.startswith(start):
            self._break(InvalidValueError("magic", start, "does not begin a frame"))

    def _break(self, error: InvalidValueError) -> None:
        self._broken = error
        self._buffer.clear()
        raise error
