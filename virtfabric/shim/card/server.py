"""A card's hosts on a Unix socket: moves bytes, lets the card's time pass, keeps the log.

Everything happens in one event loop, so the firmware is never asked twice at once. A host that
does not read, never proves who it is, or is one too many costs its own link only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import stat
import uuid
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import AlreadyRunningError, VirtfabricError
from virtfabric.shim.card.story import describe_exchange, describe_news, one_line
from virtfabric.shim.firmware.desk import Desk
from virtfabric.shim.firmware.firmware import Firmware
from virtfabric.shim.firmware.programming import EmulatedPort
from virtfabric.shim.firmware.statelog import StateLog
from virtfabric.trust.context import make_context
from virtfabric.trust.store import identity_of_pem, read_credentials, read_pem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.ports import Clock
    from virtfabric.protocol.messages import Message
    from virtfabric.shim.card.description import CardDescription
    from virtfabric.shim.firmware.programming import ConfigurationPort
    from virtfabric.trust.link import Link

log = logging.getLogger("virtfabric-card")

MAX_HOSTS: Final = 16
GREETING_S: Final = 10.0
"""In which a host has to prove who it is."""
TICK_S: Final = 0.05
DEAF_S: Final = 10.0
"""In which a host has to read on, while it is answered."""
GOODBYE_S: Final = 2.0
"""For what is said to a host whose link ends; one that does not read hears it not."""
_READ: Final = 64 << 10
_MAX_UNREAD: Final = 256 << 10
"""Bytes that the kernel did not take yet, above which the link itself has to hold (and bound)
what is said to a host that does not read."""


class CardError(VirtfabricError):
    """The card cannot start."""


class Card:
    """An emulated card with its flash; `close` when its day is over."""

    def __init__(
        self, description: CardDescription, clock: Clock, *, port: ConfigurationPort | None = None,
        has_functions: bool = False,
    ) -> None:  # fmt: skip
        """Power on; `has_functions`: somebody will show its slices on a bus.

        Raises:
            InvalidValueError: its credentials or signers cannot be used.
            AlreadyRunningError: another process is this card.
            StateError: its flash cannot be used.
        """
        adapter = description.adapter
        credentials = read_credentials(description.credentials)
        named = identity_of_pem(credentials.certificate)
        if named.uri != f"urn:virtfabric:card:{adapter.serial}":
            raise CardError(
                f"{description.credentials}: the certificate is of {named}, "
                f"and this is card {adapter.serial}"
            )
        context = make_context(credentials, server=True)
        signers = [read_pem(path) for path in description.signers]
        self._lock = _lock(description.state)
        try:
            self._log = StateLog(description.state)
            self.firmware = Firmware(
                adapter,
                self._log,
                clock=clock,
                port=port or EmulatedPort(),
                signers=signers,
                secret=secrets.token_bytes(32) if has_functions else b"",
            )
        except BaseException:
            os.close(self._lock)
            raise
        self.boot = uuid.uuid4().hex[:16]
        self.desk = Desk(
            self.firmware, context, boot=self.boot, answered=_tell_exchange, told=_tell_news
        )

    def close(self) -> None:
        """Power off."""
        self._log.close()
        os.close(self._lock)


class CardServer:
    """Serves one card until `stop` is set."""

    def __init__(self, desk: Desk, path: Path, happened: Callable[[], None] = lambda: None) -> None:
        """`happened` is called on the loop whenever the firmware may have changed."""
        self._desk = desk
        self._path = path
        self._happened = happened
        self._writers: dict[Link, asyncio.StreamWriter] = {}

    async def run(self, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Serve; hosts are told goodbye at the end.

        Raises:
            AlreadyRunningError: somebody answers on the socket.
            CardError: it cannot be made.
        """
        listener = await asyncio.to_thread(_listen_at, self._path)
        try:
            server = await asyncio.start_unix_server(self._meet, sock=listener)
        except BaseException:
            listener.close()
            raise
        log.info("listening on %s", self._path)
        ticking = asyncio.create_task(self._tick())
        if ready is not None:
            ready.set()
        try:
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({stopped, ticking}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if ticking.done():
                ticking.result()  # the card's time stands still: a defect, and it must show
        finally:
            ticking.cancel()
            server.close()
            self._path.unlink(missing_ok=True)
            for link, writer in list(self._writers.items()):
                link.close()
                self._flush(link, writer)
                writer.close()
            log.info("stopped; %d hosts were told", len(self._writers))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._desk.tick()
            self._happened()
            for link, writer in list(self._writers.items()):
                self._flush(link, writer)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= MAX_HOSTS:
            log.warning("a host was turned away: there are %d", MAX_HOSTS)
            writer.close()
            return
        link = self._desk.open()
        self._writers[link] = writer
        late = asyncio.get_running_loop().call_later(GREETING_S, self._turn_out, link, writer)
        try:
            await self._serve(link, reader, writer)
        except TimeoutError:
            log.warning("a host did not read for %g s", DEAF_S)
        except OSError as error:
            log.debug("a link broke: %s", error)
        finally:
            late.cancel()
            del self._writers[link]
            link.receive_end()
            self._flush(link, writer)
            writer.close()
            who = link.peer.serial if link.peer else "somebody"
            log.info("%s left: %s", who, one_line(link.ended_by))

    async def _serve(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        known = False
        self._flush(link, writer)
        while not link.ended_by:
            data = await reader.read(_READ)
            if not data:
                return
            self._desk.receive(link, data)
            self._happened()
            self._flush(link, writer)
            if link.is_open and link.peer is not None and not known:
                known = True
                software = one_line(link.peer.software)
                log.info("host %s came (%s)", link.peer.serial, software)
            async with asyncio.timeout(DEAF_S):
                await writer.drain()

    def _flush(self, link: Link, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        if transport.is_closing():
            return
        is_read = transport.get_write_buffer_size() <= _MAX_UNREAD
        data = link.outgoing() if is_read else b""
        if data:
            with contextlib.suppress(OSError):
                writer.write(data)
        if link.ended_by:
            writer.close()
            # it waits for all to be taken: a host that does not read would keep its place
            asyncio.get_running_loop().call_later(GOODBYE_S, transport.abort)

    def _turn_out(self, link: Link, writer: asyncio.StreamWriter) -> None:
        if not link.is_open:
            log.warning("a host did not prove in %g s who it is", GREETING_S)
            writer.transport.abort()


def _tell_exchange(link: Link, asked: Message, answer: Message) -> None:
    line = describe_exchange(asked, answer)
    if line and link.peer is not None:
        log.info("%s: %s", link.peer.serial, one_line(line))


def _tell_news(message: Message) -> None:
    line = describe_news(message)
    if line:
        log.info("%s", one_line(line))


def _lock(state: Path) -> int:
    """Hold the flash: two processes would each append what the other does not know."""
    path = state.with_name(state.name + ".lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CardError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise AlreadyRunningError(f"another process runs the card of {state}") from error
    return fd


def _listen_at(path: Path) -> socket.socket:
    """A socket there, in place of one that nobody answers on any more."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise CardError(f"{path} is there, and is no socket")
    if _is_answered(path):
        raise AlreadyRunningError(f"another card answers on {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.settimeout(0)
    except OSError as error:
        listener.close()
        raise CardError(f"socket {path}: {error.strerror}") from error
    return listener


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise CardError(f"socket {path}: {error.strerror or error}") from error
        return True
