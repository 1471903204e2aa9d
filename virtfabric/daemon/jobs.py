"""Jobs: long work with progress, an outcome, and a way to cancel it.

Runs each job in a worker thread; D-Bus and `watch` see them through notices. A job that another
job starts runs in that one's thread: a pool whose threads wait for each other stands still.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from virtfabric.daemon.api import JobState
from virtfabric.daemon.executor import Progress
from virtfabric.model.errors import (
    Reason,
    Refusal,
    RefusedError,
    StepCancelledError,
    VirtfabricError,
)
from virtfabric.model.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.notices import Notices

log = logging.getLogger(__name__)

KEPT: Final = 256
"""Ended jobs that can still be asked for."""
WORKERS: Final = 16
"""Plans that run side by side; more wait for a thread."""


def error_of(reason: str, detail: str, **more: Any) -> dict[str, Any]:
    """A job's error in the documented shape."""
    return {
        "reason": reason, "detail": detail, "would_fit": {}, "considered": [], "advice": "",
    } | more  # fmt: skip


def refusal_json(refusal: Refusal) -> dict[str, Any]:
    """A refusal in the documented shape."""
    return error_of(
        refusal.reason.value,
        refusal.detail,
        would_fit=dict(refusal.would_fit),
        considered=list(refusal.considered),
    )


@dataclass(slots=True)
class Job:
    """One piece of long work. Fields are replaced whole, so a reader sees no half state.

    Attributes:
        progress: how it goes; None while it waits for a thread.
    """

    id: JobId
    title: str
    uid: int
    state: JobState = JobState.RUNNING
    fraction: float = 0.0
    text: str = ""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    progress: Progress | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def to_json(self) -> dict[str, Any]:
        """As documented in docs/dbus-api.md."""
        return {
            "id": self.id, "title": self.title, "state": self.state.value,
            "fraction": round(self.fraction, 3), "text": self.text, "result": self.result,
            "error": self.error,
        }  # fmt: skip


class Jobs:
    """All jobs of this run of the agent."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._lock = threading.Lock()
        self._jobs: OrderedDict[JobId, Job] = OrderedDict()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="plan")
        self._closing = False
        self._within = threading.local()

    def start(
        self, title: str, work: Callable[[Job, Progress], dict[str, Any]], *, uid: int = 0
    ) -> Job:
        """Run `work` in a thread; it returns the job's result, or raises.

        Called from a job, it returns when the new one has ended.

        Raises:
            RefusedError: the agent is shutting down.
        """
        job = Job(JobId(uuid.uuid4().hex[:12]), title, uid)
        with self._lock:
            if self._closing:
                raise RefusedError(Refusal(Reason.SHUTTING_DOWN, "the agent is shutting down"))
            self._jobs[job.id] = job
            for old in [i for i, j in self._jobs.items() if j.ended.is_set()][:-KEPT]:
                del self._jobs[old]
            nested = getattr(self._within, "job", False)
            if not nested:
                self._pool.submit(self._run_first, job, work)
        if nested:
            self._run(job, work)
        return job

    def _run_first(self, job: Job, work: Callable[[Job, Progress], dict[str, Any]]) -> None:
        self._within.job = True
        self._run(job, work)

    def _run(self, job: Job, work: Callable[[Job, Progress], dict[str, Any]]) -> None:
        def report(fraction: float, text: str) -> None:
            job.fraction, job.text = max(job.fraction, fraction), text
            self._notices.publish(
                "job.progress", {"job": job.id, "fraction": round(job.fraction, 3), "text": text}
            )

        try:
            job.progress = Progress(report, job.cancelled)
            job.result = work(job, job.progress)
            state = JobState.DONE
        except StepCancelledError as error:
            state = JobState.CANCELLED
            job.error = error_of(Reason.CANCELLED.value, f"{error}; nothing changed")
        except RefusedError as error:
            state = JobState.REFUSED
            job.error = refusal_json(error.refusal)
        except VirtfabricError as error:
            state = JobState.FAILED
            job.error = error_of("failed", str(error), advice=error.advice)
        except Exception:
            # the last line of defence of a thread: a defect of ours must still end the job
            log.exception("job %s (%s) broke", job.id, job.title)
            state = JobState.FAILED
            job.error = error_of("internal", "internal error; see the agent's log")
        job.fraction = 1.0 if state is JobState.DONE else job.fraction
        job.state = state
        job.ended.set()
        self._notices.publish("job.done", job.to_json() | {"job": job.id})

    def get(self, job: JobId) -> Job:
        """A running or recent job.

        Raises:
            RefusedError: unknown or forgotten.
        """
        with self._lock:
            found = self._jobs.get(job)
        if found is None:
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"there is no job {job!r}"))
        return found

    def all(self) -> list[Job]:
        """Running and recent jobs, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def close(self) -> None:
        """Cancel what runs, wait for its undo, refuse anything new."""
        with self._lock:
            self._closing = True
            running = [j for j in self._jobs.values() if not j.ended.is_set()]
        for job in running:
            job.cancelled.set()
        self._pool.shutdown(wait=True)
