r"""The hook's wire format: a request and a reply, lengths in front. Pure: knows no sockets.

Request: `VF1 OPERATION NAME-LENGTH XML-LENGTH\n`, then name and XML.
Reply:   `VF1 CODE LINE-LENGTH OUTPUT-LENGTH\n`, then the line (stderr) and the output (stdout).
The other end, hooks/qemu, is standard library only and has its own few lines of this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final, Self

from virtfabric.model.errors import InvalidValueError

MAX_XML: Final = 4 << 20
"""Bytes. A domain XML of 500 disks is under 400 KiB."""
MAX_NAME: Final = 4096
MAX_HEADER: Final = 64
_REQUEST: Final = re.compile(rb"VF1 ([a-z]{1,16}) ([0-9]{1,9}) ([0-9]{1,9})")
_REPLY: Final = re.compile(rb"VF1 ([0-9]) ([0-9]{1,9}) ([0-9]{1,9})")


class HookOperation(StrEnum):
    """What libvirt calls the hook for, as far as the agent wants to know."""

    PREPARE = "prepare"
    STARTED = "started"
    RELEASE = "release"
    RECONNECT = "reconnect"
    MIGRATE = "migrate"
    RESTORE = "restore"


class HookCode(IntEnum):
    """How a call ended. On `UNABLE` the hook does what it does when nobody answers."""

    DONE = 0
    REFUSED = 1
    UNABLE = 2


@dataclass(frozen=True, slots=True)
class HookRequest:
    """One call of the hook."""

    operation: HookOperation
    name: str
    xml: str

    def encode(self) -> bytes:
        """The bytes on the wire."""
        name, xml = self.name.encode(), self.xml.encode()
        return b"VF1 %s %d %d\n" % (self.operation.encode(), len(name), len(xml)) + name + xml


@dataclass(frozen=True, slots=True)
class HookReply:
    """The answer. `line` goes to the hook's stderr, `output` (empty: unchanged) to its stdout."""

    code: HookCode
    line: str = ""
    output: str = ""

    def encode(self) -> bytes:
        """The bytes on the wire."""
        line, output = self.line.encode(), self.output.encode()
        return b"VF1 %d %d %d\n" % (self.code, len(line), len(output)) + line + output

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a whole reply (until the agent closed).

        Raises:
            InvalidValueError: malformed, cut off or longer than it says.
        """
        header, _, rest = data.partition(b"\n")
        match = _REPLY.fullmatch(header)
        if match is None or int(match[1]) not in set(HookCode):
            raise InvalidValueError("reply", header[:MAX_HEADER], "is not a reply of the agent")
        line, output = int(match[2]), int(match[3])
        if len(rest) != line + output:
            raise InvalidValueError("reply", len(rest), f"bytes came, not {line + output}")
        return cls(
            HookCode(int(match[1])), _text("line", rest[:line]), _text("output", rest[line:])
        )


def _text(field: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidValueError(field, data[error.start : error.end], "is not UTF-8") from None


@dataclass(frozen=True, slots=True)
class _Header:
    operation: HookOperation
    name: int
    xml: int

    @classmethod
    def parse(cls, line: bytes) -> Self:
        match = _REQUEST.fullmatch(line)
        if match is None:
            raise InvalidValueError("header", line[:MAX_HEADER], "is not a hook's request")
        operation = match[1].decode()
        if operation not in set(HookOperation):
            raise InvalidValueError("operation", operation, "is not one the agent answers")
        for field, value, most in (("name", match[2], MAX_NAME), ("xml", match[3], MAX_XML)):
            if int(value) > most:
                raise InvalidValueError(field, int(value), f"is more than {most} bytes")
        return cls(HookOperation(operation), int(match[2]), int(match[3]))


class HookDecoder:
    """Takes a request in any split of bytes; holds at most header, name and `MAX_XML`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: _Header | None = None

    def feed(self, data: bytes) -> HookRequest | None:
        """Add bytes; the request once it is whole.

        Raises:
            InvalidValueError: malformed, too large, not UTF-8, or more bytes than announced.
        """
        self._buffer += data
        if self._header is None:
            end = self._buffer.find(b"\n", 0, MAX_HEADER)
            if end < 0:
                if len(self._buffer) >= MAX_HEADER:
                    raise InvalidValueError(
                        "header", bytes(self._buffer[:MAX_HEADER]), "has no end of line"
                    )
                return None
            self._header = _Header.parse(bytes(self._buffer[:end]))
            del self._buffer[: end + 1]
        return self._whole(self._header)

    def _whole(self, header: _Header) -> HookRequest | None:
        expected = header.name + header.xml
        if len(self._buffer) < expected:
            return None
        if len(self._buffer) > expected:
            raise InvalidValueError("request", len(self._buffer), f"bytes came, not {expected}")
        body = bytes(self._buffer)
        return HookRequest(
            header.operation, _text("name", body[: header.name]), _text("xml", body[header.name :])
        )
