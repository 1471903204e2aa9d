"""A whole host in memory: topology, guests, events, statistics, step handlers, faults.

Everything the agent's ports can ask of a libvirt host, and the ways in which one misbehaves.
Thread-safe; `host.lock` covers all state.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.adapters.simulated.cxlhandlers import cxl_handlers
from virtfabric.adapters.simulated.definitions import SimulatedDefinitions
from virtfabric.adapters.simulated.devicehandlers import device_handlers
from virtfabric.adapters.simulated.devices import SimulatedDevices
from virtfabric.adapters.simulated.events import SimulatedEvents
from virtfabric.adapters.simulated.faults import Faults
from virtfabric.adapters.simulated.guest import GuestSpec, Hardware, SimulatedGuest, write_policy
from virtfabric.adapters.simulated.handlers import SimulatedHandler, simulated_handlers
from virtfabric.adapters.simulated.hugepages import SimulatedPages, page_handlers
from virtfabric.adapters.simulated.memory import SimulatedMemory
from virtfabric.adapters.simulated.memoryhandlers import memory_handlers
from virtfabric.model.errors import (
    DeviceError,
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    InvalidValueError,
)
from virtfabric.model.guest import RunState
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.ports import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfabric.adapters.simulated.devices import SimulatedFunction
    from virtfabric.model.device import PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import HostTopology
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy
    from virtfabric.model.reclaim import MemoryReport
    from virtfabric.model.step import Step
    from virtfabric.ports import Clock

_FIRST_PID: Final = 4000
_PIDS_APART: Final = 1000
"""Room for the thread ids of a guest's vCPUs behind its process id."""


@dataclass
class SimulatedLoad:
    """Implements `ports.HostLoad`; set the attributes to what you like."""

    cpu_percent: float = 5.0
    memory_available: float = float(8 << 30)
    agent_rss: float = float(40 << 20)
    agent_cpu_percent: float = 0.1

    def sample(self) -> Mapping[str, float]:
        """The host's load."""
        return dict(vars(self))


class SimulatedStats:
    """Implements `ports.GuestStats`.

    Attributes:
        reports: what guests tell of their memory; a test sets it.
    """

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self.reports: dict[GuestId, MemoryReport] = {}

    def read_report(self, guest: GuestId) -> MemoryReport | None:
        """As it was set."""
        with self._host.lock:
            return self.reports.get(guest)

    def sample(self) -> Mapping[GuestId, Mapping[str, int]]:
        """Statistics of all running guests."""
        with self._host.lock:
            return {
                uuid: {
                    "balloon.current": guest.real.memory,
                    "balloon.maximum": int(guest.read().memory_max),
                    "vcpu.current": guest.real.vcpus,
                    "vcpu.maximum": guest.spec.vcpus_max,
                    "cpu.time": int(self._host.clock.monotonic() * 1e9) * guest.real.vcpus,
                }
                for uuid, guest in self._host.guests().items()
                if guest.state is not RunState.SHUTOFF
            }


class SimulatedHost:
    """Implements `ports.HostReader`, `GuestReader` and `PolicyWriter`; the rest hangs off it.

    Attributes:
        events, stats, load, handlers: `ports.EventSource`, `GuestStats`, `HostLoad`, `Handlers`.
        devices: `ports.DeviceTree`.
        memory: `ports.MemoryTree`.
        pages: `ports.PageTree`.
        definitions: `ports.DefinitionEditor`.
        faults: what goes wrong.
        clock: what deadlines are measured by.
    """

    def __init__(
        self,
        topology: HostTopology,
        clock: Clock | None = None,
        functions: Iterable[SimulatedFunction] = (),
    ) -> None:
        self.lock = threading.RLock()
        self.devices = SimulatedDevices(self.lock, functions)
        self.memory = SimulatedMemory(self.lock, self.read_topology)
        self.pages = SimulatedPages(self)
        self.clock: Clock = clock or SimulatedClock()
        self.faults = Faults()
        self.events = SimulatedEvents()
        self.load = SimulatedLoad()
        self.stats = SimulatedStats(self)
        self.handlers = HandlerRegistry(
            (
                *simulated_handlers(self),
                *device_handlers(self),
                *cxl_handlers(self),
                *memory_handlers(self),
                *page_handlers(self),
            )
        )
        self.definitions = SimulatedDefinitions(self)
        self._topology = topology
        self._guests: dict[GuestId, SimulatedGuest] = {}
        self._connected = True
        self._known_nodes: frozenset[int] | None = None
        self._pid = _FIRST_PID

    # -- what the ports ask ---------------------------------------------------------------------

    @property
    def cpus(self) -> CpuSet:
        """Every online pCPU."""
        return self._topology.cpus

    @property
    def node_numbers(self) -> frozenset[int]:
        """Every node."""
        return frozenset(self._topology.nodes | self.memory.nodes())

    def read_topology(self) -> HostTopology:
        """The topology, with the memory that is free now."""
        with self.lock:
            self._check_connected()
            used: dict[int, int] = {}
            there = self._topology.nodes | self.memory.nodes()
            first_node = min(there)
            for guest in self._guests.values():
                for node, amount in guest.nodes_used(first_node).items():
                    used[node] = used.get(node, 0) + amount
            nodes = {
                number: replace(
                    node,
                    memory_free=Bytes(
                        max(0, node.memory_free - used.get(number, 0) - self.pages.taken(number))
                    ),
                )
                for number, node in sorted(there.items())
            }
            return replace(self._topology, nodes=nodes)

    def read_known_nodes(self) -> frozenset[int]:
        """All nodes, or those that there were when libvirtd started last."""
        with self.lock:
            self._check_connected()
            nodes = frozenset(self._topology.nodes | self.memory.nodes())
            return nodes if self._known_nodes is None else self._known_nodes & nodes

    def read_guests(self) -> dict[GuestId, GuestState]:
        """All guests."""
        with self.lock:
            self._check_connected()
            return {uuid: guest.read() for uuid, guest in self._guests.items()}

    def read_guest(self, guest: GuestId) -> GuestState | None:
        """One guest."""
        with self.lock:
            self._check_connected()
            found = self._guests.get(guest)
            return None if found is None else found.read()

    def write_policy(self, guest: GuestId, policy: GuestPolicy | None) -> None:
        """Replace the policy metadata."""
        with self.lock:
            found = self.defined(guest)
            found.spec = replace(found.spec, policy=policy, policy_error="")
            found.said.policy = found.real.policy = write_policy(policy)
            self.tell(EventKind.METADATA, guest)

    # -- what people and guests do beside the agent ---------------------------------------------

    def define_guest(self, spec: GuestSpec) -> None:
        """Define a guest; it does not run yet.

        Raises:
            InvalidValueError: the UUID is taken.
        """
        with self.lock:
            if spec.uuid in self._guests:
                raise InvalidValueError("uuid", spec.uuid, "is defined already")
            self._guests[spec.uuid] = SimulatedGuest(spec, self.cpus)
            self.tell(EventKind.DEFINED, spec.uuid)

    def undefine_guest(self, guest: GuestId) -> None:
        """Remove the definition; a running guest becomes transient."""
        with self.lock:
            found = self.defined(guest)
            found.spec = replace(found.spec, persistent=False)
            self.tell(EventKind.UNDEFINED, guest)
            if found.state is RunState.SHUTOFF:
                del self._guests[guest]

    def start_guest(self, guest: GuestId | GuestSpec) -> None:
        """Start a defined guest, or define and start one."""
        with self.lock:
            if isinstance(guest, GuestSpec):
                self.define_guest(guest)
                guest = guest.uuid
            found = self.defined(guest)
            if found.state is not RunState.SHUTOFF:
                raise HypervisorError(f"{found.spec.name}: domain is already running")
            self.pages.check_start(found)
            self._adopt_functions(found)
            self._pid += _PIDS_APART
            found.start(self._pid)
            self.tell(EventKind.STARTED, guest, "booted")

    def stop_guest(self, guest: GuestId, detail: str = "destroyed") -> None:
        """Stop a guest; a transient one is gone. Nothing happens to one that does not run."""
        with self.lock:
            found = self._guests.get(guest)
            if found is None or found.state is RunState.SHUTOFF:
                return
            found.stop()
            self.devices.release(guest)
            self.tell(EventKind.STOPPED, guest, detail)
            if not found.spec.persistent:
                del self._guests[guest]

    def _adopt_functions(self, guest: SimulatedGuest) -> None:
        """What its definition names: `managed='yes'` is bound by libvirt, else it has to be."""
        try:
            for device in guest.spec.functions:
                if device.managed:
                    self.devices.adopt(device.address, guest.spec.uuid)
                else:
                    self.devices.open(device.address, guest.spec.uuid)
        except (DeviceError, HypervisorError) as error:
            self.devices.release(guest.spec.uuid)
            raise HypervisorError(f"{guest.spec.name}: {error}") from error

    def let_go(self, guest: GuestId, address: PciAddress) -> None:
        """A guest lets a function go, when it is asked or long after."""
        with self.lock:
            found = self.running(guest)
            found.unplugging.discard(address)
            found.said.functions.pop(address, None)
            alias = found.real.functions.pop(address, None)
            self.devices.release(guest, address)
            if alias is not None:
                self.tell(EventKind.DEVICE_REMOVED, guest, alias)

    def remove_function(self, address: PciAddress) -> None:
        """A function is taken out of the host without a word; its guest loses it."""
        with self.lock:
            for uuid, guest in self._guests.items():
                if address in guest.real.functions:
                    self.let_go(uuid, address)
            self.devices.remove(address)

    def suspend_guest(self, guest: GuestId) -> None:
        """Pause its vCPUs."""
        with self.lock:
            self.running(guest).state = RunState.PAUSED
            self.tell(EventKind.SUSPENDED, guest)

    def halt_guest(self, guest: GuestId) -> None:
        """QEMU stops it for an internal error, such as a fatal error of a PCI function."""
        with self.lock:
            self.running(guest).state = RunState.PAUSED
            self.running(guest).halted = True
            self.tell(EventKind.SUSPENDED, guest)

    def resume_guest(self, guest: GuestId) -> None:
        """Let its vCPUs go on."""
        with self.lock:
            self.running(guest).state = RunState.RUNNING
            self.running(guest).halted = False
            self.tell(EventKind.RESUMED, guest)

    def rename_guest(self, guest: GuestId, name: str) -> None:
        """Another name for the same UUID."""
        with self.lock:
            found = self.defined(guest)
            found.spec = replace(found.spec, name=name)
            self.tell(EventKind.DEFINED, guest, "renamed")

    def set_job(self, guest: GuestId, job: str | None, *, told: bool = True) -> None:
        """A backup or migration begins (or ends, with None); with or without an event."""
        with self.lock:
            self.running(guest).job = job
            if told:
                self.tell(EventKind.JOB, guest, job or "")

    def change_beside(self, step: Step) -> None:
        """Somebody else does what this step does (`virsh vcpupin`...); faults do not strike."""
        handler = self.handlers.for_step(step)
        assert isinstance(handler, SimulatedHandler)  # ours are all there are
        with self.lock:
            handler.bring(self.running(step.guest), step, lost=False)
            if handler.event is not None:
                self.tell(handler.event, step.guest)

    def disconnect(self) -> None:
        """Take libvirtd down: every call fails until `reconnect`. Guests run on."""
        with self.lock:
            if self._connected:
                self.tell(EventKind.DISCONNECTED)
                self._connected = False

    def reconnect(self) -> None:
        """Let libvirtd be back."""
        with self.lock:
            if not self._connected:
                self._connected = True
                if self._known_nodes is not None:
                    self.learn_no_nodes()
                self.tell(EventKind.CONNECTED)

    def restart(self) -> None:
        """Restart libvirtd; implements `ports.Restarter`."""
        self.disconnect()
        self.reconnect()

    def learn_no_nodes(self) -> None:
        """As the real libvirtd: it knows the nodes of its start, and learns of no new one."""
        with self.lock:
            self._known_nodes = frozenset(self._topology.nodes | self.memory.nodes())

    # -- what the kernel shows ------------------------------------------------------------------

    def kernel(self, guest: GuestId) -> Hardware | None:
        """A copy of what the kernel shows of a guest, connection or not; None without process."""
        with self.lock:
            found = self._guests.get(guest)
            if found is None or found.state is RunState.SHUTOFF:
                return None
            return found.real.copy()

    # -- for the handlers, under `lock` ---------------------------------------------------------

    def guests(self) -> Mapping[GuestId, SimulatedGuest]:
        """All guests, live objects."""
        return self._guests

    def defined(self, guest: GuestId) -> SimulatedGuest:
        """A guest, running or not.

        Raises:
            GuestGoneError, HypervisorGoneError
        """
        self._check_connected()
        found = self._guests.get(guest)
        if found is None:
            raise GuestGoneError(f"guest {guest} is not defined")
        return found

    def running(self, guest: GuestId) -> SimulatedGuest:
        """A guest with a process.

        Raises:
            GuestGoneError, HypervisorGoneError
        """
        with self.lock:
            self._check_connected()
            found = self._guests.get(guest)
            if found is None or found.state is RunState.SHUTOFF:
                raise GuestGoneError(f"guest {guest} is not running")
            return found

    def changeable(self, guest: GuestId) -> SimulatedGuest:
        """A guest with a process, and no job that bars changes.

        Raises:
            GuestGoneError, HypervisorGoneError, HypervisorError
        """
        found = self.running(guest)
        if found.job not in (None, "backup"):
            raise HypervisorError("Timed out during operation: cannot acquire state change lock")
        return found

    def moved(self, guest: GuestId, current: int, target: int, block: int) -> int:
        """Where a guest's memory comes to when it is asked for `target`, in whole blocks."""
        budgets = self.faults.gives if target < current else self.faults.takes
        distance = abs(target - current)
        if guest in budgets:
            if budgets[guest] < distance:
                distance = budgets[guest] // block * block
            budgets[guest] -= distance
        return current - distance if target < current else current + distance

    def tell(self, kind: EventKind, guest: GuestId | None = None, detail: str = "") -> None:
        """Emit an event."""
        with self.lock:
            if self._connected:
                found = self._guests.get(guest) if guest else None
                name = found.spec.name if found else ""
                self.events.emit(Event(kind, guest, name, detail))

    def check_cpus(self, cpus: CpuSet) -> None:
        """Raise HypervisorError for pCPUs that are not there."""
        if not cpus or not cpus <= self.cpus:
            raise HypervisorError(f"pCPUs {cpus}: Invalid argument")

    def check_nodes(self, nodes: CpuSet) -> None:
        """Raise HypervisorError for nodes that are not there, or that libvirtd does not know."""
        if not nodes or not nodes <= self.read_known_nodes():
            raise HypervisorError(f"NUMA node {nodes} is unavailable")

    def _check_connected(self) -> None:
        if not self._connected:
            raise HypervisorGoneError("the connection to the simulated libvirtd is down")


def build_simulated_host(
    topology: HostTopology,
    guests: Iterable[GuestSpec],
    clock: Clock | None = None,
    functions: Iterable[SimulatedFunction] = (),
) -> SimulatedHost:
    """A host with these guests defined, and those started that are to run."""
    host = SimulatedHost(topology, clock, functions)
    for spec in guests:
        host.define_guest(spec)
        if spec.running:
            host.start_guest(spec.uuid)
    return host
