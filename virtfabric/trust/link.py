"""A link: a session and, once both ends are proved, the conversation in it. Still no transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.conversation import MAX_OUTGOING, Conversation, State

if TYPE_CHECKING:
    from virtfabric.protocol.conversation import Received
    from virtfabric.protocol.messages import Hello, Message
    from virtfabric.trust.session import Session


class Link:
    """One end."""

    def __init__(self, session: Session, hello: Hello) -> None:
        """Begin; what the handshake says first is in `outgoing`."""
        self._session = session
        self._hello = hello
        self._talk: Conversation | None = None

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return (
            self._session.is_open and self._talk is not None and self._talk.state == State.OPEN
        )  # fmt: skip

    @property
    def ended_by(self) -> str:
        """Why it ended; empty while it has not. Bytes may still have to go out."""
        return (self._talk.ended_by if self._talk else "") or self._session.ended_by

    @property
    def peer(self) -> Hello | None:
        """What the other end said of itself; only the role and serial are proved."""
        return self._talk.peer if self._talk else None

    def receive(self, data: bytes) -> list[Received]:
        """Take bytes of the transport; messages that are whole now."""
        plain = self._session.receive(data)
        proved = self._session.peer
        if self._talk is None and proved is not None:
            self._talk = Conversation(self._hello, peer=(proved.role, proved.serial))
        found = list(self._talk.receive(plain)) if self._talk else []
        self._pump()
        return found

    def refusals(self) -> list[str]:
        """Frames of the other end that were refused since this was asked last, in words."""
        if self._talk is None:
            return []
        found, self._talk.refusals = self._talk.refusals, []
        return found

    def receive_end(self) -> None:
        """The transport ended."""
        self._session.receive_end()

    def send(self, message: Message, about: int = 0) -> int:
        """Say something; the number it got.

        Raises:
            InvalidValueError: it is not open, or the message is too large.
        """
        if self._talk is None:
            raise InvalidValueError("link", self.ended_by or "handshake", "is not open")
        number = self._talk.send(message, about)
        self._pump()
        return number

    def outgoing(self) -> bytes:
        """Bytes for the transport."""
        data = self._session.outgoing()
        self._pump()
        return data + self._session.outgoing()

    def close(self) -> None:
        """Say goodbye; safe to repeat."""
        self._session.close()

    def _pump(self) -> None:
        if self._talk is None:
            return
        if self._session.is_open and self._session.waiting < MAX_OUTGOING:
            self._session.send(self._talk.outgoing())
        if self._talk.is_closed:
            self._session.close(self._talk.ended_by)
