"""The agent's facade: every request, from every edge, is authorised here and handed on.

It owns the start (recover, reconcile) and the clean stop. It holds no policy of its own.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from virtfabric import __version__
from virtfabric.daemon.allocation import LEASE, Allocation
from virtfabric.daemon.arbitration import Arbitration
from virtfabric.daemon.archive import Archive
from virtfabric.daemon.authority import Action, Authority
from virtfabric.daemon.cardcalls import CardCalls
from virtfabric.daemon.cardparts import NoCards, wire_cards
from virtfabric.daemon.cardviews import card_view
from virtfabric.daemon.conductor import Conductor
from virtfabric.daemon.devicedesk import DeviceDesk
from virtfabric.daemon.drift import DriftWatch
from virtfabric.daemon.guestpolicy import PolicyDesk, policy_view
from virtfabric.daemon.jobs import Jobs
from virtfabric.daemon.leases import LeaseWatch
from virtfabric.daemon.ledger import Ledger
from virtfabric.daemon.lifecycle import Lifecycle
from virtfabric.daemon.memoryparts import wire_memory
from virtfabric.daemon.notices import Notices
from virtfabric.daemon.observatory import Observatory
from virtfabric.daemon.portdesk import PortDesk
from virtfabric.daemon.reclaimer import Reclaimer
from virtfabric.daemon.recovery import recover
from virtfabric.daemon.rounds import Rounds
from virtfabric.daemon.vfcounts import make_vfs
from virtfabric.daemon.views import grants_view, guests_view, host_view, loans_view
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    Refusal,
    RefusedError,
    VirtfabricError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.api import Caller, Notice
    from virtfabric.daemon.wiring import Settings, World
    from virtfabric.model.cxl import Condition, Serial
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity, HostTopology
    from virtfabric.model.ids import GrantId, JobId
    from virtfabric.model.policy import GuestPolicy

    Json = dict[str, Any]

log = logging.getLogger(__name__)


class Agent(CardCalls):
    """Implements `daemon.api.AgentApi`. Thread-safe."""

    def __init__(
        self, world: World, settings: Settings, topology: HostTopology, capacity: Capacity
    ) -> None:
        """Recover from the journal and wire the parts; nothing runs until `start`.

        Raises:
            JournalCorruptError, VirtfabricError: the agent must not start.
        """
        self._world = world
        self._settings = settings
        clock = world.clock
        self._began = clock.monotonic()
        self._notices = Notices(clock)
        books = recover(
            world.journal, world.audit, world.handlers, clock, world.journal.load_books()
        )
        self._ledger = Ledger(books)
        self._observatory = Observatory(
            world.guests, world.devices, self._ledger, topology, capacity, settings.pools,
            world.pages, clock=clock, lend_ballooned=settings.lend_ballooned, cards=world.cards,
        )  # fmt: skip
        self._authority = Authority(settings.group, settings.ceiling_for, settings.polkit)
        self._jobs = Jobs(self._notices)
        self._drift = DriftWatch(self._observatory, self._notices, world.audit)
        reclaimer = Reclaimer(world.stats)
        self._arbitration = Arbitration(
            settings.carded, cards=world.cards or NoCards(), audit=world.audit,
            notices=self._notices, look=self._observatory.snapshot,
        )  # fmt: skip
        self._conductor = Conductor(
            ledger=self._ledger, observatory=self._observatory, journal=world.journal,
            audit=world.audit, handlers=world.handlers, clock=clock,
            reclaimer=reclaimer,
        )  # fmt: skip
        self._conductor.tell_ends(self._arbitration.report)
        self._lifecycle = Lifecycle(
            observatory=self._observatory, ledger=self._ledger, conductor=self._conductor,
            jobs=self._jobs, notices=self._notices, journal=world.journal, audit=world.audit,
            clock=clock, drift=self._drift,
        )  # fmt: skip
        self._allocation = Allocation(
            observatory=self._observatory, ledger=self._ledger, conductor=self._conductor,
            jobs=self._jobs, notices=self._notices, authority=self._authority,
            deadline_s=lambda: self._settings.deadline_s, clock=clock,
            cards=world.cards or NoCards(),
            settle_cards_soon=lambda: self._cards.watch.settle_soon(),
            choose=self._arbitration.choose, idle_slices=lambda: self._cards.idle.takeable(),
        )  # fmt: skip
        self._desk = PolicyDesk(
            observatory=self._observatory, ledger=self._ledger, conductor=self._conductor,
            jobs=self._jobs, lifecycle=self._lifecycle, writer=world.policies, clock=clock,
            choose=self._arbitration.choose,
        )  # fmt: skip
        self._devices = DeviceDesk(
            observatory=self._observatory, ledger=self._ledger, conductor=self._conductor,
            jobs=self._jobs, audit=world.audit, watch=self._lifecycle.devices,
        )  # fmt: skip
        parts = wire_memory(
            world, lambda: self._settings, observatory=self._observatory, ledger=self._ledger,
            conductor=self._conductor, jobs=self._jobs, notices=self._notices,
            reclaimer=reclaimer, look_soon=self._look_at_memory_soon,
            judge_soon=self._judge_memory_soon,
        )  # fmt: skip
        self._memory, self._memorywatch, self._hostwatch, self._regions, self._reclaim = parts
        self._cards = wire_cards(
            world, observatory=self._observatory, ledger=self._ledger, conductor=self._conductor,
            jobs=self._jobs, notices=self._notices, arbitration=self._arbitration,
            idle_after_s=settings.idle_after_s,
        )  # fmt: skip
        self._ports = PortDesk(world.definitions, world.audit)
        self._archive = Archive(world.audit, self._observatory, self._jobs)
        self._rounds = Rounds(
            settings=lambda: self._settings, world=world, observatory=self._observatory,
            ledger=self._ledger, conductor=self._conductor, lifecycle=self._lifecycle,
            drift=self._drift, notices=self._notices, host=self._hostwatch, memory=self._memory,
            memorywatch=self._memorywatch, measured=self._measured,
        )  # fmt: skip
        self._drift.repair_with(self._rounds.repair)
        self._leases = LeaseWatch(self._ledger, clock, self._expire)
        self._stop = threading.Event()
        self._connected = False

    # -- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Settle the guests that run, then follow events; returns when the first is done.

        Raises:
            HypervisorGoneError: libvirt is not there.
        """
        self._world.devices.watch(self._lifecycle.devices.look_soon)
        self._make_vfs()
        self._observatory.refresh_devices()
        self._hostwatch.follow()
        done = self._lifecycle.enqueue(lambda: self._lifecycle.resync(place=True))
        self._world.events.start(self._on_event)
        self._connected = True
        done.wait()
        self._memorywatch.look()
        self._hostwatch.follow()  # by now it is known which nodes guests name
        self._lifecycle.pages.sweep()
        self._lifecycle.devices.start()
        self._memory.start(self._look_at_memory_soon)
        self._world.audit.append("agent.started", [], {"version": __version__})
        self._drift.check()
        self._leases.start()
        self._rounds.start()
        self._cards.watch.start()

    def _look_at_memory_soon(self) -> None:
        self._lifecycle.enqueue(self._rounds.look_at_memory)

    def _judge_memory_soon(self, conditions: Mapping[Serial, Condition]) -> None:
        self._lifecycle.enqueue(lambda: self._rounds.judge_memory(conditions))

    def _measured(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        self._arbitration.measured(figures)
        self._cards.idle.look()

    def _make_vfs(self) -> None:
        make_vfs(self._world.vfs, self._settings.pools, self._notices, self._world.audit)

    def _on_event(self, event: Any) -> None:
        if event.kind.value in ("connected", "disconnected"):
            self._connected = event.kind.value == "connected"
        if event.kind.value == "connected":
            # before the resync, which waits for guests that an unfinished undo holds
            self._lifecycle.enqueue(self._conductor.unfinished.finish)
            self._lifecycle.enqueue(self._hostwatch.look)  # a restarted one knows more nodes
        self._lifecycle.on_event(event)

    def close(self) -> None:
        """Stop taking work, undo what runs, let go of everything; safe to repeat."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._rounds.stop()
        self._leases.close()
        self._jobs.close()
        self._cards.watch.close()
        self._world.events.close()
        self._world.devices.close()
        self._memory.close()
        self._lifecycle.close()
        self._rounds.close()
        try:
            self._world.audit.append("agent.stopped", [], {"version": __version__})
        except VirtfabricError as error:
            log.warning("the last audit record could not be written: %s", error)

    def reconfigure(self, settings: Settings, topology: HostTopology, capacity: Capacity) -> None:
        """Take over a reloaded configuration (SIGHUP)."""
        self._settings = settings
        self._hostwatch.configure(settings.capacity_of, capacity)
        self._observatory.reconfigure(
            topology, self._hostwatch.bound(capacity), settings.pools,
            lend_ballooned=settings.lend_ballooned,
        )  # fmt: skip
        self._lifecycle.enqueue(self._hostwatch.look)
        self._authority.configure(settings.group, settings.ceiling_for)
        self._world.audit.append("agent.reconfigured", [], {})
        self._lifecycle.converge(None, "placement after a new configuration")
        self._make_vfs()
        self._lifecycle.devices.look_soon()

    def _expire(self, grant: GrantId) -> None:
        running = {j.title for j in self._jobs.all() if not j.ended.is_set()}
        if f"release of {grant}" not in running:
            log.info("the lease of %s ended", grant)
            self._allocation.release(grant, uid=0, by=LEASE)

    # -- authorisation ----------------------------------------------------------------------

    def _require(self, caller: Caller, action: Action, **about: Any) -> None:
        try:
            self._authority.require(caller, action)
        except RefusedError as error:
            self._denied(caller, error, about | {"action": action.value})
            raise

    def _denied(self, caller: Caller, error: RefusedError, about: Json) -> None:
        self._world.audit.append(
            "access.denied",
            [f"uid:{caller.uid}"],
            {"who": str(caller.principal), "uid": caller.uid, "why": error.refusal.detail} | about,
        )

    # -- reading ----------------------------------------------------------------------------

    def status(self, caller: Caller) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        snapshot, arbiter = self._observatory.snapshot(), self._arbitration.view()
        return {
            "host": host_view(snapshot), "guests": guests_view(snapshot),
            "grants": grants_view(snapshot), "loans": loans_view(snapshot),
            "cards": [card_view(view, arbiter) for view in snapshot.cards.values()],
            "arbiter": arbiter,
            "generation": snapshot.generation, "alerts": self._notices.alerts,
        }  # fmt: skip

    def host(self, caller: Caller) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return host_view(self._observatory.snapshot()) | {"load": dict(self._rounds.telemetry)}

    def guests(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        stats = self._rounds.stats
        return [
            view | {"stats": dict(stats.get(view["uuid"], {}))}
            for view in guests_view(self._observatory.snapshot())
        ]

    def grants(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return grants_view(self._observatory.snapshot())

    def loans(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return loans_view(self._observatory.snapshot())

    def health(self, caller: Caller) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        view = self._ledger.view()
        guests = self._observatory.guests
        residues = [
            r.to_json() | {"name": guests[r.guest].name if r.guest in guests else r.guest}
            for r in view.books.residues
        ]
        return {
            "version": __version__,
            "libvirt": {
                "uri": self._settings.uri, "version": self._settings.libvirt_version,
                "connected": self._connected,
            },
            "state_dir": self._settings.state_dir,
            "uptime_s": round(self._world.clock.monotonic() - self._began, 1),
            "generation": view.generation, "alerts": self._notices.alerts, "residues": residues,
        }  # fmt: skip

    def devices(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._devices.show()

    def device_release(self, caller: Caller, address: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.DEVICES, address=address)
        job = self._devices.release(address, uid=caller.uid, by=str(caller.principal))
        return {"job": job.id}

    def memory(self, caller: Caller) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._memory.show(self._memorywatch.show())

    def memory_release(self, caller: Caller, subject: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, subject=subject)
        by = str(caller.principal)
        return {"job": self._memorywatch.release(subject, uid=caller.uid, by=by).id}

    def region_plan(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, wants=dict(wants))
        return self._regions.preview_create(wants)

    def region_create(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, wants=dict(wants))
        job = self._regions.create(wants, uid=caller.uid, by=str(caller.principal))
        return {"job": job.id}

    def region_plan_end(self, caller: Caller, name: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, region=name)
        return self._regions.preview_destroy(name)

    def region_destroy(self, caller: Caller, name: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, region=name)
        return {"job": self._regions.destroy(name, uid=caller.uid, by=str(caller.principal)).id}

    def reclaim_plan(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, wants=dict(wants))
        return self._reclaim.preview(wants)

    def reclaim(self, caller: Caller, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.MEMORY, wants=dict(wants))
        return {"job": self._reclaim.start(wants, uid=caller.uid, by=str(caller.principal)).id}

    def explain(self, caller: Caller, subject: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.AUDIT)
        return self._archive.explain(subject)

    def audit(self, caller: Caller, since: float, subject: str) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.AUDIT)
        return self._archive.records(since, subject)

    def audit_verify(self, caller: Caller, head: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.AUDIT)
        return self._archive.verify(head)

    def drift(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        held = self._ledger.view()
        self._observatory.refresh(g for g in held.books.holdings if g not in held.busy)
        return [d.to_json() for d in self._drift.check()]

    # -- changing ---------------------------------------------------------------------------

    def policy_show(self, caller: Caller, guest: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return policy_view(self._allocation.find(guest))

    def policy_set(self, caller: Caller, guest: str, changes: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        about = {"guest": guest, "changes": dict(changes)}
        state, policy = self._prepare_policy(caller, guest, changes)
        notes = self._ports.warn(state, policy)
        answer = self._desk.set(state, policy, uid=caller.uid) | {"notes": notes}
        self._world.audit.append("policy.set", [state.uuid], about | {"by": str(caller.principal)})
        return answer

    def policy_plan(self, caller: Caller, guest: str, changes: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        state, policy = self._prepare_policy(caller, guest, changes)
        return self._desk.preview(state, policy) | {"notes": self._ports.warn(state, policy)}

    def _prepare_policy(
        self, caller: Caller, guest: str, changes: Mapping[str, str]
    ) -> tuple[GuestState, GuestPolicy]:
        about = {"guest": guest, "changes": dict(changes)}
        self._require(caller, Action.POLICY, **about)
        state = self._allocation.find(guest)
        policy = self._desk.prepare(state, changes)
        try:
            self._authority.check_priority(caller, policy.priority)
        except RefusedError as error:
            self._denied(caller, error, about)
            raise
        return state, policy

    def policy_clear(self, caller: Caller, guest: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.POLICY, guest=guest)
        state = self._allocation.find(guest)
        answer = self._desk.clear(state, uid=caller.uid)
        self._world.audit.append("policy.cleared", [state.uuid], {"by": str(caller.principal)})
        return answer

    def ports(self, caller: Caller, guest: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._ports.show(self._allocation.find(guest))

    def ports_add(self, caller: Caller, guest: str, count: int) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.POLICY, guest=guest, ports=count)
        return self._ports.add(self._allocation.find(guest), count, by=str(caller.principal))

    def allocate(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        about = {"guest": guest, "wants": dict(wants)}
        self._require(caller, Action.ALLOCATE, **about)
        try:
            return self._allocation.start(caller, guest, wants)
        except RefusedError as error:
            if error.refusal.reason is Reason.ABOVE_CEILING:
                self._denied(caller, error, about)
            raise

    def plan(self, caller: Caller, guest: str, wants: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.ALLOCATE, guest=guest, wants=dict(wants))
        return self._allocation.preview(caller, guest, wants)

    def release(self, caller: Caller, grant: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.ALLOCATE, grant=grant)
        by = str(caller.principal)
        return {"job": self._allocation.release(grant, uid=caller.uid, by=by).id}

    def drift_repair(self, caller: Caller) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.ALLOCATE)
        view = self._ledger.view()
        self._observatory.refresh(g for g in view.books.holdings if g not in view.busy)
        guests = sorted({d.guest for d in self._drift.find()})
        self._world.audit.append(
            "drift.repair-asked", guests, {"by": str(caller.principal), "guests": guests}
        )
        return {"job": self._lifecycle.converge(guests, "repair of drift", uid=caller.uid).id}

    # -- jobs -------------------------------------------------------------------------------

    def job(self, caller: Caller, job: JobId) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._jobs.get(job).to_json()

    def jobs(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return [j.to_json() for j in self._jobs.all()]

    def job_cancel(self, caller: Caller, job: JobId) -> Json:
        """See `AgentApi`."""
        found = self._jobs.get(job)
        if caller.uid != found.uid:
            self._require(caller, Action.ALLOCATE, job=job)
        found.cancelled.set()
        return found.to_json()

    def subscribe(self, listener: Callable[[Notice], None]) -> Callable[[], None]:
        """See `AgentApi`."""
        return self._notices.subscribe(listener)

    # -- hooks ------------------------------------------------------------------------------

    def hook_prepare(self, caller: Caller, xml: str, *, wait_s: float) -> str:
        """See `AgentApi`."""
        self._require(caller, Action.HOOK, hook="prepare")
        return self._lifecycle.admission.admit(xml, wait_s)

    def hook_notify(self, caller: Caller, name: str, operation: str, xml: str) -> None:
        """See `AgentApi`."""
        self._require(caller, Action.HOOK, hook=operation)
        try:
            self._lifecycle.notify(name, operation, xml)
        except InvalidValueError as error:
            log.warning("hook %s %s: %s", operation, name, error)

    def hook_filter(self, caller: Caller, operation: str, xml: str) -> str:
        """See `AgentApi`."""
        self._require(caller, Action.HOOK, hook=operation)
        return self._lifecycle.filter(operation, xml)

    def hook_denied(self, caller: Caller) -> None:
        """Somebody other than root wrote to the hook socket: audited, nothing else."""
        refusal = Refusal(Reason.NOT_ALLOWED, "the hook socket takes root only")
        self._denied(caller, RefusedError(refusal), {"action": Action.HOOK.value})

    def find_guest(self, name: str) -> GuestState | None:
        """A guest as last read, for local parts (marks of missed hooks)."""
        return self._observatory.find(name)
