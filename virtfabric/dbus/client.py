"""The other end: a client of the API, for the command and for tests.

Calls have timeouts, jobs are followed by signals and by asking (signals may be lost, the agent
may vanish), and an agent that does not answer is one clear error with advice.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

from virtfabric.dbus.errors import error_from_wire
from virtfabric.dbus.link import CONNECT_TIMEOUT_S, Link
from virtfabric.dbus.names import (
    BUS_NAME,
    DBUS_NAME,
    JOB,
    JOB_INTERFACE,
    MANAGER,
    MANAGER_INTERFACE,
    PROPERTIES,
    ROOT,
    job_of_path,
    job_path,
)
from virtfabric.model.errors import InvalidValueError, UnreachableError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Json = dict[str, Any]
    Show = Callable[[float, str], None]

T = TypeVar("T")

CALL_TIMEOUT_S: Final = 25.0
ASK_EVERY_S: Final = 2.0
"""How often a followed job is asked for, should its signals not come."""
ADVICE: Final = "start it with virtfabricd or see virtfabric doctor"
_SIGNALS: Final = f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT}'"
_OWNER: Final = (
    f"type='signal',sender='{DBUS_NAME}',interface='{DBUS_NAME}',"
    f"member='NameOwnerChanged',arg0='{BUS_NAME}'"
)


@dataclass(frozen=True, slots=True)
class Heard:
    """A signal of the agent."""

    path: str
    interface: str
    member: str
    body: tuple[Any, ...]


class AgentClient:
    """A connection to the agent. Use from one event loop."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._link: Link | None = None
        self._owner = ""
        self._listeners: list[asyncio.Queue[Heard | None]] = []

    @classmethod
    @asynccontextmanager
    async def connected(
        cls, address: str | None, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> AsyncIterator[AgentClient]:
        """A client for the length of a block; `address` None is the system bus.

        Raises:
            UnreachableError: no bus, or no agent on it.
        """
        client = cls(address)
        try:
            await client._connect(timeout_s)
            yield client
        finally:
            if client._link is not None:
                await client._link.close()

    def _gone(self, why: str) -> UnreachableError:
        where = self._address or "system bus"
        return UnreachableError(
            f"the agent does not answer on the bus ({where}: {why})", advice=ADVICE
        )

    async def _connect(self, timeout_s: float) -> None:
        try:
            self._link = await Link.connect(self._address, self._hear, timeout_s=timeout_s)
            for rule in (_SIGNALS, _OWNER):
                await self._link.call_bus("AddMatch", "s", rule)
            reply = await self._link.call_bus("GetNameOwner", "s", BUS_NAME)
        except UnreachableError as error:
            raise self._gone(str(error)) from error
        if reply.message_type is MessageType.ERROR:
            raise self._gone(f"nobody has the name {BUS_NAME}")
        self._owner = reply.body[0]

    # -- calls ------------------------------------------------------------------------------

    async def _call(
        self, path: str, interface: str, member: str, signature: str, body: list[Any]
    ) -> list[Any]:
        if self._link is None:
            raise self._gone("not connected")
        message = Message(
            destination=BUS_NAME, path=path, interface=interface, member=member,
            signature=signature, body=body, flags=MessageFlag.NO_AUTOSTART,
        )  # fmt: skip
        try:
            reply = await self._link.call(message, timeout_s=CALL_TIMEOUT_S)
        except UnreachableError as error:
            raise self._gone(str(error)) from error
        if reply.message_type is MessageType.ERROR:
            problem = error_from_wire(reply.error_name, reply.body)
            raise self._gone(str(problem)) if isinstance(problem, UnreachableError) else problem
        return list(reply.body)

    async def call(self, member: str, *args: Any) -> Any:
        """Call the manager; the answer is decoded JSON, or a job's id.

        Raises:
            RefusedError, VirtfabricError: what the agent answered.
            UnreachableError: no answer.
        """
        method = MANAGER_INTERFACE.method(member)
        if method is None:
            raise InvalidValueError("method", member, "is not in the API")
        body = await self._call(ROOT, MANAGER, member, method.in_signature, list(args))
        if method.out_signature == "o":
            return job_of_path(body[0])
        return json.loads(body[0])

    async def cancel(self, job: str) -> None:
        """Have a job give up and undo; answers at once.

        Raises:
            RefusedError, UnreachableError
        """
        await self._call(job_path(job), JOB, "Cancel", "", [])

    async def job(self, job: str) -> Json:
        """A job as `ListJobs` shows it.

        Raises:
            RefusedError: unknown or forgotten.
            UnreachableError
        """
        [values] = await self._call(job_path(job), PROPERTIES, "GetAll", "s", [JOB])
        facts = {name: variant.value for name, variant in values.items()}
        missing = {p.name for p in JOB_INTERFACE.properties} - set(facts)
        if missing:
            raise VirtfabricError(f"job {job} lacks {', '.join(sorted(missing))}")
        return {
            "id": job, "title": facts["Title"], "state": facts["State"],
            "fraction": facts["Fraction"], "text": facts["Text"],
            "result": json.loads(facts["Result"]), "error": json.loads(facts["Error"]),
        }  # fmt: skip

    # -- signals ----------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.sender == DBUS_NAME and message.member == "NameOwnerChanged":
            if message.body[0] == BUS_NAME and message.body[1] == self._owner:
                self._tell(None)
        elif message.sender == self._owner:  # anybody may send us a signal: only the agent counts
            self._tell(Heard(message.path, message.interface, message.member, tuple(message.body)))

    def _tell(self, heard: Heard | None) -> None:
        for listener in self._listeners:
            listener.put_nowait(heard)

    async def _next(
        self, queue: asyncio.Queue[Heard | None], timeout_s: float | None
    ) -> Heard | None:
        """The next signal; None when none came in time."""
        assert self._link is not None
        hearing = asyncio.ensure_future(queue.get())
        ending = asyncio.ensure_future(self._link.wait_closed())
        try:
            await asyncio.wait(
                {hearing, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if hearing.done():
                heard = hearing.result()
                if heard is None:
                    raise self._gone("it has left the bus")
                return heard
            if ending.done():
                raise self._gone("the bus has ended the connection")
            return None
        finally:
            hearing.cancel()
            ending.cancel()

    async def signals(self) -> AsyncIterator[Heard]:
        """Everything the agent emits, until it leaves.

        Raises:
            UnreachableError: the agent or the bus went away.
        """
        queue: asyncio.Queue[Heard | None] = asyncio.Queue()
        self._listeners.append(queue)
        try:
            while True:
                heard = await self._next(queue, None)
                if heard is not None:
                    yield heard
        finally:
            self._listeners.remove(queue)

    async def follow(self, job: str, show: Show) -> Json:
        """Wait for a job's end.

        Args:
            job: its id.
            show: told of fraction and text as they come.

        Returns:
            The job as `ListJobs` shows it, ended.

        Raises:
            UnreachableError: the agent went away; its journal has the job.
        """
        path = job_path(job)
        queue: asyncio.Queue[Heard | None] = asyncio.Queue()
        self._listeners.append(queue)
        try:
            while True:
                facts = await self.job(job)
                if facts["state"] != "running":
                    return facts
                show(facts["fraction"], facts["text"])
                await self._until_news(path, queue, show)
        finally:
            self._listeners.remove(queue)

    async def _until_news(self, path: str, queue: asyncio.Queue[Heard | None], show: Show) -> None:
        """Show progress until the job says that it is done, or says nothing for a while."""
        while True:
            heard = await self._next(queue, ASK_EVERY_S)
            if heard is None:
                return
            if heard.path != path:
                continue
            if heard.member == "Done":
                return
            if heard.member == "Progress":
                show(*heard.body)


def with_agent(address: str | None, work: Callable[[AgentClient], Awaitable[T]]) -> T:
    """Run `work` with a connected client, for callers that are not asynchronous.

    Raises:
        UnreachableError: no bus, or no agent on it.
    """

    async def run() -> T:
        async with AgentClient.connected(address) as client:
            return await work(client)

    return asyncio.run(run())
