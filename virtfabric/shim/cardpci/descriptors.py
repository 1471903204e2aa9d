"""What stands in the rings in guest memory. Pure; little-endian."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

DESCRIPTOR_SIZE: Final = 64
COMPLETION_SIZE: Final = 16
MAX_LENGTH: Final = 1 << 20
MAX_PARAMETER: Final = 4096
_DESCRIPTOR: Final = struct.Struct("<HHI QQQQ IIII II")
_COMPLETION: Final = struct.Struct("<III")
_INTERRUPT: Final = 1


class Operation(IntEnum):
    """What a descriptor asks for."""

    NOTHING = 0x00
    STORE = 0x01
    LOAD = 0x02
    AES_GCM_SEAL = 0x10
    AES_GCM_OPEN = 0x11
    ZSTD_COMPRESS = 0x20
    ZSTD_DECOMPRESS = 0x21
    SEND = 0x30
    RECEIVE = 0x31


class Status(IntEnum):
    """How it ended."""

    DONE = 0
    BAD_DESCRIPTOR = 1
    UNKNOWN_OPERATION = 2
    NOT_READY = 3
    DMA_REFUSED = 4
    ACCESS_FAULT = 5
    NO_ROOM = 6
    BAD_DATA = 7
    NOT_AUTHENTIC = 8


class Fault(IntEnum):
    """What FAULT shows."""

    NONE = 0
    DMA_REFUSED = 1
    ACCESS = 2
    BAD_RING = 3
    BAD_DOORBELL = 4


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from an address on; of the guest's memory, or of the card's."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One operation.

    Attributes:
        key: protection key for the card's memory.
        source, target, parameter: in the guest's memory.
        card: in the card's memory.
        cookie: comes back in the completion.
        sound: False if what is reserved is not 0, or a length is beyond its limit.
    """

    operation: int
    interrupt: bool
    key: int
    source: Span
    target: Span
    parameter: Span
    card: Span
    cookie: int
    sound: bool


def parse_descriptor(data: bytes) -> Descriptor:
    """Any 64 bytes."""
    (
        operation, flags, key, source, target, parameter, card, source_length, target_length,
        parameter_length, card_length, cookie, reserved,
    ) = _DESCRIPTOR.unpack(data)  # fmt: skip
    sound = (
        not reserved and not flags & ~_INTERRUPT and parameter_length <= MAX_PARAMETER
        and max(source_length, target_length, card_length) <= MAX_LENGTH
    )  # fmt: skip
    return Descriptor(
        operation, bool(flags & _INTERRUPT), key, Span(source, source_length),
        Span(target, target_length), Span(parameter, parameter_length), Span(card, card_length),
        cookie, sound,
    )  # fmt: skip


def format_completion(status: Status, written: int, cookie: int) -> bytes:
    """The first twelve bytes; the number, which makes it valid, is written after them."""
    return _COMPLETION.pack(status, written, cookie)
