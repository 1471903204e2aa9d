"""A wire: what carries messages to one card and back. Real or simulated; it understands none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from virtfabric.protocol.messages import Hello, Inventory, Message

ANSWER_S: Final = 5.0
"""In which a card has to answer; a decision takes it well under a millisecond."""


class WireListener(Protocol):
    """Hears everything in the order in which the card said it, one call at a time.

    Must not block. A lie raises `witness.LieError`: the wire then ends, and stays so.
    """

    def greeted(self, hello: Hello, inventory: Inventory) -> None:
        """A link is up; the card said this of itself, first thing."""

    def answered(self, asked: Message, answer: Message) -> None:
        """An answer came; whoever asked gets it after this."""

    def told(self, message: Message) -> None:
        """The card said something that nobody asked for."""

    def refused(self, why: str) -> None:
        """A frame of the card could not be taken (another version, unreadable); it was told."""

    def lost(self, why: str) -> None:
        """The link ended. Unless it was for good, the wire tries again."""

    def lied(self, why: str) -> None:
        """What was heard cannot be true; the wire has ended, until `start`."""


class Wire(Protocol):
    """One card's wire. Thread-safe."""

    def start(self, listener: WireListener) -> None:
        """Connect, now and whenever the link is lost; also after a lie, when told to."""

    def ask(self, message: Message, *, deadline_s: float = ANSWER_S) -> Message:
        """Say something and wait for its answer; a card that does not answer is cut off.

        Raises:
            CardLostError: there is no link, it ended, or no answer came in time.
            CardDistrustedError: the answer cannot be true.
            InvalidValueError: the message is too large.
        """

    def close(self) -> None:
        """End it for good; safe to repeat."""
