"""Notices become signals, paced: a queue that one task empties, a message at a time.

A newer progress of a job replaces the one still waiting; beyond `LIMIT` waiting notices the
surplus is counted and one `notices.lost` tells how many.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dbus_next.message import Message
from dbus_next.signature import Variant

from virtfabric.dbus.names import (
    JOB,
    JOB_INTERFACE,
    MANAGER,
    MANAGER_INTERFACE,
    PROPERTIES,
    PROPERTIES_INTERFACE,
    ROOT,
    job_path,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from virtfabric.daemon.api import Notice

LIMIT: Final = 5_000
_BODY_SIGNALS: Final = {
    "grant.made": "GrantMade",
    "grant.ended": "GrantEnded",
    "drift.found": "DriftFound",
}
_MOVES_GENERATION: Final = ("grant.", "guest.", "drift.repaired", "job.done")


@dataclass(frozen=True, slots=True)
class Emission:
    """One signal to send. While it waits, a later one with the same `key` replaces its body."""

    path: str
    interface: str
    member: str
    signature: str
    body: tuple[Any, ...]
    key: Hashable = None

    def message(self) -> Message:
        """For the bus."""
        return Message.new_signal(
            self.path, self.interface, self.member, self.signature, list(self.body)
        )


def _manager(member: str, *body: Any) -> Emission:
    signature = MANAGER_INTERFACE.signal(member).signature
    return Emission(ROOT, MANAGER, member, signature, body)


def _job(job: str, member: str, *body: Any, key: Hashable = None) -> Emission:
    signature = JOB_INTERFACE.signal(member).signature
    return Emission(job_path(job), JOB, member, signature, body, key)


def _changed(values: Mapping[str, Any], invalid: tuple[str, ...], key: Hashable) -> Emission:
    signature = PROPERTIES_INTERFACE.signal("PropertiesChanged").signature
    body = (MANAGER, dict(values), list(invalid))
    return Emission(ROOT, PROPERTIES, "PropertiesChanged", signature, body, key)


def outcome_json(job: Mapping[str, Any]) -> str:
    """What `Done` carries: the result of a job that is done, the error of any other."""
    return json.dumps(job.get("result") if job.get("state") == "done" else job.get("error"))


def emissions_of(notice: Notice) -> list[Emission]:
    """The signals that one notice becomes."""
    kind, body = notice.kind, notice.body
    if kind == "job.progress":
        job = str(body["job"])
        progress = (float(body["fraction"]), str(body["text"]))
        return [_job(job, "Progress", *progress, key=("progress", job))]
    text = json.dumps({"at": notice.at, **body}, default=str)
    found = [_manager("Notice", kind, text)]
    if kind == "job.done":
        job, state = str(body["job"]), str(body["state"])
        found.append(_job(job, "Done", state, outcome_json(body)))
        found.append(_manager("JobDone", job_path(job), state))
    elif kind in _BODY_SIGNALS:
        found.append(_manager(_BODY_SIGNALS[kind], text))
    elif kind == "alert":
        found.append(_manager("Alert", str(body.get("text", ""))))
    elif kind in ("agent.connected", "agent.disconnected"):
        connected = Variant("b", kind == "agent.connected")
        found.append(_changed({"Connected": connected}, (), "connected"))
    if kind.startswith(_MOVES_GENERATION):
        found.append(_changed({}, ("Generation",), "generation"))
    return found


class Outbox:
    """What waits to be emitted. Use from one event loop only."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Hashable, Emission] = OrderedDict()
        self._count = 0
        self._lost = 0
        self._filled = asyncio.Event()

    def put(self, emission: Emission) -> None:
        """Queue a signal."""
        key = emission.key
        if key is None:
            self._count += 1
            key = self._count
        if key not in self._waiting and len(self._waiting) >= self._limit:
            self._lost += 1
            return
        self._waiting[key] = emission
        self._filled.set()

    async def take(self) -> Emission:
        """The next signal; waits for one."""
        await self._filled.wait()
        if not self._waiting:
            lost, self._lost = self._lost, 0
            self._filled.clear()
            return _manager("Notice", "notices.lost", json.dumps({"count": lost}))
        _, emission = self._waiting.popitem(last=False)
        if not self._waiting and not self._lost:
            self._filled.clear()
        return emission
