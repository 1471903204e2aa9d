"""The desk: links to hosts, and the firmware behind them. Whoever has the transports moves bytes.

A host that breaks its link, or floods it, harms that link only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.messages import Error, ErrorCode, Heartbeat, Hello, Role
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from virtfabric.protocol.messages import Message
    from virtfabric.shim.firmware.firmware import Firmware

SOFTWARE: Final = "virtfabric-card 1"


class Desk:
    """All hosts of one card."""

    def __init__(
        self, firmware: Firmware, context: ssl.SSLContext, *, boot: str,
        answered: Callable[[Link, Message, Message], None] = lambda *_: None,
        told: Callable[[Message], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            firmware: which answers.
            context: with the card's certificate, for servers.
            boot: differs after each start, so that hosts know when to read everything again.
            answered: hears what a host asked, and each answer to it, for a log.
            told: hears what all hosts are told.
        """
        self._firmware = firmware
        self._context = context
        self._hello = Hello(
            Role.CARD, firmware.books.adapter.serial, SOFTWARE, boot, versions=()
        )  # fmt: skip
        self._links: list[Link] = []
        self._answered = answered
        self._told = told

    def open(self) -> Link:
        """A host came; its bytes go through `receive`, the card's are in `Link.outgoing`."""
        session = Session(self._context, server=True, peer_role=Role.HOST)
        link = Link(session, self._hello)
        self._links.append(link)
        return link

    def receive(self, link: Link, data: bytes) -> None:
        """Take bytes of a host, and answer what they say."""
        found = link.receive(data)
        went = link.ended_by  # what it said before it went counts
        for received in found:
            if link.ended_by != went:
                break  # it does not read: nobody hears the answers
            message = received.message
            if isinstance(message, Heartbeat) and received.about:
                continue  # the answer to one of ours
            who = link.peer.serial if link.peer else ""
            for answer in self._answers(message, who, received.size):
                self._answered(link, message, answer)
                self._say(link, answer, received.number)
        self._forget_ended()

    def _answers(self, message: Message, who: str, size: int) -> list[Message]:
        try:
            return self._firmware.handle(message, who, size)
        except Exception as error:  # noqa: BLE001 (one host's message must not end the others' card)
            return [Error(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")]

    def tick(self) -> None:
        """Let time pass; what happened is told to every host."""
        for message in self._firmware.tick():
            self._told(message)
            for link in self._links:
                if link.is_open:
                    self._say(link, message, 0)
        self._forget_ended()

    def _say(self, link: Link, message: Message, about: int) -> None:
        if not link.is_open:
            return
        try:
            link.send(message, about)
        except InvalidValueError as error:
            link.send(Error(ErrorCode.INTERNAL, f"the answer is too large: {error}"), about)

    def _forget_ended(self) -> None:
        self._links = [link for link in self._links if not link.ended_by]
