"""How commands talk to the agent: one call, or a job seen through to its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import ProgressLine, note
from virtfabric.dbus.client import AgentClient, with_agent
from virtfabric.dbus.errors import refusal_of
from virtfabric.model.errors import InvalidValueError, Reason, RefusedError, UnreachableError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

    Json = dict[str, Any]

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
UNREACHABLE: Final = 4


def exit_code(error: BaseException) -> int:
    """The documented exit code of an error."""
    match error:
        case UnreachableError():
            return UNREACHABLE
        case InvalidValueError():
            return USAGE
        case RefusedError(refusal=no) if no.reason is Reason.INVALID_ARGUMENT:
            return USAGE
        case RefusedError(refusal=no) if no.reason is Reason.CANCELLED:
            return FAILED
        case RefusedError():
            return REFUSED
        case _:
            return FAILED


def ask(args: argparse.Namespace, method: str, *values: Any) -> Any:
    """Call one method of the agent.

    Raises:
        RefusedError, VirtfabricError, UnreachableError
    """

    async def work(client: AgentClient) -> Any:
        return await client.call(method, *values)

    return with_agent(args.bus, work)


def run_job(args: argparse.Namespace, method: str, *values: Any) -> Json:
    """Call a method that starts a job, and see the job through.

    Raises:
        RefusedError, VirtfabricError: the job was refused, failed or was cancelled.
        UnreachableError
    """

    async def begin(client: AgentClient) -> str:
        return str(await client.call(method, *values))

    return _see_through(args, begin)


def await_job(args: argparse.Namespace, job: str) -> Json:
    """See a job through that runs already; raises as `run_job`."""

    async def begin(_client: AgentClient) -> str:
        return job

    return _see_through(args, begin)


def _see_through(args: argparse.Namespace, begin: Callable[[AgentClient], Awaitable[str]]) -> Json:
    show = ProgressLine(quiet=args.json)

    async def work(client: AgentClient) -> Json:
        with _Interrupt() as interrupt:
            job = await begin(client)
            return await _follow(client, job, show, interrupt)

    try:
        job = with_agent(args.bus, work)
    finally:
        show.end()
    if job["state"] != "done":
        raise refusal_of(job["error"] or {"reason": "failed", "detail": "it failed"})
    return job


class _Interrupt:
    """Ctrl-C (or SIGTERM) sets `asked` once; a second one ends the command at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def __enter__(self) -> _Interrupt:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._let_go()

    def _ask(self) -> None:
        self.asked.set()
        self._let_go()

    def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _follow(client: AgentClient, job: str, show: ProgressLine, interrupt: _Interrupt) -> Json:
    following = asyncio.create_task(client.follow(job, show))
    asking = asyncio.create_task(interrupt.asked.wait())
    try:
        await asyncio.wait({following, asking}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            show.end()
            note("cancelling; waiting for the undo (Ctrl-C again to leave it to the agent)")
            await client.cancel(job)
        return await following
    finally:
        for task in (following, asking):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
