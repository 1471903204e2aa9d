"""How commands talk to the agent: one call, or a job seen through to its end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import ProgressLine, note
from virtfabric.dbus.client import AgentClient
from virtfabric.dbus.errors import refusal_of
from virtfabric.model.errors import InvalidValueError, Reason, RefusedError, UnreachableError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

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
    with AgentClient.connected(args.bus) as client:
        return client.call(method, *values)


def run_job(args: argparse.Namespace, method: str, *values: Any) -> Json:
    """Call a method that starts a job, and see the job through.

    Raises:
        RefusedError, VirtfabricError: the job was refused, failed or was cancelled.
        UnreachableError
    """
    return _see_through(args, lambda client: str(client.call(method, *values)))


def await_job(args: argparse.Namespace, job: str) -> Json:
    """See a job through that runs already; raises as `run_job`."""
    return _see_through(args, lambda _client: job)


def _see_through(args: argparse.Namespace, begin: Callable[[AgentClient], str]) -> Json:
    show = ProgressLine(quiet=args.json)
    try:
        with AgentClient.connected(args.bus) as client, Interrupt() as interrupt:
            job = _follow(client, begin(client), show, interrupt)
    finally:
        show.end()
    if job["state"] != "done":
        raise refusal_of(job["error"] or {"reason": "failed", "detail": "it failed"})
    return job


class Interrupt:
    """Ctrl-C (or SIGTERM) wakes who waits for it; a second one ends the command at once."""

    def __init__(self) -> None:
        self.awake = False
        self._heard, self._say = os.pipe()
        os.set_blocking(self._say, False)
        self._before: dict[int, Any] = {}
        self._told_before = -1

    def __enter__(self) -> Interrupt:
        # written to at once, in C: a signal just before a wait begins ends that wait too
        self._told_before = signal.set_wakeup_fd(self._say)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._wake)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._let_go()
        signal.set_wakeup_fd(self._told_before)
        for end in (self._heard, self._say):
            os.close(end)

    def fileno(self) -> int:
        """Readable once it is awake."""
        return self._heard

    def _wake(self, *_signal: object) -> None:
        self._let_go()
        self.awake = True

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _follow(client: AgentClient, job: str, show: ProgressLine, interrupt: Interrupt) -> Json:
    facts = client.follow(job, show, interrupt)
    if facts["state"] != "running":
        return facts
    show.end()
    note("cancelling; waiting for the undo (Ctrl-C again to leave it to the agent)")
    client.cancel(job)
    return client.follow(job, show)
