"""The facade's contract: what every edge (D-Bus, hooks, card, fabric) may ask of the agent.

Skins code against `AgentApi`. All calls are synchronous, thread-safe, and authorise their
`caller`; results are JSON-ready dictionaries whose keys are documented in docs/dbus-api.md.
All raise RefusedError (a "no") or a VirtfabricError; reads never wait for a running plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.model.ids import JobId
    from virtfabric.model.request import Principal

    Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is on the other end of an edge, from the kernel (SO_PEERCRED) or the bus.

    Attributes:
        bus_name: unique name on the bus, for polkit; empty for other edges.
    """

    principal: Principal
    uid: int
    gids: frozenset[int]
    pid: int = 0
    bus_name: str = ""


class JobState(StrEnum):
    """Life of a job."""

    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something for subscribers (D-Bus signals, `watch`): `kind` dotted, body JSON-ready.

    Kinds: `job.progress` {job, fraction, text}, `job.done` {job, state, result},
    `guest.started|stopped|placed|changed`, `grant.made|ended`, `drift.found|repaired`,
    `device.lost|quarantined|freed`, `memory.changed` {came, went},
    `memory.quarantined|released` {subject, fault, why},
    `host.changed` {nodes, withheld},
    `card.connected|lost|distrusted|restarted|refused|event` {card, detail},
    `slice.lost|remade` {key, card, slice, ...},
    `alert` {text}, `agent.connected|disconnected`.
    """

    kind: str
    at: float
    body: Mapping[str, Any]


class AgentApi(Protocol):
    """What skins may call."""

    def status(self, caller: Caller) -> Json:
        """Host, guests, grants and loans in one consistent view (see `host`, `guests`...)."""

    def host(self, caller: Caller) -> Json:
        """Topology, capacity, pool, housekeeping, who is on each pCPU, memory by node."""

    def guests(self, caller: Caller) -> list[Json]:
        """One entry per guest."""

    def grants(self, caller: Caller) -> list[Json]:
        """Open grants."""

    def loans(self, caller: Caller) -> list[Json]:
        """Open loans."""

    def policy_show(self, caller: Caller, guest: str) -> Json:
        """The policy of a guest (by name or UUID), with `xml` as it stands in the metadata."""

    def policy_set(self, caller: Caller, guest: str, changes: Mapping[str, str]) -> Json:
        """Change policy fields.

        Keys as in the command: priority, cpu `1:4`, memory `512M:4G`, shares, placement, smt,
        admission, drift, device:CAPABILITY `2:reclaimable|2|kept|0`. Returns the new policy,
        `notes` (sentences for a person) and, for a running guest, `job`: its re-placement.
        """

    def policy_plan(self, caller: Caller, guest: str, changes: Mapping[str, str]) -> Json:
        """`--dry-run` of `policy_set`: the new policy, `notes`, and `plan`, as `plan` answers it.

        `plan` is None for a guest that does not run.
        """

    def policy_clear(self, caller: Caller, guest: str) -> Json:
        """Make a guest unmanaged; its pins and caps are lifted (`job`)."""

    def ports(self, caller: Caller, guest: str) -> Json:
        """The PCIe ports of a guest, live and persistent, and what is behind each."""

    def ports_add(self, caller: Caller, guest: str, count: int) -> Json:
        """Add root ports to the persistent definition, for the next boot; `ports`, and `added`."""

    def allocate(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """Start an allocation job.

        `wants`: cpu `2|+1|-500m`, memory `1G|+64M`, device:CAPABILITY `1|+1|-1`, for `10m`,
        partial `yes`, deadline `30`, key TEXT. Returns `{"job": id, "request": id}`.
        """

    def plan(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """`--dry-run`: decision and the exact steps, nothing changed.

        `{"decision": ..., "steps": [{"text", "data"}], "offers": [...], "generation": n,
        "devices": [...]}`; the last says who shares something with the functions it would get.
        """

    def release(self, caller: Caller, grant: str) -> Json:
        """Start a job that ends a grant; loans go home. Returns `{"job": id}`."""

    def devices(self, caller: Caller) -> list[Json]:
        """Every PCIe function: who has it, and why it cannot be assigned."""

    def device_release(self, caller: Caller, address: str) -> Json:
        """Start a job that lets a function out of quarantine. Returns `{"job": id}`."""

    def cards(self, caller: Caller) -> list[Json]:
        """Every offload card, as last told of."""

    def card(self, caller: Caller, serial: str) -> Json:
        """One card, with `slice_list` and `readings`."""

    def card_trust(self, caller: Caller, serial: str) -> Json:
        """Believe a card again that was distrusted; the card as it is then."""

    def slices(self, caller: Caller) -> list[Json]:
        """Every slice of every card, other hosts' too."""

    def slices_plan(self, caller: Caller, text: str, options: Mapping[str, str]) -> Json:
        """`--dry-run` of `slices_create`: `{"steps": [{"text", "data"}], "generation": n}`."""

    def slices_create(self, caller: Caller, text: str, options: Mapping[str, str]) -> Json:
        """Start a job that makes the slices of a slice file, all or none: `{"job": id}`.

        `options`: guest NAME, reclaim `yes|no`.
        """

    def slice_plan_end(self, caller: Caller, name: str) -> Json:
        """`--dry-run` of `slice_destroy`, as `slices_plan` answers it."""

    def slice_destroy(self, caller: Caller, name: str) -> Json:
        """Start a job that ends a slice (its name, its id, or `CARD/SLICE`): `{"job": id}`."""

    def slice_program(self, caller: Caller, name: str, path: str) -> Json:
        """Start a job that programs a slice with an image of this host's disk: `{"job": id}`."""

    def memory(self, caller: Caller) -> Json:
        """NUMA nodes by tier, and CXL memory: windows, regions, memdevs, ports, problems."""

    def memory_release(self, caller: Caller, subject: str) -> Json:
        """Start a job that lets a memdev (`0x100`) or node (`node2`) out of quarantine."""

    def region_plan(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """`--dry-run` of `region_create`: `{"steps": [{"text", "data"}], "generation": n}`."""

    def region_create(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """Start a job that makes a CXL region and brings its memory online.

        `wants`: window `0x1000000000|decoder0.0`, memdevs `0x100,0x101`, and optionally ways `2`,
        granularity `256`, size `1G`, use `movable|normal`. Returns `{"job": id}`.
        """

    def region_plan_end(self, caller: Caller, name: str) -> Json:
        """`--dry-run` of `region_destroy`, as `region_plan` answers it."""

    def region_destroy(self, caller: Caller, name: str) -> Json:
        """Start a job that takes a region's memory offline and destroys it: `{"job": id}`."""

    def reclaim_plan(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """`--dry-run` of `reclaim`: who would be asked for what, and who cannot be."""

    def reclaim(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """Start a job that calls the memory of a CXL node home from guests: `{"job": id}`.

        `wants`: node `2`, and optionally size `1G` (all), detach `yes`, deadline `30s` for each
        guest. The job is done as well where some is still out; its result says how much, and why.
        """

    def explain(self, caller: Caller, subject: str) -> Json:
        """The story of a request, grant, loan, job or transaction, from the audit log alone.

        `{"subject", "lines": [str], "records": [...]}`.
        """

    def audit(self, caller: Caller, since: float, subject: str) -> list[Json]:
        """Audit records; since 0 and subject "" mean no bound."""

    def audit_verify(self, caller: Caller, head: str) -> Json:
        """`{"whole": bool, "records": n, "head": hex, "problem": str}`."""

    def drift(self, caller: Caller) -> list[Json]:
        """`{"guest", "name", "what", "intended", "found", "policy"}` for each difference."""

    def drift_repair(self, caller: Caller) -> Json:
        """Start a job that mends what `drift` shows. Returns `{"job": id}`."""

    def job(self, caller: Caller, job: JobId) -> Json:
        """`{"id","state","fraction","text","result","error":{"reason","detail",...}|None}`."""

    def jobs(self, caller: Caller) -> list[Json]:
        """Running and recent jobs."""

    def job_cancel(self, caller: Caller, job: JobId) -> Json:
        """Cancel and undo; answers at once."""

    def health(self, caller: Caller) -> Json:
        """How the agent is.

        Version, libvirt version and connection, state directory, uptime, generation, alerts,
        open residues.
        """

    def subscribe(self, listener: Callable[[Notice], None]) -> Callable[[], None]:
        """Deliver notices (from any thread; must not block); returns the way to stop."""

    # The hook edge: never calls libvirt, never waits for a lock that a plan holds.

    def hook_prepare(self, caller: Caller, xml: str, *, wait_s: float) -> str:
        """Admission. Returns "" to allow, else the one line that virsh shows."""

    def hook_notify(self, caller: Caller, name: str, operation: str, xml: str) -> None:
        """`started`, `release`, `reconnect`: remembered at once, worked on afterwards."""

    def hook_filter(self, caller: Caller, operation: str, xml: str) -> str:
        """`migrate` and `restore`: the XML with this host's placement instead of stale pins."""
