"""The one place that builds adapters and wires them to the agent, and closes them in order."""

from __future__ import annotations

import grp
import hashlib
import logging
import pwd
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from virtfabric.adapters.cardlink.fleet import CardFleet
from virtfabric.adapters.cardlink.handlers import card_handlers
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.cxl.memory import SysfsMemory
from virtfabric.adapters.hook_socket import HookServer, read_missed_calls
from virtfabric.adapters.hugepages.handler import SysfsHugePages
from virtfabric.adapters.libvirt import open_libvirt
from virtfabric.adapters.libvirt.restart import CommandRestarter
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.inventory import SysfsDeviceTree
from virtfabric.adapters.pci.vfsettings import VfSettingsFiles
from virtfabric.adapters.registry import HandlerRegistry, JoinedHandlers
from virtfabric.adapters.sqlite.audit import SqliteAuditLog
from virtfabric.adapters.sqlite.journal import SqliteJournal
from virtfabric.adapters.statelock import StateLock
from virtfabric.adapters.syslog import SystemLog
from virtfabric.adapters.telemetry import PsutilLoad
from virtfabric.config import resolve_capacity
from virtfabric.daemon.agent import Agent
from virtfabric.daemon.wiring import Settings, World
from virtfabric.dbus.polkit import Polkit
from virtfabric.model.errors import ConfigError

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.config import Config
    from virtfabric.daemon.api import Caller
    from virtfabric.model.card import Carded
    from virtfabric.model.request import Offerable
    from virtfabric.ports import (
        Clock,
        DefinitionEditor,
        DeviceTree,
        EventSource,
        GuestReader,
        GuestStats,
        Handlers,
        HostLoad,
        HostReader,
        MemoryTree,
        PageTree,
        PolicyWriter,
        Restarter,
        VfMaker,
    )

log = logging.getLogger(__name__)

LOCK_DIR = Path("/run/virtfabric")


def _group_id(name: str) -> int | None:
    """The gid of the configured group; None where it does not exist (nobody is in it then)."""
    if not name:
        return None
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _settings(config: Config, libvirt_version: str, carded: Carded | None) -> Settings:
    def ceiling_for(caller: Caller) -> Offerable:
        try:
            name = pwd.getpwuid(caller.uid).pw_name
        except KeyError:
            name = ""
        return config.ceiling_for(caller.uid, name)

    return Settings(
        uri=config.agent.uri,
        libvirt_version=libvirt_version,
        state_dir=str(config.agent.state_dir),
        deadline_s=config.memory.deadline_s,
        sample_interval_s=config.agent.sample_interval_s,
        drift_interval_s=config.agent.drift_interval_s,
        group=_group_id(config.access.group),
        ceiling_for=ceiling_for,
        capacity_of=partial(resolve_capacity, config),
        lend_ballooned=config.memory.lend_ballooned,
        pools=config.pools,
        polkit=Polkit(config.agent.bus or None),
        carded=carded,
        idle_after_s=config.cards.idle_after_s,
    )


def _private_dir(path: Path, mode: int) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
        path.chmod(mode)
    except OSError as error:
        raise ConfigError(
            f"directory {path}: {error.strerror}",
            advice="run virtfabricd as root, or set agent.state_dir and agent.run_dir",
        ) from error
    return path


@dataclass(frozen=True, slots=True)
class _Outside:
    """The hypervisor's side of the world, real or simulated."""

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
    clock: Clock
    load: HostLoad
    stats: GuestStats
    version: str
    restarter: Restarter | None


class Composition:
    """A running agent with everything it holds."""

    def __init__(self, config: Config, *, simulate: bool = False) -> None:
        """Open locks, journal, audit and libvirt, recover, and wire the agent; `start` runs it.

        Raises:
            AlreadyRunningError, JournalCorruptError, HypervisorGoneError, ConfigError
        """
        self.config = config
        self.simulate = simulate
        self._stack = ExitStack()
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise

    def _build(self) -> None:
        config = self.config
        state = _private_dir(Path(config.agent.state_dir), 0o700)
        _private_dir(Path(config.agent.run_dir), 0o755)
        self._stack.enter_context(StateLock(state / "lock", f"state directory {state}"))
        if not self.simulate:
            self._lock_libvirt(config.agent.uri)
        system_log = SystemLog(Path(config.agent.syslog))
        self._stack.callback(system_log.close)
        outside = self._open_simulated() if self.simulate else self._open_libvirt()
        self._outside = outside
        journal = SqliteJournal(state / "journal.db")
        self._stack.callback(journal.shut)
        key = state / "audit.key"
        audit = SqliteAuditLog(state / "audit.db", key, outside.clock, system_log.send)
        self._stack.callback(audit.close)
        topology = outside.host.read_topology()
        cards = self._open_cards(state)
        self._carded = config.cards.carded(cards.views())
        handlers = JoinedHandlers(outside.handlers, HandlerRegistry(card_handlers(cards)))
        world = World(
            host=outside.host, guests=outside.guests, devices=outside.devices,
            memory=outside.memory, pages=outside.pages, vfs=outside.vfs, policies=outside.policies,
            definitions=outside.definitions, events=outside.events, handlers=handlers,
            journal=journal, audit=audit, clock=outside.clock, load=outside.load,
            stats=outside.stats, restarter=outside.restarter, cards=cards,
        )  # fmt: skip
        self.agent = Agent(
            world,
            _settings(config, outside.version, self._carded),
            topology,
            resolve_capacity(config, topology),
        )
        self._stack.callback(self.agent.close)

    def _open_cards(self, state: Path) -> CardFleet:
        """Links to all cards; by the time that the journal is looked at they are being made."""
        if not self.simulate and not self.config.cards.cards:
            return CardFleet("")
        # TLS and certificates: a fifth of a second that an agent without cards does not need
        from virtfabric.composecards import open_cards, simulated_cards

        if self.simulate:
            host = cast("SimulatedHost", self._outside.host)
            cards = simulated_cards(_private_dir(state / "cards", 0o700), self._stack, host)
        else:
            cards = open_cards(self.config.cards)
        self._stack.callback(cards.close)
        cards.start()
        return cards

    def _lock_libvirt(self, uri: str) -> None:
        """One agent for one libvirtd: in a place that no option moves, before anything is done."""
        digest = hashlib.sha256(uri.encode()).hexdigest()[:12]
        # the only directory of /run that the shipped unit lets it write to
        lock = _private_dir(LOCK_DIR, 0o755) / f"libvirt-{digest}.lock"
        self._stack.enter_context(StateLock(lock, f"libvirt {uri}"))

    def _open_libvirt(self) -> _Outside:
        opened = open_libvirt(self.config.agent.uri)
        self._stack.callback(opened.close)
        settings = VfSettingsFiles(FunctionFiles())
        command = self.config.agent.restart_libvirt
        return _Outside(
            opened.host, opened.guests, SysfsDeviceTree(settings=settings.read_all),
            SysfsMemory(), SysfsHugePages(), opened.vfs, opened.policy, opened.definitions,
            opened.events, opened.handlers, SystemClock(), PsutilLoad(), opened.stats,
            opened.version, CommandRestarter(command) if command else None,
        )  # fmt: skip

    def _open_simulated(self) -> _Outside:
        # a machine that no production run sees: a tenth of the agent's start
        from virtfabric.adapters.simulated.machines import small_host

        host = small_host(SystemClock())
        return _Outside(
            host, host, host.devices, host.memory, host.pages, host.devices, host, host.definitions,
            host.events, host.handlers, host.clock, host.load, host.stats, "simulated", None,
        )  # fmt: skip

    def start(self) -> None:
        """Settle running guests, follow events, then answer hooks. Blocks until settled."""
        hooks = HookServer(
            Path(self.config.agent.hook_socket),
            self.agent,
            on_denied=self.agent.hook_denied,
            mode=0o666,  # others get as far as "not allowed", and into the audit log
        )
        hooks.start()
        self._stack.callback(hooks.close)
        self.agent.start()
        self._read_missed()

    def _read_missed(self) -> None:
        """Tell of calls that hooks left while no agent answered; the guests are settled by now."""
        for call in read_missed_calls(Path(self.config.agent.hook_socket).parent):
            log.warning("a hook ran while the agent was away: %s %s", call.operation, call.name)
            call.path.unlink(missing_ok=True)

    def reload(self, config: Config) -> None:
        """Take over a new configuration; what cannot change while running is said in the log.

        Raises:
            ConfigError: nothing was changed.
        """
        now = self.config.agent
        but_for_intervals = replace(
            config.agent,
            sample_interval_s=now.sample_interval_s,
            drift_interval_s=now.drift_interval_s,
        )
        if but_for_intervals != now:
            log.warning(
                "[agent], but for its intervals, takes effect at the next start; "
                "the rest is taken over now"
            )
        if config.cards != self.config.cards:
            log.warning("[cards] takes effect at the next start")
        topology = self._outside.host.read_topology()
        capacity = resolve_capacity(config, topology)
        settings = _settings(config, self._outside.version, self._carded)
        self.agent.reconfigure(settings, topology, capacity)
        self.config = config

    def close(self) -> None:
        """Stop in the reverse order of building; safe to repeat."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
