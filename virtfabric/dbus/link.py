"""One connection to a bus, as service and client use it; the rough edges of dbus-next end here.

dbus-next 0.2.3 writes whatever is queued without asking whether the socket takes it, and falls
off the bus with BlockingIOError when it does not. So one message at a time is handed to it: the
event loop calls the writer only for a socket that takes more, and a first write then never fails.
Its reply handlers are not used either: calls made here have a timeout and end with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType, MessageFlag, MessageType
from dbus_next.message import Message

from virtfabric.dbus.names import DBUS_NAME, DBUS_PATH
from virtfabric.model.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECT_TIMEOUT_S: Final = 5.0
_REPLIES: Final = (MessageType.METHOD_RETURN, MessageType.ERROR)


class _Bus(MessageBus):  # type: ignore[misc]
    """Ends where the library would spin for ever: a bus that hangs up while we log in."""

    async def _auth_readline(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            # byte by byte: what follows the line belongs to the message stream
            piece = await self._loop.sock_recv(self._sock, 1)
            if not piece:
                raise ConnectionResetError("the bus hung up during authentication")
            line += piece
        return line[:-2].decode()

    def give_up(self) -> None:
        """Let go of a connection that did not come about.

        The library leaves socket and futures to the garbage collector, which then complains of
        exceptions that nobody retrieved.
        """
        self._method_return_handlers.clear()
        self._user_disconnect = True
        self._finalize()
        if not self._disconnect_future.cancelled():
            self._disconnect_future.exception()
        for end in (self._stream, self._sock):
            with contextlib.suppress(OSError):
                end.close()


class Link:
    """A connection. Use from its event loop only."""

    def __init__(self, bus: Any, on_message: Callable[[Message], None]) -> None:
        """Take over a connected bus; `on_message` gets method calls and signals."""
        self._bus = bus
        self._on_message = on_message
        self._lock = asyncio.Lock()
        self._sending: asyncio.Future[None] | None = None
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._closed = asyncio.Event()
        bus.add_message_handler(self._handle)
        self._watch = asyncio.create_task(self._wait_end())

    @classmethod
    async def connect(
        cls,
        address: str | None,
        on_message: Callable[[Message], None],
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Link:
        """Connect to a bus; None means the system bus.

        Raises:
            UnreachableError: no bus there, or it does not let us in.
        """
        try:
            async with asyncio.timeout(timeout_s):
                bus = _Bus(address) if address else _Bus(bus_type=BusType.SYSTEM)
                try:
                    await bus.connect()
                except BaseException:
                    bus.give_up()
                    raise
        except TimeoutError:
            raise UnreachableError("the bus does not answer") from None
        except Exception as error:
            # the library raises its own types, OSError, and ValueError for a malformed address
            raise UnreachableError(f"no bus there: {error}") from error
        return cls(bus, on_message)

    @property
    def unique_name(self) -> str:
        """Our name on the bus, like `:1.7`."""
        return str(self._bus.unique_name)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Until the connection ends, from either side."""
        await self._closed.wait()

    async def close(self) -> None:
        """Hang up; safe to repeat."""
        if not self.closed:
            self._bus.disconnect()
        await self._watch

    async def send(self, message: Message) -> None:
        """Send; returns when it is written.

        Raises:
            UnreachableError: the connection has ended.
            Exception: of dbus-next, when the body does not fit the signature.
        """
        async with self._lock:
            if self.closed:
                raise UnreachableError("the connection to the bus has ended")
            self._sending = self._bus.send(message)
            try:
                await self._sending
            except OSError as error:
                raise UnreachableError(f"the connection to the bus broke: {error}") from error
            finally:
                self._sending = None

    async def call(self, message: Message, *, timeout_s: float = 25.0) -> Message:
        """Send a method call and wait for its reply, which may be an error message.

        Raises:
            UnreachableError: no reply in time, or the connection has ended.
        """
        message.serial = self._bus.next_serial()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[message.serial] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self.send(message)
                return await reply
        except TimeoutError:
            raise UnreachableError(f"no answer within {timeout_s:g} s") from None
        finally:
            self._pending.pop(message.serial, None)

    async def call_bus(self, member: str, signature: str, *body: Any) -> Message:
        """Call the bus itself (`AddMatch`, `RequestName`...)."""
        return await self.call(
            Message(
                destination=DBUS_NAME,
                path=DBUS_PATH,
                interface=DBUS_NAME,
                member=member,
                signature=signature,
                body=list(body),
                flags=MessageFlag.NO_AUTOSTART,
            )
        )

    def _handle(self, message: Message) -> bool:
        if message.message_type not in _REPLIES:
            self._on_message(message)
            # claimed: the library's own answers would leak tracebacks
            return bool(message.message_type is MessageType.METHOD_CALL)
        waiting = self._pending.get(message.reply_serial)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        return waiting is not None

    async def _wait_end(self) -> None:
        with contextlib.suppress(Exception):
            await self._bus.wait_for_disconnect()
        self._closed.set()
        gone = UnreachableError("the connection to the bus has ended")
        waiting = [f for f in (self._sending, *self._pending.values()) if f is not None]
        for future in waiting:
            if not future.done():
                future.set_exception(gone)
