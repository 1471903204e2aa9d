"""What `compose` hands to the agent: the outside world by role, and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.api import Caller
    from virtfabric.daemon.authority import Polkit
    from virtfabric.model.card import Carded
    from virtfabric.model.device import DevicePool
    from virtfabric.model.host import Capacity, HostTopology
    from virtfabric.model.request import Offerable
    from virtfabric.ports import (
        AuditLog,
        Cards,
        Clock,
        DefinitionEditor,
        DeviceTree,
        EventSource,
        GuestReader,
        GuestStats,
        Handlers,
        HostLoad,
        HostReader,
        Journal,
        MemoryTree,
        PageTree,
        PolicyWriter,
        Restarter,
        VfMaker,
    )


@dataclass(frozen=True, slots=True)
class World:
    """Every role that the agent needs, real or simulated.

    Attributes:
        restarter: None where the agent is not to restart the hypervisor's daemon.
        cards: None where the configuration has none.
    """

    host: HostReader
    guests: GuestReader
    devices: DeviceTree
    memory: MemoryTree
    pages: PageTree
    vfs: VfMaker
    policies: PolicyWriter
    definitions: DefinitionEditor
    events: EventSource
    handlers: Handlers
    journal: Journal
    audit: AuditLog
    clock: Clock
    load: HostLoad
    stats: GuestStats
    restarter: Restarter | None = None
    cards: Cards | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of the configuration that the agent itself acts on.

    Attributes:
        carded: the card that decides about allocations; None: the agent does.
        idle_after_s: how long nobody may use a slice of a card before it is idle; 0: for ever.
        capacity_of: what may be granted of a host; raises ConfigError.
    """

    uri: str
    libvirt_version: str
    state_dir: str
    deadline_s: float
    sample_interval_s: float
    drift_interval_s: float
    group: int | None
    ceiling_for: Callable[[Caller], Offerable]
    capacity_of: Callable[[HostTopology], Capacity]
    lend_ballooned: bool = False
    pools: tuple[DevicePool, ...] = ()
    polkit: Polkit | None = None
    carded: Carded | None = None
    idle_after_s: float = 0.0
