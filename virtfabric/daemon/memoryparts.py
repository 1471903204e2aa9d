"""Wires what an agent has for memory: what it shows, what it watches, regions, calls home."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from virtfabric.daemon.hostwatch import HostWatch
from virtfabric.daemon.memorydesk import MemoryDesk
from virtfabric.daemon.memorywatch import MemoryWatch
from virtfabric.daemon.reclaimdesk import ReclaimDesk
from virtfabric.daemon.regiondesk import RegionDesk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.daemon.conductor import Conductor
    from virtfabric.daemon.jobs import Jobs
    from virtfabric.daemon.ledger import Ledger
    from virtfabric.daemon.notices import Notices
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.daemon.reclaimer import Reclaimer
    from virtfabric.daemon.wiring import Settings, World
    from virtfabric.model.cxl import Condition, Serial


class MemoryParts(NamedTuple):
    """See each of them."""

    desk: MemoryDesk
    watch: MemoryWatch
    host: HostWatch
    regions: RegionDesk
    reclaim: ReclaimDesk


def wire_memory(
    world: World,
    settings: Callable[[], Settings],
    *,
    observatory: Observatory,
    ledger: Ledger,
    conductor: Conductor,
    jobs: Jobs,
    notices: Notices,
    reclaimer: Reclaimer,
    look_soon: Callable[[], None],
    judge_soon: Callable[[Mapping[Serial, Condition]], None],
) -> MemoryParts:
    """All of them; nothing is read yet.

    `look_soon` has memory looked at by the agent's own thread, `judge_soon` has the same thread
    judge what memdevs told.
    """
    desk = MemoryDesk(
        world.memory, world.pages, notices, world.clock, judge=judge_soon,
        name_of=observatory.name_of,
    )  # fmt: skip
    watch = MemoryWatch(
        tree=world.memory, observatory=observatory, ledger=ledger, journal=world.journal,
        audit=world.audit, notices=notices, jobs=jobs, clock=world.clock,
        follow=lambda: host.follow(),
    )  # fmt: skip
    host = HostWatch(
        host=world.host, observatory=observatory, ledger=ledger, notices=notices,
        audit=world.audit, restarter=world.restarter, capacity_of=settings().capacity_of,
        quarantined=watch.withheld,
    )  # fmt: skip
    regions = RegionDesk(
        tree=world.memory, observatory=observatory, conductor=conductor, jobs=jobs,
        hostwatch=host, look_soon=look_soon,
    )  # fmt: skip
    reclaim = ReclaimDesk(
        observatory=observatory, conductor=conductor, jobs=jobs, hostwatch=host,
        reclaimer=reclaimer, audit=world.audit,
        deadline_s=lambda: settings().deadline_s,
    )  # fmt: skip
    return MemoryParts(desk, watch, host, regions, reclaim)
