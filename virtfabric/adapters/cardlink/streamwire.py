"""A wire over a stream of bytes: TLS, greeting, answers by number, heartbeats, and coming back.

One thread with an event loop of its own for each card: whoever asks waits in a thread of theirs,
and the agent's loop never does. A card that does not answer in time is cut off: what it would have
said later could be taken for something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from virtfabric.adapters.cardlink.wire import ANSWER_S
from virtfabric.adapters.cardlink.witness import LieError
from virtfabric.model.errors import (
    CardDistrustedError,
    CardError,
    CardLostError,
    InvalidValueError,
)
from virtfabric.protocol import messages as m
from virtfabric.protocol.conversation import MAX_OUTGOING
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from virtfabric.adapters.cardlink.doors import Door
    from virtfabric.adapters.cardlink.wire import WireListener
    from virtfabric.protocol.conversation import Received
    from virtfabric.protocol.messages import Hello, Message

log = logging.getLogger(__name__)

BACKOFF_S: Final = (0.1, 5.0)
"""First and longest wait before the next attempt."""
HEARTBEAT_S: Final = 2.0
GREETING_S: Final = 5.0
_READ: Final = 64 << 10
_MAX_UNREAD: Final = MAX_OUTGOING
"""Bytes that a card did not take yet, above which the link holds (and bounds) what is said."""
_GOODBYE_S: Final = 0.5
_MARGIN_S: Final = 5.0
"""Beyond a deadline that the wire's own timer did not enforce, as it is gone."""


@dataclass(slots=True)
class Timing:
    """How patient a wire is, in seconds."""

    heartbeat_s: float = HEARTBEAT_S
    answer_s: float = ANSWER_S
    greeting_s: float = GREETING_S
    backoff_s: tuple[float, float] = BACKOFF_S


@dataclass(slots=True)
class _Asked:
    message: Message
    answer: Future[Message]
    late: asyncio.TimerHandle


class StreamWire:
    """Implements `Wire`."""

    def __init__(
        self, door: Door, serial: str, context: ssl.SSLContext, hello: Hello,
        timing: Timing | None = None,
    ) -> None:  # fmt: skip
        """Nothing is opened before `start`.

        Args:
            door: the way to the card.
            serial: of the card that has to be there.
            context: TLS settings with this host's certificate.
            hello: what this host says of itself.
            timing: None for the usual.
        """
        self._door = door
        self._serial = serial
        self._context = context
        self._hello = hello
        self._timing = timing or Timing()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._connection: _Connection | None = None
        self._closed = False
        self._lie = ""

    def start(self, listener: WireListener) -> None:
        """Connect in the background, and whenever the link is lost."""
        with self._lock:
            if self._closed or (self._thread is not None and not self._lie):
                return
            before, self._lie = self._thread, ""
        if before is not None:
            before.join()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._stay(listener)), name=f"card {self._serial}"[:15],
            daemon=True,
        )  # fmt: skip
        self._thread.start()

    def ask(self, message: Message, *, deadline_s: float = ANSWER_S) -> Message:
        """Say something and wait for its answer.

        Raises:
            CardLostError, CardDistrustedError, InvalidValueError
        """
        answer: Future[Message] = Future()
        with self._lock:
            if self._lie:
                raise CardDistrustedError(f"card {self._serial} is distrusted: {self._lie}")
            if self._loop is None or self._connection is None:
                raise CardLostError(f"card {self._serial} is not connected")
            self._loop.call_soon_threadsafe(self._connection.ask, message, answer, deadline_s)
        try:
            return answer.result(deadline_s + _MARGIN_S)
        except TimeoutError:  # the loop ended in between, and with it its timers
            raise CardLostError(f"card {self._serial} is not connected any more") from None

    def close(self) -> None:
        """End it for good; safe to repeat."""
        with self._lock:
            self._closed = True
            if self._loop is not None and self._ending is not None:
                self._loop.call_soon_threadsafe(self._ending.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- in the wire's thread -----------------------------------------------------------------

    async def _stay(self, listener: WireListener) -> None:
        ending = asyncio.Event()
        with self._lock:
            self._loop, self._ending = asyncio.get_running_loop(), ending
            if self._closed:
                ending.set()
        ended = asyncio.create_task(ending.wait())
        try:
            await self._reconnect(listener, ended)
        except LieError as lie:
            with self._lock:
                self._lie = str(lie)
            listener.lied(str(lie))
        finally:
            with self._lock:
                self._loop = None
            ended.cancel()

    async def _reconnect(self, listener: WireListener, ended: asyncio.Task[Literal[True]]) -> None:
        first_s, longest_s = self._timing.backoff_s
        wait_s, told = first_s, ""
        while not ended.done():
            began = time.monotonic()
            connection = _Connection(self._serial, listener, self._timing)
            try:
                why = await self._connect_once(connection, ended)
            except LieError:
                raise
            except Exception:
                # a defect of ours in what a card said: it must not leave the card for good
                log.exception("the link to card %s broke", self._serial)
                why = "internal error; see the agent's log"
            if ended.done():
                return
            if connection.is_up:
                told = ""
            if connection.is_up and time.monotonic() - began > longest_s:
                wait_s = first_s  # one that comes and goes at once is not met ten times a second
            if why != told:  # an absent card is told of once, not every five seconds
                told = why
                listener.lost(why)
            await asyncio.wait({ended}, timeout=wait_s)
            wait_s = min(wait_s * 2, longest_s)

    async def _connect_once(
        self, connection: _Connection, ended: asyncio.Task[Literal[True]]
    ) -> str:
        """One link from beginning to end; why it ended.

        Raises:
            LieError
        """
        try:
            reader, writer = await asyncio.wait_for(self._door.open(), self._timing.greeting_s)
        except (OSError, TimeoutError) as error:
            return f"{self._door}: {getattr(error, 'strerror', '') or 'no answer'}"
        session = Session(self._context, server=False, peer_role=m.Role.CARD, serial=self._serial)
        running = asyncio.create_task(
            connection.run(Link(session, self._hello), reader, writer, self._publish)
        )
        try:
            await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                connection.cut("closed here")
            why = await running
        finally:
            self._publish(None)
            known = await asyncio.to_thread(self._door.close)
        return f"{self._door}: {known}" if known else why

    def _publish(self, connection: _Connection | None) -> None:
        with self._lock:
            self._connection = connection


class _Connection:
    """One link while it lasts; everything in the wire's thread."""

    def __init__(self, serial: str, listener: WireListener, timing: Timing) -> None:
        self._serial = serial
        self._listener = listener
        self._timing = timing
        self._asked: dict[int, _Asked] = {}
        self._first = 0
        self._why = ""
        self.is_up = False

    async def run(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        publish: Callable[[_Connection], None],
    ) -> str:  # fmt: skip
        """Until it ends; why it did.

        Raises:
            LieError
        """
        self._link, self._writer, self._publish = link, writer, publish
        late = asyncio.get_running_loop().call_later(
            self._timing.greeting_s, self._greeting_is_late
        )
        beating = asyncio.create_task(self._beat())
        failure: CardError = CardLostError(f"card {self._serial}: the link ended")
        try:
            self._flush()
            while not self._why:
                await self._read(reader)
            failure = CardLostError(f"card {self._serial}: {self._why}")
        except OSError as error:
            self._why = self._why or error.strerror or "the link broke"
            failure = CardLostError(f"card {self._serial}: {self._why}")
        except LieError as lie:
            self._why = str(lie)
            failure = CardDistrustedError(f"card {self._serial} is distrusted: {lie}")
            raise
        finally:
            late.cancel()
            beating.cancel()
            self._leave(failure)
        return self._why

    async def _read(self, reader: asyncio.StreamReader) -> None:
        data = await reader.read(_READ)
        link = self._link
        if data:
            for received in link.receive(data):
                self._take(received)
        else:
            link.receive_end()
        for refused in link.refusals():
            self._listener.refused(refused)
        if link.ended_by:
            self._why = self._why or link.ended_by
        elif link.is_open and not self._first:
            self._first = link.send(m.InventoryRequest())
        self._flush()

    def ask(self, message: Message, answer: Future[Message], deadline_s: float) -> None:
        """Say something; `answer` gets what comes, or why nothing did."""
        if self._why or not self._link.is_open:
            answer.set_exception(CardLostError(f"card {self._serial}: {self._why or 'no link'}"))
            return
        try:
            number = self._link.send(message)
        except InvalidValueError as error:
            answer.set_exception(error)
            return
        late = asyncio.get_running_loop().call_later(
            deadline_s, self.cut, f"it did not answer within {deadline_s:g} s"
        )
        self._asked[number] = _Asked(message, answer, late)
        self._flush()

    def cut(self, why: str) -> None:
        """End the link."""
        self._why = self._why or why
        self._say_goodbye()

    # -- what comes ---------------------------------------------------------------------------

    def _take(self, received: Received) -> None:
        message, about = received.message, received.about
        if about and about == self._first and not self.is_up:
            self._greet(message)
        elif about in self._asked:
            self._answer(self._asked.pop(about), message)
        elif about and not isinstance(message, m.Error):
            raise LieError(f"it sent a {type(message).__name__} about what nobody had asked")
        elif isinstance(message, m.Heartbeat):
            self._link.send(message, received.number)
        else:
            self._listener.told(message)

    def _greet(self, message: Message) -> None:
        hello = self._link.peer
        if isinstance(message, m.Error):
            self.cut(f"it does not say what it has: {message.code}: {message.detail}")
        elif not isinstance(message, m.Inventory) or hello is None:
            raise LieError(f"it answered InventoryRequest with {type(message).__name__}")
        else:
            self._listener.greeted(hello, message)
            self.is_up = True
            self._publish(self)

    def _answer(self, asked: _Asked, message: Message) -> None:
        asked.late.cancel()
        try:
            self._listener.answered(asked.message, message)
        except LieError as lie:
            asked.answer.set_exception(
                CardDistrustedError(f"card {self._serial} is distrusted: {lie}")
            )
            raise
        asked.answer.set_result(message)

    # -- time ---------------------------------------------------------------------------------

    def _greeting_is_late(self) -> None:
        if not self.is_up:
            self.cut(f"it did not greet within {self._timing.greeting_s:g} s")

    async def _beat(self) -> None:
        beat = 0
        while True:
            await asyncio.sleep(self._timing.heartbeat_s)
            if not self.is_up:
                continue
            beat += 1
            answer: Future[Message] = Future()
            self.ask(m.Heartbeat(beat), answer, self._timing.answer_s)
            with contextlib.suppress(CardError):
                await asyncio.wrap_future(answer)

    def _flush(self) -> None:
        transport = self._writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > _MAX_UNREAD:
            return  # the link holds the rest, and ends by itself where that is too much
        data = self._link.outgoing()
        if data:
            self._writer.write(data)

    def _say_goodbye(self) -> None:
        self._link.close()
        self._flush()
        self._writer.close()
        # one that reads nothing would keep the last bytes, and with them this end, for ever
        asyncio.get_running_loop().call_later(_GOODBYE_S, self._writer.transport.abort)

    def _leave(self, failure: CardError) -> None:
        self._say_goodbye()
        for asked in self._asked.values():
            asked.late.cancel()
            if not asked.answer.done():
                asked.answer.set_exception(failure)
        self._asked.clear()
