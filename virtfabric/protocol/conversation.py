"""A conversation: one end of a link between card and host, above the transport. Pure.

Bytes in, messages out, and bytes to be sent. It agrees on a version, numbers frames, and answers by
itself what cannot be read: politely where frames can still be told apart, else with a last word.
It must not know what a message is for. Who the peer is has been proved before (`trust.session`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.codec import BY_CODE, VERSION, VERSIONS, decode, encode
from virtfabric.protocol.frames import MAX_FRAME, MAX_NUMBER, FrameDecoder
from virtfabric.protocol.messages import Error, ErrorCode, Hello, Message, Role

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.protocol.frames import Frame

MAX_OUTGOING: Final = 2 * MAX_FRAME
"""Bytes that wait for a peer who does not read, at most; then the conversation ends."""
_MAX_REFUSALS: Final = 16
_HELLO: Final = 0x01
_ERROR: Final = 0x03


class State(StrEnum):
    """How far it is."""

    GREETING = "greeting"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Received:
    """A message, its sender's number for it, and the number of ours that it answers (0: none).

    Attributes:
        size: bytes of its body.
    """

    message: Message
    number: int
    about: int
    size: int


class Conversation:
    """One end. Whoever owns it moves bytes, and closes the transport when it is `CLOSED`.

    Attributes:
        refusals: frames of the peer that were refused, in words; the owner empties it.
    """

    def __init__(
        self,
        hello: Hello,
        *,
        peer: tuple[Role, str] | None = None,
        versions: tuple[int, ...] = VERSIONS,
    ) -> None:
        """Begin; the greeting is in `outgoing`.

        Args:
            hello: what this end says of itself; its versions are replaced by `versions`.
            peer: role and serial that the peer has proved; None where nothing was proved (tests).
            versions: to speak; for tests of versions to come.
        """
        self.state = State.GREETING
        self.peer: Hello | None = None
        self.ended_by = ""
        self.refusals: list[str] = []
        self._role = hello.role
        self._proved = peer
        self._versions = versions
        self._version = VERSION
        self._decoder = FrameDecoder()
        self._outgoing = bytearray()
        self._sent = 0
        self._heard = 0
        greeting = Hello(hello.role, hello.serial, hello.software, hello.boot, versions)
        self._queue(greeting, 0)

    @property
    def version(self) -> int:
        """Agreed on once it is open."""
        return self._version

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken or said."""
        return self.state == State.CLOSED

    def send(self, message: Message, about: int = 0) -> int:
        """Say something; the number it got.

        Raises:
            InvalidValueError: too large for a frame, or the conversation is not open.
        """
        if self.state != State.OPEN:
            raise InvalidValueError("state", self.state.value, "is no state to send in")
        return self._queue(message, about)

    def outgoing(self) -> bytes:
        """All bytes to be sent; they are the caller's now."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive(self, data: bytes) -> Iterator[Received]:
        """Messages in what came, in order; the greeting is not among them.

        To be read to its end. Nothing is raised: what is wrong is answered.
        """
        if self.is_closed:
            return
        try:
            for frame in self._decoder.feed(data):
                received = self._take(frame)
                if received is not None:
                    yield received
                if self.ended_by:
                    return
        except InvalidValueError as error:
            self._end(ErrorCode.BROKEN_FRAMING, str(error), field=error.field)

    # -- one frame ----------------------------------------------------------------------------

    def _take(self, frame: Frame) -> Received | None:
        if frame.number != self._heard + 1:
            problem = f"frame {frame.number} after {self._heard}: replayed or lost"
            self._end(ErrorCode.OUT_OF_ORDER, problem, about=frame.number)
            return None
        self._heard = frame.number
        if self.state == State.GREETING:
            self._greet(frame)
            return None
        if frame.version != self._version:
            detail = f"version {frame.version}; agreed was {self._version}"
            self._complain(frame, ErrorCode.UNSUPPORTED_VERSION, detail)
            return None
        kind = BY_CODE.get(frame.kind)
        if kind is None:
            detail = f"kind {frame.kind:#04x} is not of version {self._version}"
            self._complain(frame, ErrorCode.UNKNOWN_MESSAGE, detail)
            return None
        sender = Role.HOST if self._role == Role.CARD else Role.CARD
        if frame.kind == _HELLO or sender not in kind.senders:
            detail = f"{kind.name} is not for a {sender} to say now"
            self._complain(frame, ErrorCode.UNEXPECTED_MESSAGE, detail)
            return None
        return self._read(frame)

    def _read(self, frame: Frame) -> Received | None:
        try:
            if frame.about > self._sent:
                raise InvalidValueError("about", frame.about, "was never sent")
            message = decode(frame)
        except InvalidValueError as error:
            self._complain(frame, ErrorCode.INVALID_MESSAGE, str(error), field=error.field)
            return None
        if isinstance(message, Error) and message.fatal:
            self._close(f"the peer ended it: {message.code}: {message.detail}")
        return Received(message, frame.number, frame.about, len(frame.body))

    def _greet(self, frame: Frame) -> None:
        """The first frame has to be a greeting, or the last word of a peer that gives up."""
        try:
            message = decode(frame) if frame.kind in (_HELLO, _ERROR) else None
        except InvalidValueError as error:
            self._end(ErrorCode.INVALID_MESSAGE, str(error), field=error.field, about=frame.number)
            return
        if isinstance(message, Error):
            self._close(f"the peer ended it: {message.code}: {message.detail}")
        elif not isinstance(message, Hello) or frame.version != VERSION:
            self._end(
                ErrorCode.UNEXPECTED_MESSAGE, "a hello of version 1 has to come first",
                about=frame.number,
            )  # fmt: skip
        else:
            self._agree(message, frame.number)

    def _agree(self, hello: Hello, number: int) -> None:
        common = set(self._versions) & set(hello.versions)
        proved = (hello.role, hello.serial) == self._proved or self._proved is None
        if not proved or hello.role == self._role:
            self._end(
                ErrorCode.IDENTITY_MISMATCH,
                f"{hello.role} {hello.serial!r} is not who this link is with",
                about=number,
            )
        elif not common:
            spoken = ", ".join(map(str, hello.versions)) or "none"
            self._end(
                ErrorCode.NO_COMMON_VERSION, f"none of version {spoken} is spoken here",
                about=number,
            )  # fmt: skip
        else:
            self.peer = hello
            self._version = max(common)
            self.state = State.OPEN

    # -- answers ------------------------------------------------------------------------------

    def _complain(self, frame: Frame, code: ErrorCode, detail: str, *, field: str = "") -> None:
        """Refuse one frame. An error is never answered by an error: two ends would never stop."""
        if len(self.refusals) < _MAX_REFUSALS:
            self.refusals.append(f"{code}: {detail}")
        if frame.kind != _ERROR:
            self._queue(
                Error(code, detail, field, versions=self._versions), frame.number
            )  # fmt: skip

    def _end(self, code: ErrorCode, detail: str, *, field: str = "", about: int = 0) -> None:
        self._queue(Error(code, detail, field, versions=self._versions, fatal=True), about)
        self._close(f"{code}: {detail}")

    def _close(self, why: str) -> None:
        self.state = State.CLOSED
        self.ended_by = self.ended_by or why

    def _queue(self, message: Message, about: int) -> int:
        data = encode(message, self._sent + 1, about, version=self._version)
        if len(self._outgoing) + len(data) > MAX_OUTGOING or self._sent == MAX_NUMBER:
            self._close("the peer does not read, or too much was said")
            return 0
        self._sent += 1
        self._outgoing += data
        return self._sent
