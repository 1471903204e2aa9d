"""A wire without a socket: a card's brain in the same process, and the faults that tests want."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from virtfabric.adapters.cardlink.wire import ANSWER_S
from virtfabric.adapters.cardlink.witness import LieError
from virtfabric.model.errors import CardDistrustedError, CardLostError
from virtfabric.protocol import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.cardlink.wire import WireListener
    from virtfabric.protocol.messages import Message


class Brain(Protocol):
    """What decides in a card."""

    def handle(self, message: Message) -> list[Message]:
        """The answers to a message."""

    def tick(self) -> list[Message]:
        """Let time pass; what the card tells by itself."""


class SimulatedWire:
    """Implements `Wire`; time passes on the card with each question.

    Attributes:
        mangle: what becomes of an answer on its way; a test's way to lie.
        before, after: called with each message before it reaches the brain, and before its answer
            reaches the asker: to lose the link there, or to crash.
    """

    def __init__(self, serial: str, brain: Brain, *, software: str = "simulated 1") -> None:
        self._serial = serial
        self._brain = brain
        self._software = software
        self._boots = 1
        self._lock = threading.RLock()
        self._listener: WireListener | None = None
        self._up = False
        self._absent = ""
        self._lie = ""
        self.mangle: Callable[[Message, Message], Message] = lambda _asked, answer: answer
        self.before: Callable[[Message], None] = lambda _message: None
        self.after: Callable[[Message], None] = lambda _message: None

    def start(self, listener: WireListener) -> None:
        """Connect."""
        with self._lock:
            self._listener, self._lie = listener, ""
            if self._absent:
                listener.lost(self._absent)
            elif not self._up:
                self._greet()

    def ask(self, message: Message, *, deadline_s: float = ANSWER_S) -> Message:
        """Say something; the answer is there at once."""
        self.before(message)
        with self._lock:
            self._check()
            answers = self._brain.handle(message)
            self._tell(self._brain.tick())
            if not answers:
                self.lose(f"it did not answer within {deadline_s:g} s")
            self.after(message)
            self._check()
            answer = self.mangle(message, answers[0])
            try:
                self._ear.answered(message, answer)
            except LieError as lie:
                raise self._catch(lie) from None
            return answer

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._up = False

    # -- what tests do ------------------------------------------------------------------------

    def lose(self, why: str) -> None:
        """The link ends, and does not come back before `return_`."""
        with self._lock:
            was_up, self._up, self._absent = self._up, False, why
            if was_up and self._listener is not None:
                self._listener.lost(why)

    def return_(self, brain: Brain | None = None) -> None:
        """The card is there again; started anew with another brain."""
        with self._lock:
            self._absent = ""
            if brain is not None:
                self._brain = brain
                self._boots += 1
            if self._listener is not None and not self._up and not self._lie:
                self._greet()

    def tick(self) -> None:
        """Time passed on the card."""
        with self._lock:
            self._tell(self._brain.tick())

    def tell(self, message: Message) -> None:
        """The card says this by itself."""
        with self._lock:
            self._tell([message])

    # -- inside -------------------------------------------------------------------------------

    @property
    def _ear(self) -> WireListener:
        assert self._listener is not None, "not started"
        return self._listener

    def _check(self) -> None:
        if self._lie:
            raise CardDistrustedError(f"card {self._serial} is distrusted: {self._lie}")
        if not self._up:
            raise CardLostError(f"card {self._serial}: {self._absent or 'not connected'}")

    def _greet(self) -> None:
        hello = m.Hello(
            m.Role.CARD, self._serial, self._software, f"boot-{self._boots}", (1,)
        )  # fmt: skip
        (inventory,) = self._brain.handle(m.InventoryRequest())
        told = self.mangle(m.InventoryRequest(), inventory)
        assert isinstance(told, m.Inventory)
        self._up = True
        try:
            self._ear.greeted(hello, told)
        except LieError as lie:
            self._catch(lie)

    def _tell(self, messages: list[Message]) -> None:
        if not self._up or self._listener is None:
            return
        try:
            for message in messages:
                self._listener.told(message)
        except LieError as lie:
            self._catch(lie)

    def _catch(self, lie: LieError) -> CardDistrustedError:
        self._up, self._lie = False, str(lie)
        self._ear.lied(self._lie)
        return CardDistrustedError(f"card {self._serial} is distrusted: {lie}")
