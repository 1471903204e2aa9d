"""One blocking connection to a bus, as the client uses it; what jeepney leaves to us is here.

Of jeepney only the protocol is used (addresses, authentication, messages): its own connections say
Hello without a time limit, and wait for nothing but their socket.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from jeepney import DBusAddress, HeaderFields, MessageFlag, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, Authenticator
from jeepney.bus import find_system_bus, get_bus

from virtfabric.dbus.names import DBUS_NAME, DBUS_PATH
from virtfabric.model.errors import InvalidValueError, UnreachableError

if TYPE_CHECKING:
    from jeepney import Message

CONNECT_TIMEOUT_S: Final = 5.0
CALL_TIMEOUT_S: Final = 25.0
_CHUNK: Final = 1 << 16


class Waker(Protocol):
    """What ends a wait for signals early: it becomes readable, and stays so."""

    @property
    def awake(self) -> bool:
        """Whether it is readable by now."""

    def fileno(self) -> int:
        """What is waited for beside the bus."""


def call_of(
    name: str, path: str, interface: str, member: str, signature: str, body: tuple[Any, ...]
) -> Message:
    """A method call that starts nobody who is not there."""
    address = DBusAddress(path, name, interface)
    message = new_method_call(address, member, signature or None, body)
    message.header.flags |= MessageFlag.no_auto_start
    return message


def error_of(reply: Message) -> str | None:
    """The name of an error; None for the answer that was asked for."""
    if reply.header.message_type is not MessageType.error:
        return None
    return str(reply.header.fields[HeaderFields.error_name])


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Channel:
    """A connection. Not for several threads."""

    def __init__(self, bus: socket.socket) -> None:
        """Take over a socket; it need not be connected yet."""
        self._bus = bus
        self._parser = Parser()
        self._replies: dict[int, Message] = {}
        self._signals: deque[Message] = deque()
        self._serials = count(1)
        self.name = ""
        """Ours on the bus, like `:1.7`."""

    @classmethod
    def connect(cls, address: str | None, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect to a bus; None means the system bus.

        Raises:
            UnreachableError: no bus there, or it does not let us in.
        """
        channel = cls(socket.socket(socket.AF_UNIX))
        try:
            channel._join(address, time.monotonic() + timeout_s)
        except TimeoutError:
            raise UnreachableError("the bus does not answer") from None
        except (OSError, ValueError, RuntimeError) as error:
            # jeepney has ValueError and RuntimeError for addresses and for what is no bus
            raise UnreachableError(f"no bus there: {error}") from error
        finally:
            if not channel.name:
                channel.close()
        return channel

    def _join(self, address: str | None, deadline: float) -> None:
        self._bus.settimeout(_left(deadline))
        self._bus.connect(get_bus(address) if address else find_system_bus())
        talk = Authenticator()
        for line in talk:
            self._send(line, deadline)
            talk.feed(self._read(deadline))
        self._send(BEGIN, deadline)
        hello = self.call_bus("Hello", timeout_s=_left(deadline))
        if error_of(hello):
            raise UnreachableError(f"the bus does not let us in: {hello.body[0]}")
        self.name = hello.body[0]

    def close(self) -> None:
        """Hang up; safe to repeat."""
        self._bus.close()

    def _send(self, data: bytes, deadline: float) -> None:
        self._bus.settimeout(_left(deadline))
        self._bus.sendall(data)

    def _read(self, deadline: float) -> bytes:
        self._bus.settimeout(_left(deadline))
        return self._receive()

    def _receive(self) -> bytes:
        data = self._bus.recv(_CHUNK)
        if not data:
            raise ConnectionResetError("the bus hung up")
        return data

    def _sort(self, data: bytes) -> None:
        for message in self._parser.feed(data):
            if message.header.message_type is MessageType.signal:
                self._signals.append(message)
            elif message.header.message_type is not MessageType.method_call:
                self._replies[message.header.fields[HeaderFields.reply_serial]] = message

    # -- calls ------------------------------------------------------------------------------

    def call(self, message: Message, *, timeout_s: float = CALL_TIMEOUT_S) -> Message:
        """Send a method call and wait for its reply, which may be an error message.

        Raises:
            InvalidValueError: the body does not fit the signature; nothing was sent.
            UnreachableError: no reply in time, or the connection has ended.
        """
        deadline = time.monotonic() + timeout_s
        serial = next(self._serials)
        try:
            data = message.serialise(serial)
        except (TypeError, ValueError, struct.error) as error:
            raise InvalidValueError("call", message.body, f"cannot be sent: {error}") from error
        try:
            self._send(data, deadline)
            while serial not in self._replies:
                self._sort(self._read(deadline))
        except TimeoutError:
            raise UnreachableError(f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise UnreachableError(f"the connection to the bus broke: {error}") from error
        return self._replies.pop(serial)

    def call_bus(
        self, member: str, signature: str = "", *body: Any, timeout_s: float = CALL_TIMEOUT_S
    ) -> Message:
        """Call the bus itself (`AddMatch`, `GetNameOwner`...)."""
        message = call_of(DBUS_NAME, DBUS_PATH, DBUS_NAME, member, signature, body)
        return self.call(message, timeout_s=timeout_s)

    # -- signals ----------------------------------------------------------------------------

    def hear(self, *, timeout_s: float | None = None, waker: Waker | None = None) -> Message | None:
        """The next signal; None when none came in time, or the waker awoke.

        Args:
            timeout_s: None waits for ever.
            waker: waited for as well.

        Raises:
            UnreachableError: the connection has ended.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        watched = [self._bus.fileno(), *([] if waker is None else [waker.fileno()])]
        try:
            while not self._signals:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = select.select(watched, [], [], left)[0]
                if ready != watched[:1]:
                    return None
                self._sort(self._receive())
        except OSError as error:
            raise UnreachableError("the bus has ended the connection") from error
        return self._signals.popleft()
