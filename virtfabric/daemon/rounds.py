"""Rounds: what the agent does by itself, every so often, in a thread of their own.

It owns the samples (load, guests' statistics), the periodic look at the whole host, and the repair
of drift that a look found. What comes of a look is for the lifecycle to carry out.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import HypervisorGoneError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.drift import DriftWatch
    from virtfabric.daemon.hostwatch import HostWatch
    from virtfabric.daemon.jobs import Job
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.lifecycle import Lifecycle
    from virtfabric.daemon.memorydesk import MemoryDesk
    from virtfabric.daemon.memorywatch import MemoryWatch
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.wiring import Settings, World
    from virtfabric.model.cxl import Condition, Serial
    from virtfabric.model.ids import GuestId

log = logging.getLogger(__name__)

TICK_END_S: Final = 2.0
"""Longest wait at the stop for a tick: libvirt may hold its sample up while any hook runs."""


class Rounds:
    """Ticks from `start` to `stop`.

    Attributes:
        telemetry: the host's load, as last sampled.
        stats: counters of each guest that runs, as last sampled.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        world: World,
        observatory: Observatory,
        ledger: Ledger,
        conductor: Conductor,
        lifecycle: Lifecycle,
        drift: DriftWatch,
        notices: Notices,
        host: HostWatch,
        memory: MemoryDesk,
        memorywatch: MemoryWatch,
        measured: Callable[[Mapping[str, Mapping[str, float]]], None],
    ) -> None:
        """Nothing ticks before `start`.

        `settings` is asked before each wait: they may be reloaded. `measured` hears each sample, by
        subject: `host`, or a guest's UUID.
        """
        self._measured = measured
        self._settings = settings
        self._world = world
        self._observatory = observatory
        self._ledger = ledger
        self._conductor = conductor
        self._lifecycle = lifecycle
        self._drift = drift
        self._notices = notices
        self._host = host
        self._memory = memory
        self._memorywatch = memorywatch
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick_forever, name="tick", daemon=True)
        self.telemetry: Mapping[str, float] = {}
        self.stats: Mapping[GuestId, Mapping[str, int]] = {}

    def start(self) -> None:
        """Begin to tick."""
        self._ticker.start()

    def stop(self) -> None:
        """Begin nothing any more; does not wait."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and wait for the last tick, but not for long; safe to repeat."""
        self.stop()
        if self._ticker.is_alive():
            self._ticker.join(TICK_END_S)
            if self._ticker.is_alive():
                log.warning("stopping without the last sample: libvirt does not answer")

    def _tick_forever(self) -> None:
        clock = self._world.clock
        drift_at = clock.monotonic() + self._settings().drift_interval_s
        while not self._stop.wait(self._settings().sample_interval_s):
            try:
                self.tick()
                if clock.monotonic() >= drift_at:
                    drift_at = clock.monotonic() + self._settings().drift_interval_s
                    self._lifecycle.enqueue(self.look_over)
            except HypervisorGoneError:
                continue  # the event thread reconnects and says so
            except VirtfabricError as error:
                log.warning("tick: %s", error)

    def tick(self) -> None:
        """Sample, and place whom a job has kept from it."""
        self._lifecycle.retry_detained()
        self.telemetry = self._world.load.sample()
        self.stats = self._world.stats.sample()
        figures: dict[str, Mapping[str, float]] = {"host": self.telemetry}
        self._measured(figures | dict(self.stats))

    def look_over(self) -> None:
        """The periodic look: read all, settle what was missed, compare, retry residues."""
        self._conductor.unfinished.finish()
        self._lifecycle.resync()
        self._lifecycle.devices.look_soon()
        residual = {r.guest for r in self._ledger.view().books.residues}
        for guest in residual - self._ledger.view().busy:
            self._lifecycle.converge([guest], "retry of a residue")
        self._lifecycle.pages.sweep()
        self._drift.check()
        self.look_at_memory()

    def look_at_memory(self) -> None:
        """Something of the host's memory may have changed: faults first, then what is granted."""
        self._memorywatch.look()
        self._host.look()
        self._memory.look()

    def judge_memory(self, conditions: Mapping[Serial, Condition]) -> None:
        """Memdevs told how they do: nothing is granted any more of what is not sane."""
        if self._memorywatch.judge(conditions):
            self._host.follow()

    def repair(self, guest: GuestId) -> None:
        """Bring a guest to where it should be; never waits."""
        state = self._observatory.guest(guest)
        job = self._lifecycle.converge([guest], f"repair of {state.name if state else guest}")
        self._lifecycle.enqueue(lambda: self._after_repair(guest, job), guest)

    def _after_repair(self, guest: GuestId, job: Job) -> None:
        job.ended.wait()
        body = {"guest": guest, "steps": (job.result or {}).get("steps", []), "error": job.error}
        self._world.audit.append("drift.repaired", [guest], body)
        self._notices.publish("drift.repaired", body)
