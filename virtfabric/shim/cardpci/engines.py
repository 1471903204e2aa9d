"""What a slice's accelerators compute, for real. Bytes in, bytes out; no memory, no rings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.cardpci.descriptors import Operation, Status

if TYPE_CHECKING:
    from collections.abc import Callable

_NONCE: Final = 12
_TAG: Final = 16
_KEYS: Final = (16, 24, 32)
_LEVELS: Final = range(1, 20)
_LEVEL: Final = 3
_MAX_WINDOW: Final = 8 << 20
"""What a decoder has to take at least (RFC 8878, 3.1.1.1.2)."""


class EngineError(VirtfabricError):
    """It cannot be computed; `status` is what the completion says."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine is given.

    Attributes:
        secret: out of the card's memory.
        room: bytes that the result may have.
    """

    source: bytes
    parameter: bytes
    secret: bytes
    room: int


def _seal(work: Work) -> bytes:
    """AES-GCM: the text encrypted, with its tag of 16 bytes behind it (NIST SP 800-38D)."""
    cipher, nonce, more = _prepare(work)
    if work.room < len(work.source) + _TAG:
        raise EngineError(Status.NO_ROOM)
    return cipher.encrypt(nonce, work.source, more)


def _open(work: Work) -> bytes:
    """The reverse; nothing comes out of what was changed."""
    cipher, nonce, more = _prepare(work)
    if len(work.source) < _TAG:
        raise EngineError(Status.BAD_DATA)
    if work.room < len(work.source) - _TAG:
        raise EngineError(Status.NO_ROOM)
    try:
        return cipher.decrypt(nonce, work.source, more)
    except InvalidTag:
        raise EngineError(Status.NOT_AUTHENTIC) from None


def _prepare(work: Work) -> tuple[AESGCM, bytes, bytes]:
    if len(work.secret) not in _KEYS or len(work.parameter) < _NONCE:
        raise EngineError(Status.BAD_DATA)
    return AESGCM(work.secret), work.parameter[:_NONCE], work.parameter[_NONCE:]


def _compress(work: Work) -> bytes:
    """One Zstandard frame (RFC 8878); the parameter's one byte is the level."""
    level = work.parameter[0] if work.parameter else _LEVEL
    if level not in _LEVELS or len(work.parameter) > 1:
        raise EngineError(Status.BAD_DATA)
    return _fit(zstandard.ZstdCompressor(level=level).compress(work.source), work.room)


def _decompress(work: Work) -> bytes:
    """What one frame holds; never more than there is room for, whatever its header promises."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    try:
        promised = zstandard.get_frame_parameters(work.source).content_size
        if promised not in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            if promised > work.room:
                raise EngineError(Status.NO_ROOM)
            return decompressor.decompress(work.source)
        return _decompress_stream(decompressor, work)
    except zstandard.ZstdError:
        raise EngineError(Status.BAD_DATA) from None


def _decompress_stream(decompressor: zstandard.ZstdDecompressor, work: Work) -> bytes:
    """A frame that does not say how much is in it."""
    with decompressor.stream_reader(work.source) as reader:
        _fit(reader.read(work.room + 1), work.room)
    # a reader gives the beginning of a frame that was cut off, this does not
    return decompressor.decompress(work.source, max_output_size=work.room)


def _fit(data: bytes, room: int) -> bytes:
    if len(data) > room:
        raise EngineError(Status.NO_ROOM)
    return data


ENGINES: Final[dict[str, dict[int, Callable[[Work], bytes]]]] = {
    "crypto.aes": {Operation.AES_GCM_SEAL: _seal, Operation.AES_GCM_OPEN: _open},
    "compress.zstd": {
        Operation.ZSTD_COMPRESS: _compress, Operation.ZSTD_DECOMPRESS: _decompress,
    },
}  # fmt: skip
"""By capability: operations that it has."""
