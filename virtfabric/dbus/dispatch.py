"""Method calls of the API: parse, call the agent in a worker thread, format.

dbus-next's service classes are not used: they hide the sender from the method and send the
traceback of an uncaught exception to the caller. The tables in `names` take their place.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dbus_next.signature import Variant

from virtfabric.dbus.errors import ProtocolError
from virtfabric.dbus.introspect import child_of, interfaces_at, introspection_xml
from virtfabric.dbus.names import JOB, JOBS, MANAGER, ROOT, job_of_path, job_path
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from dbus_next.message import Message

    from virtfabric.daemon.api import AgentApi, Caller
    from virtfabric.dbus.names import Interface, Method
    from virtfabric.model.ids import JobId

_MACHINE_ID: Final = Path("/etc/machine-id")


def _since(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise InvalidValueError("since", value, "is not a time", advice="UNIX seconds, 0 for all")
    return value


CALLS: Final[dict[str, Callable[..., Any]]] = {
    "GetStatus": lambda agent, who: agent.status(who),
    "GetHost": lambda agent, who: agent.host(who),
    "ListGuests": lambda agent, who: agent.guests(who),
    "ListGrants": lambda agent, who: agent.grants(who),
    "ListLoans": lambda agent, who: agent.loans(who),
    "ListDevices": lambda agent, who: agent.devices(who),
    "ReleaseDevice": lambda agent, who, address: agent.device_release(who, address),
    "ListCards": lambda agent, who: agent.cards(who),
    "ShowCard": lambda agent, who, serial: agent.card(who, serial),
    "TrustCard": lambda agent, who, serial: agent.card_trust(who, serial),
    "ListSlices": lambda agent, who: agent.slices(who),
    "CreateSlices": lambda agent, who, text, opts: agent.slices_create(who, text, opts),
    "PlanSlices": lambda agent, who, text, opts: agent.slices_plan(who, text, opts),
    "DestroySlice": lambda agent, who, name: agent.slice_destroy(who, name),
    "PlanSliceEnd": lambda agent, who, name: agent.slice_plan_end(who, name),
    "ProgramSlice": lambda agent, who, name, image: agent.slice_program(who, name, image),
    "GetMemory": lambda agent, who: agent.memory(who),
    "ShowPolicy": lambda agent, who, guest: agent.policy_show(who, guest),
    "SetPolicy": lambda agent, who, guest, changes: agent.policy_set(who, guest, changes),
    "PlanPolicy": lambda agent, who, guest, changes: agent.policy_plan(who, guest, changes),
    "ClearPolicy": lambda agent, who, guest: agent.policy_clear(who, guest),
    "ListPorts": lambda agent, who, guest: agent.ports(who, guest),
    "AddPorts": lambda agent, who, guest, count: agent.ports_add(who, guest, count),
    "Allocate": lambda agent, who, guest, wants: agent.allocate(who, guest, wants),
    "Plan": lambda agent, who, guest, wants: agent.plan(who, guest, wants),
    "Release": lambda agent, who, grant: agent.release(who, grant),
    "Explain": lambda agent, who, subject: agent.explain(who, subject),
    "ReleaseMemory": lambda agent, who, subject: agent.memory_release(who, subject),
    "CreateRegion": lambda agent, who, wants: agent.region_create(who, wants),
    "PlanRegion": lambda agent, who, wants: agent.region_plan(who, wants),
    "DestroyRegion": lambda agent, who, region: agent.region_destroy(who, region),
    "PlanRegionEnd": lambda agent, who, region: agent.region_plan_end(who, region),
    "ReclaimMemory": lambda agent, who, wants: agent.reclaim(who, wants),
    "PlanReclaim": lambda agent, who, wants: agent.reclaim_plan(who, wants),
    "Audit": lambda agent, who, since, subject: agent.audit(who, _since(since), subject),
    "VerifyAudit": lambda agent, who, head: agent.audit_verify(who, head),
    "Drift": lambda agent, who: agent.drift(who),
    "RepairDrift": lambda agent, who: agent.drift_repair(who),
    "ListJobs": lambda agent, who: agent.jobs(who),
    "Health": lambda agent, who: agent.health(who),
}
"""The call on the facade behind each method of the manager."""


def manager_properties(agent: AgentApi, who: Caller) -> dict[str, Any]:
    """Values of the manager's properties."""
    health = agent.health(who)
    return {
        "Version": str(health["version"]),
        "Generation": int(health["generation"]),
        "Connected": bool(health["libvirt"]["connected"]),
    }


def job_properties(agent: AgentApi, who: Caller, job: JobId) -> dict[str, Any]:
    """Values of a job's properties."""
    facts = agent.job(who, job)
    return {
        "Title": str(facts.get("title", "")),
        "State": str(facts["state"]),
        "Fraction": float(facts["fraction"]),
        "Text": str(facts["text"]),
        "Result": json.dumps(facts["result"]),
        "Error": json.dumps(facts["error"]),
    }


class Dispatcher:
    """Answers one call at a time; many may run side by side. Holds no state of its own."""

    def __init__(self, agent: AgentApi, pool: Executor) -> None:
        self._agent = agent
        self._pool = pool

    async def answer(self, message: Message, caller: Caller) -> tuple[str, list[Any]]:
        """Signature and body of the reply.

        Args:
            message: the call.
            caller: who calls, as the bus vouches.

        Raises:
            ProtocolError: the call does not fit the API.
            Exception: whatever the agent raised; `errors.wire_error` maps it.
        """
        interface, method = _find(message)
        if message.signature != method.in_signature:
            takes = ", ".join(f"{a.signature} {a.name}" for a in method.takes) or "nothing"
            raise ProtocolError(
                "InvalidArgs",
                f"{method.name} takes ({takes}), signature {method.in_signature!r}; "
                f"the call has {message.signature!r}",
            )
        if interface.name == MANAGER:
            return await self._manage(method, message, caller)
        if interface.name == JOB:
            job = job_of_path(message.path)
            await self._run(self._agent.job_cancel, caller, job)
            return "", []
        return await self._standard(method, message, caller)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def _manage(
        self, method: Method, message: Message, caller: Caller
    ) -> tuple[str, list[Any]]:
        answer = await self._run(CALLS[method.name], self._agent, caller, *message.body)
        if method.out_signature == "o":
            return "o", [job_path(answer["job"])]
        return "s", [json.dumps(answer)]

    async def _standard(
        self, method: Method, message: Message, caller: Caller
    ) -> tuple[str, list[Any]]:
        match method.name:
            case "Ping":
                return "", []
            case "GetMachineId":
                return "s", [(await self._run(_MACHINE_ID.read_text)).strip()]
            case "Introspect":
                return "s", [await self._introspect(message.path, caller)]
            case "Set":
                raise ProtocolError("PropertyReadOnly", "the properties are read-only")
            case _:
                return await self._get(message, caller)

    async def _introspect(self, path: str, caller: Caller) -> str:
        children: list[str] = []
        if path == ROOT:
            children = [JOBS.rpartition("/")[2]]
        elif path == JOBS:
            children = [j["id"] for j in await self._run(self._agent.jobs, caller)]
        elif job_of_path(path) is None:
            children = [child_of(path)]
        return introspection_xml(interfaces_at(path) or (), children)

    async def _get(self, message: Message, caller: Caller) -> tuple[str, list[Any]]:
        wanted = message.body[0]
        interface = _interface(message.path, wanted)
        names = {p.name: p.signature for p in interface.properties}
        if message.member == "Get":
            name = message.body[1]
            if name not in names:
                raise ProtocolError("UnknownProperty", f"{wanted} has no property {name!r}")
            names = {name: names[name]}
        values: dict[str, Any] = {}
        if names:
            values = await self._read(message.path, caller)
        found = {n: Variant(signature, values[n]) for n, signature in names.items()}
        if message.member == "Get":
            return "v", list(found.values())
        return "a{sv}", [found]

    async def _read(self, path: str, caller: Caller) -> dict[str, Any]:
        job = job_of_path(path)
        values: dict[str, Any]
        if job is None:
            values = await self._run(manager_properties, self._agent, caller)
        else:
            values = await self._run(job_properties, self._agent, caller, job)
        return values


def _interfaces(path: str) -> tuple[Interface, ...]:
    interfaces = interfaces_at(path)
    if interfaces is None:
        raise ProtocolError("UnknownObject", f"there is no object {path}")
    return interfaces


def _interface(path: str, name: str) -> Interface:
    for interface in _interfaces(path):
        if interface.name == name:
            return interface
    raise ProtocolError("UnknownInterface", f"{path} has no interface {name!r}")


def _find(message: Message) -> tuple[Interface, Method]:
    """The method that a call means; the interface may be left out."""
    if message.interface:
        candidates: tuple[Interface, ...] = (_interface(message.path, message.interface),)
    else:
        candidates = _interfaces(message.path)
    for interface in candidates:
        method = interface.method(message.member)
        if method is not None:
            return interface, method
    raise ProtocolError("UnknownMethod", f"{message.path} has no method {message.member!r}")
