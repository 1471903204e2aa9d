"""A visitor: a host's end of a link that can also say what no host should. For conformance only."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import CardLostError, InvalidValueError, VirtfabricError
from virtfabric.protocol import messages as m
from virtfabric.protocol.codec import BY_CODE, decode, encode
from virtfabric.protocol.frames import FrameDecoder
from virtfabric.trust.session import Session

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from virtfabric.protocol.frames import Frame
    from virtfabric.protocol.messages import Message

ANSWER_S: Final = 10.0
_READ: Final = 64 << 10


class FailedCheckError(VirtfabricError):
    """The card does not do what the protocol says."""


def expect(holds: object, problem: str) -> None:
    """Go on where it holds.

    Raises:
        FailedCheckError
    """
    if not holds:
        raise FailedCheckError(problem)


class Visitor:
    """One link, blocking, with frames as they come. To be used in a `with` block."""

    def __init__(self, path: Path, context: ssl.SSLContext, host: str, serial: str) -> None:
        """Connect and shake hands; whether that went well is `is_open`.

        Raises:
            CardLostError: nobody listens there.
        """
        self.host = host
        self.sent = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._session = Session(context, server=False, peer_role=m.Role.CARD, serial=serial)
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise CardLostError(f"socket {path}: {error.strerror or error}") from error
        while not self._session.is_open and self._exchange():
            pass

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()
        with contextlib.suppress(OSError):
            self._flush()
        self._socket.close()

    @property
    def is_open(self) -> bool:
        """Whether the card has proved who it is, and the session has not ended."""
        return self._session.is_open

    @property
    def ended_by(self) -> str:
        """Why the session ended."""
        return self._session.ended_by

    def hello(self, *, serial: str = "", versions: tuple[int, ...] = (1,)) -> m.Hello:
        """What a host says first."""
        return m.Hello(
            m.Role.HOST, serial or self.host, "virtfabric conformance", "conformance", versions
        )

    def greet(self) -> m.Hello:
        """Greet; what the card said first.

        Raises:
            FailedCheckError: it did not say hello.
        """
        self.say(self.hello())
        said = self.hear()
        if not isinstance(said, m.Hello):
            raise FailedCheckError(f"said {_name(said)} first, not hello")
        return said

    def say(self, message: Message, about: int = 0, *, version: int = 1) -> int:
        """Say something; the number of its frame."""
        self.sent += 1
        self.send(encode(message, self.sent, about, version=version))
        return self.sent

    def say_frame(self, frame: Frame) -> int:
        """Say a frame as it is, with the next number."""
        self.sent += 1
        self.send(frame.encode())
        return self.sent

    def send(self, data: bytes, *, step: int = 0) -> None:
        """Send bytes as they are; `step` at a time, each in a record of its own."""
        with contextlib.suppress(InvalidValueError, OSError):  # ended: the next `hear` says so
            for first in range(0, len(data), step or len(data)):
                self._session.send(data[first : first + (step or len(data))])
                self._flush()

    def hear(self) -> Message | None:
        """The next thing that the card says; None where it ended the session instead.

        Raises:
            FailedCheckError: it says nothing, or what cannot be read.
        """
        frame = self.next_frame()
        return None if frame is None else _read(frame)

    def ask(self, message: Message) -> Message:
        """Ask, and hear the answer; what comes by itself in between is passed over.

        Raises:
            FailedCheckError: no answer.
        """
        return self.answer_to(self.say(message))

    def answer_to(self, number: int) -> Message:
        """The answer to the frame of this number.

        Raises:
            FailedCheckError: no answer.
        """
        while (frame := self.next_frame()) is not None:
            if frame.about == number:
                return _read(frame)
        raise FailedCheckError(f"ended the link instead of an answer: {self.ended_by}")

    def hear_end(self) -> m.Error | None:
        """The last word of the card, once it has ended the link; None where it gave none.

        Raises:
            FailedCheckError: it does not end it.
        """
        last = None
        while (frame := self.next_frame()) is not None:
            said = _read(frame)
            last = said if isinstance(said, m.Error) else last
        return last

    def next_frame(self) -> Frame | None:
        """The next frame as it came; None where the card ended the session instead.

        Raises:
            FailedCheckError: it says nothing.
        """
        while not self._frames:
            if self.ended_by or not self._exchange():
                return None
        return self._frames.pop(0)

    def _exchange(self) -> bool:
        """Move bytes both ways once; whether there is more to come."""
        try:
            self._flush()
            if self.ended_by:
                return False
            data = self._socket.recv(_READ)
        except TimeoutError:
            raise FailedCheckError(f"said nothing for {ANSWER_S:g} s") from None
        except OSError:
            self._session.receive_end()
            return False
        if not data:
            self._session.receive_end()
            return bool(self._frames)
        try:
            self._frames += self._decoder.feed(self._session.receive(data))
        except InvalidValueError as error:
            raise FailedCheckError(f"sent what is no frame: {error}") from None
        self._flush()
        return True

    def _flush(self) -> None:
        data = self._session.outgoing()
        if data:
            self._socket.sendall(data)


def _read(frame: Frame) -> Message:
    if frame.kind not in BY_CODE:
        raise FailedCheckError(f"sent a frame of unknown kind {frame.kind:#04x}")
    try:
        return decode(frame)
    except InvalidValueError as error:
        raise FailedCheckError(f"sent a {BY_CODE[frame.kind].name} with {error}") from None


def _name(message: Message | None) -> str:
    return "nothing" if message is None else type(message).__name__
