"""The agent on the bus: owns the connection, its return after a bus restart, and the signals.

It must not decide or authorise anything: the agent does, for the caller the bus vouches for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from dbus_next.constants import MessageFlag, MessageType, NameFlag, RequestNameReply
from dbus_next.message import Message

from virtfabric.dbus.credentials import Callers
from virtfabric.dbus.dispatch import Dispatcher
from virtfabric.dbus.emission import Outbox, emissions_of
from virtfabric.dbus.errors import SIGNATURE, ProtocolError, WireError, wire_error
from virtfabric.dbus.link import Link
from virtfabric.dbus.names import BUS_NAME, DBUS_NAME
from virtfabric.model.errors import AlreadyRunningError, UnreachableError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from virtfabric.daemon.api import AgentApi, Notice

log = logging.getLogger(__name__)

WORKERS: Final = 32
CALLS_EACH: Final = 8
"""Calls of one unprivileged user under way at once; more are told LimitsExceeded. Counted by user,
not by connection, and well below `WORKERS`: whoever may only read cannot keep root out."""
BACKOFF_S: Final = (0.1, 5.0)
"""First and longest wait between two attempts to get back on the bus."""
_LEAVERS: Final = (
    f"type='signal',sender='{DBUS_NAME}',interface='{DBUS_NAME}',member='NameOwnerChanged',arg2=''"
)


class Service:
    """`start` once, `close` once."""

    def __init__(self, agent: AgentApi, bus_address: str | None) -> None:
        """Prepare; None means the system bus."""
        self._agent = agent
        self._address = bus_address
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dbus")
        self._dispatcher = Dispatcher(agent, self._pool)
        self._callers = Callers()
        self._outbox = Outbox()
        self._running: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._link: Link | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Get on the bus and answer from then on.

        Raises:
            UnreachableError: there is no bus at the address.
            AlreadyRunningError: somebody has the name, or the bus policy keeps it from us.
        """
        self._link = await self._join()
        loop = asyncio.get_running_loop()

        def listen(notice: Notice) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody to tell
                loop.call_soon_threadsafe(self._offer, notice)

        self._unsubscribe = self._agent.subscribe(listen)
        self._spawn(self._stay())
        self._spawn(self._emit())

    async def close(self) -> None:
        """Leave the bus; calls under way are not answered any more. Safe to repeat."""
        self._unsubscribe()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
            self._link = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- being on the bus -------------------------------------------------------------------

    async def _join(self) -> Link:
        link = await Link.connect(self._address, self._on_message)
        try:
            await link.call_bus("AddMatch", "s", _LEAVERS)
            reply = await link.call_bus("RequestName", "su", BUS_NAME, NameFlag.DO_NOT_QUEUE.value)
        except BaseException:
            await link.close()
            raise
        if reply.message_type is MessageType.ERROR:
            await link.close()
            raise AlreadyRunningError(
                f"the bus does not let us own {BUS_NAME}: {reply.body[0]}",
                advice="install the bus policy with `virtfabric install`",
            )
        if reply.body[0] != RequestNameReply.PRIMARY_OWNER.value:
            await link.close()
            raise AlreadyRunningError(f"another agent has the name {BUS_NAME} on this bus")
        return link

    async def _stay(self) -> None:
        while True:
            assert self._link is not None
            await self._link.wait_closed()
            log.warning("the bus went away; trying to get back on it")
            self._callers.clear()
            self._link = await self._rejoin()
            log.info("back on the bus as %s", self._link.unique_name)

    async def _rejoin(self) -> Link:
        wait_s, longest_s = BACKOFF_S
        while True:
            try:
                return await self._join()
            except VirtfabricError as error:
                log.log(logging.DEBUG if wait_s < longest_s else logging.WARNING, "%s", error)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, longest_s)

    # -- calls ------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.METHOD_CALL:
            self._spawn(self._serve(message))
        elif message.sender == DBUS_NAME and message.member == "NameOwnerChanged":
            self._callers.forget(message.body[0])

    async def _serve(self, message: Message) -> None:
        link = self._link
        if link is None:
            return
        try:
            reply = await self._reply(link, message)
            if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
                await link.send(reply)
        except UnreachableError:
            log.debug("%s left before its answer", message.sender)

    async def _reply(self, link: Link, message: Message) -> Message:
        try:
            caller = await self._callers.find(link, str(message.sender))
            if caller.uid and self._running[caller.uid] >= CALLS_EACH:
                raise ProtocolError(
                    "LimitsExceeded", f"more than {CALLS_EACH} calls of one user at once"
                )
            with self._counted(caller.uid):
                signature, body = await self._dispatcher.answer(message, caller)
            return Message.new_method_return(message, signature, body)
        except VirtfabricError as error:
            return _error(message, wire_error(error))
        except Exception as error:  # the skin's one guard: logged, mapped, answered
            log.exception("a call broke")
            return _error(message, wire_error(error))

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Iterator[None]:
        self._running[uid] += 1
        try:
            yield
        finally:
            self._running[uid] -= 1
            if not self._running[uid]:
                del self._running[uid]

    # -- signals ----------------------------------------------------------------------------

    def _offer(self, notice: Notice) -> None:
        if self._link is None or self._link.closed:
            return  # nobody listens, and whoever comes back reads anew
        try:
            emissions = emissions_of(notice)
        except (KeyError, TypeError, ValueError):
            log.exception("a notice of kind %s is malformed", notice.kind)
            return
        for emission in emissions:
            self._outbox.put(emission)

    async def _emit(self) -> None:
        while True:
            emission = await self._outbox.take()
            if self._link is None or self._link.closed:
                continue
            try:
                await self._link.send(emission.message())
            except UnreachableError:
                continue
            except Exception:
                # one bad body must not silence the rest
                log.exception("a signal %s could not be sent", emission.member)


def _error(message: Message, error: WireError) -> Message:
    return Message(
        message_type=MessageType.ERROR,
        destination=message.sender,
        reply_serial=message.serial,
        error_name=error.name,
        signature=SIGNATURE,
        body=error.body,
    )
