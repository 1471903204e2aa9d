"""The other end: a client of the API, for the command and for tests.

Calls have timeouts, jobs are followed by signals and by asking (signals may be lost, the agent
may vanish), and an agent that does not answer is one clear error with advice.

It blocks, and it is made of jeepney where the agent has dbus-next: `virtfabric allocate` is to give
a running guest a function about as quickly as `virsh attach-device`, and asyncio with dbus-next
takes longer to load than all the rest of the command takes to run.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from jeepney import HeaderFields

from virtfabric.dbus.channel import CONNECT_TIMEOUT_S, Channel, call_of, error_of
from virtfabric.dbus.errors import error_from_wire
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
    from collections.abc import Callable, Iterator

    from jeepney import Message

    from virtfabric.dbus.channel import Waker

    Json = dict[str, Any]
    Show = Callable[[float, str], None]

ASK_EVERY_S: Final = 2.0
"""How often a followed job is asked for, should its signals not come."""
ADVICE: Final = "start it with virtfabricd or see virtfabric doctor"
_SIGNALS: Final = f"type='signal',sender='{BUS_NAME}'"
_OWNER: Final = (
    f"type='signal',sender='{DBUS_NAME}',interface='{DBUS_NAME}',"
    f"member='NameOwnerChanged',arg0='{BUS_NAME}'"
)


class Heard(NamedTuple):
    """A signal of the agent."""

    path: str
    interface: str
    member: str
    body: tuple[Any, ...]


class AgentClient:
    """A connection to the agent. Not for several threads."""

    def __init__(self, address: str | None, channel: Channel) -> None:
        """Take over a connection to the bus at `address`."""
        self._address = address
        self._channel = channel
        self._owner = ""

    @classmethod
    @contextmanager
    def connected(
        cls, address: str | None, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Iterator[AgentClient]:
        """A client for the length of a block; `address` None is the system bus.

        Raises:
            UnreachableError: no bus, or no agent on it.
        """
        try:
            channel = Channel.connect(address, timeout_s=timeout_s)
        except UnreachableError as error:
            raise _gone(address, str(error)) from error
        try:
            client = cls(address, channel)
            client._find_agent()
            yield client
        finally:
            channel.close()

    def _find_agent(self) -> None:
        reply = self._ask_bus("GetNameOwner", BUS_NAME)
        if error_of(reply):
            raise _gone(self._address, f"nobody has the name {BUS_NAME}")
        self._owner = reply.body[0]

    def _ask_bus(self, member: str, text: str) -> Message:
        try:
            return self._channel.call_bus(member, "s", text)
        except UnreachableError as error:
            raise _gone(self._address, str(error)) from error

    # -- calls ------------------------------------------------------------------------------

    def _call(
        self, path: str, interface: str, member: str, signature: str, body: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        message = call_of(BUS_NAME, path, interface, member, signature, body)
        try:
            reply = self._channel.call(message)
        except UnreachableError as error:
            raise _gone(self._address, str(error)) from error
        name = error_of(reply)
        if name is not None:
            problem = error_from_wire(name, list(reply.body))
            if isinstance(problem, UnreachableError):
                raise _gone(self._address, str(problem))
            raise problem
        return tuple(reply.body)

    def call(self, member: str, *args: Any) -> Any:
        """Call the manager; the answer is decoded JSON, or a job's id.

        Raises:
            RefusedError, VirtfabricError: what the agent answered.
            UnreachableError: no answer.
        """
        method = MANAGER_INTERFACE.method(member)
        if method is None:
            raise InvalidValueError("method", member, "is not in the API")
        body = self._call(ROOT, MANAGER, member, method.in_signature, args)
        if method.out_signature == "o":
            return job_of_path(body[0])
        return json.loads(body[0])

    def cancel(self, job: str) -> None:
        """Have a job give up and undo; answers at once.

        Raises:
            RefusedError, UnreachableError
        """
        self._call(job_path(job), JOB, "Cancel", "", ())

    def job(self, job: str) -> Json:
        """A job as `ListJobs` shows it.

        Raises:
            RefusedError: unknown or forgotten.
            UnreachableError
        """
        [values] = self._call(job_path(job), PROPERTIES, "GetAll", "s", (JOB,))
        facts = {name: value for name, (_signature, value) in values.items()}
        missing = {p.name for p in JOB_INTERFACE.properties} - set(facts)
        if missing:
            raise VirtfabricError(f"job {job} lacks {', '.join(sorted(missing))}")
        return {
            "id": job, "title": facts["Title"], "state": facts["State"],
            "fraction": facts["Fraction"], "text": facts["Text"],
            "result": json.loads(facts["Result"]), "error": json.loads(facts["Error"]),
        }  # fmt: skip

    # -- signals ----------------------------------------------------------------------------

    def _subscribe(self, which: str) -> None:
        for rule in (_OWNER, f"{_SIGNALS},{which}"):
            self._ask_bus("AddMatch", rule)

    def _hear(self, *, timeout_s: float | None = None, waker: Waker | None = None) -> Heard | None:
        """The next signal of the agent; None when none came in time, or the waker awoke."""
        while True:
            try:
                message = self._channel.hear(timeout_s=timeout_s, waker=waker)
            except UnreachableError as error:
                raise _gone(self._address, str(error)) from error
            if message is None:
                return None
            said = message.header.fields
            sender, member = said[HeaderFields.sender], said[HeaderFields.member]
            if sender == DBUS_NAME and member == "NameOwnerChanged":
                if message.body[:2] == (BUS_NAME, self._owner):
                    raise _gone(self._address, "it has left the bus")
            elif sender == self._owner:  # anybody may send us a signal: only the agent counts
                path, interface = said[HeaderFields.path], said[HeaderFields.interface]
                return Heard(path, interface, member, message.body)

    def signals(self) -> Iterator[Heard]:
        """Everything that the agent emits from now on, until it leaves.

        Raises:
            UnreachableError: the agent or the bus went away.
        """
        self._subscribe(f"path_namespace='{ROOT}'")
        self._find_agent()  # another may have come before we were told of it
        return self._heard()

    def _heard(self) -> Iterator[Heard]:
        while True:
            heard = self._hear()
            if heard is not None:
                yield heard

    def follow(self, job: str, show: Show, waker: Waker | None = None) -> Json:
        """Wait for a job's end.

        Args:
            job: its id.
            show: told of fraction and text as they come.
            waker: ends the waiting when it awakes.

        Returns:
            The job as `ListJobs` shows it: ended, or running still where the waker awoke.

        Raises:
            UnreachableError: the agent went away; its journal has the job.
        """
        self._subscribe(f"path='{job_path(job)}'")
        while True:
            facts = self.job(job)
            if facts["state"] != "running" or (waker is not None and waker.awake):
                return facts
            show(facts["fraction"], facts["text"])
            self._show_until_news(job_path(job), show, waker)

    def _show_until_news(self, path: str, show: Show, waker: Waker | None) -> None:
        """Show progress until the job says that it is done, or says nothing for a while."""
        while True:
            heard = self._hear(timeout_s=ASK_EVERY_S, waker=waker)
            if heard is None:
                return
            if heard.path != path:
                continue
            if heard.member == "Done":
                return
            if heard.member == "Progress":
                show(*heard.body)


def _gone(address: str | None, why: str) -> UnreachableError:
    where = address or "system bus"
    return UnreachableError(f"the agent does not answer on the bus ({where}: {why})", advice=ADVICE)
