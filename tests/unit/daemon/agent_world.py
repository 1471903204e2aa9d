"""A whole agent on a simulated host: real facade, ledger, conductor; memory journal and audit."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from virtfabric.adapters.cardlink.handlers import card_handlers
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.registry import HandlerRegistry, JoinedHandlers
from virtfabric.adapters.simulated.faults import SimulatedCrash
from virtfabric.adapters.simulated.guest import GuestSpec, MemoryDevice
from virtfabric.adapters.simulated.host import SimulatedHost, build_simulated_host
from virtfabric.adapters.simulated.machines import make_topology
from virtfabric.adapters.simulated.records import MemoryAudit, MemoryJournal
from virtfabric.daemon.agent import Agent
from virtfabric.daemon.api import Caller
from virtfabric.daemon.wiring import Settings, World
from virtfabric.domxml.policy import format_policy
from virtfabric.model.amounts import Amounts, Tier
from virtfabric.model.errors import HypervisorGoneError, JournalError, VirtfabricError
from virtfabric.model.guest import MemoryRoom, NumaMode
from virtfabric.model.host import Capacity, NumaNode
from virtfabric.model.ids import GuestId, JobId
from virtfabric.model.policy import CpuPolicy, DevicePolicy, GuestPolicy, MemoryPolicy, Placement
from virtfabric.model.request import Offerable, Principal
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtfabric.adapters.simulated.devices import SimulatedFunction
    from virtfabric.model.cxl import CxlInventory
    from virtfabric.model.host import HostTopology
    from virtfabric.model.step import Step
    from virtfabric.ports import Handlers, Restarter, StepHandler

ROOT = Caller(Principal("root", 0), 0, frozenset({0}))
NOBODY = Caller(Principal("nobody", 65534), 65534, frozenset({65534}))
ALICE = Caller(Principal("alice", 1000), 1000, frozenset({1000, 77}))
GROUP = 77
DEADLINE_S = 10.0


def uuid_of(number: int) -> GuestId:
    return GuestId(f"00000000-0000-4000-8000-{number:012d}")


def make_spec(
    number: int,
    name: str,
    priority: int,
    *,
    cpu: tuple[int, int] = (500, 4000),
    memory_mib: tuple[int, int] = (256, 2048),
    initial_mib: int = 0,
    placement: Placement = Placement.SHARED,
    vcpus: int = 1,
    vcpus_max: int = 4,
    balloon: bool = False,
    running: bool = True,
    devices: tuple[DevicePolicy, ...] = (),
    ports: int = 4,
    tiers: tuple[str, ...] = ("dram",),
    cxl_mib: int | None = None,
) -> GuestSpec:
    """`tiers` with CXL makes it a strict guest; `cxl_mib` gives it a device on node 1."""
    tiered = "cxl" in tiers
    far = MemoryDevice(
        "ua-far0", 0, Bytes(1 * GIB), Bytes((cxl_mib or 0) * MIB), host_nodes=CpuSet([1])
    )
    return GuestSpec(
        uuid_of(number),
        name,
        vcpus=vcpus,
        vcpus_max=vcpus_max,
        boot_memory=Bytes((1024 if balloon else 256) * MIB),
        devices=()
        if balloon
        else (
            MemoryDevice("ua-mem0", 0, Bytes(1 * GIB), Bytes(initial_mib * MIB)),
            *((far,) if cxl_mib is not None else ()),
        ),
        numa_mode=NumaMode.STRICT if tiered else None,
        numa_nodes=CpuSet([0]) if tiered else CpuSet(),
        memory_room=MemoryRoom(2, Bytes(4 * GIB), 0) if tiered else MemoryRoom(),
        balloon=balloon,
        running=running,
        policy=GuestPolicy(
            priority=priority,
            cpu=CpuPolicy(MilliCpu(cpu[0]), MilliCpu(cpu[1]), placement=placement),
            memory=MemoryPolicy(
                Bytes(memory_mib[0] * MIB), Bytes(memory_mib[1] * MIB), tiers=tiers
            ),
            devices=devices,
        ),
        ports=ports,
    )


def with_cxl_node(topology: HostTopology) -> HostTopology:
    """The same with a node 1 of 8 GiB that a CXL region became."""
    far = NumaNode(
        1, CpuSet(), Bytes(8 * GIB), Bytes(8 * GIB), distances={0: 20, 1: 10}, tier=Tier.CXL,
        offlinable=True,
    )  # fmt: skip
    return replace(topology, nodes={**topology.nodes, 1: far})


def default_specs() -> tuple[GuestSpec, ...]:
    return (
        make_spec(10, "batch", 10, vcpus=2, initial_mib=512),
        make_spec(50, "web", 50, initial_mib=256),
        make_spec(90, "database", 90),
    )


def _no_ceiling(caller: Caller) -> Offerable:
    if caller.uid == ALICE.uid:
        return Offerable(50, Amounts.of(cpu=1500, memory=512 * MIB))
    return Offerable()


class LeapingClock(SystemClock):
    """The machine's time, but the date can be moved on: leases end without anybody waiting."""

    def __init__(self) -> None:
        self._leapt = 0.0

    def now(self) -> float:
        return super().now() + self._leapt

    def leap(self, seconds: float) -> None:
        self._leapt += seconds


_PREPARE_XML = """<domain type="kvm" id="1">
  <name>{name}</name><uuid>{uuid}</uuid><metadata>{policy}</metadata>
  <memory unit="b">{boot}</memory>{backing}<vcpu current="{vcpus}">{vcpus_max}</vcpu>
  <cpu><numa><cell id="0" cpus="0" memory="{boot}" unit="b"/></numa></cpu>
  <devices>{devices}<memballoon model="{balloon}"/></devices>
</domain>"""
_BACKING_XML = '<memoryBacking><hugepages><page size="{}" unit="b"/></hugepages></memoryBacking>'
_PORT_XML = '<controller type="pci" index="{}" model="pcie-root-port"/>'
_DEVICE_XML = """<memory model="virtio-mem"><source>{source}</source><target><node>{node}</node>
  <size unit="b">{size}</size><block unit="b">{block}</block>
  <requested unit="b">{initial}</requested></target><alias name="{alias}"/></memory>"""


def format_prepare(spec: GuestSpec) -> str:
    """What libvirt gives the `prepare` hook of this guest."""
    return _PREPARE_XML.format(
        name=spec.name, uuid=spec.uuid, policy=format_policy(spec.policy) if spec.policy else "",
        boot=int(spec.boot_memory), vcpus=spec.vcpus, vcpus_max=spec.vcpus_max,
        balloon="virtio" if spec.balloon else "none",
        backing=_BACKING_XML.format(int(spec.page)) if spec.page else "",
        devices="".join(_PORT_XML.format(n + 1) for n in range(spec.ports)) + "".join(
            _DEVICE_XML.format(
                node=d.node, size=int(d.size), block=int(d.block), initial=int(d.initial),
                alias=d.alias,
                source=f"<nodemask>{d.host_nodes}</nodemask>" if d.host_nodes else "",
            )
            for d in spec.devices
        ),
    )  # fmt: skip


class Process:
    """What an agent reaches the world through, until it is killed.

    The threads of a killed one are still there in this process; whatever they call fails.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._killed = False

    def wrap(self, port: Any, failure: VirtfabricError) -> Any:
        """The port as this agent sees it; `failure` is what calls raise when it is dead."""
        return _Port(self, port, failure)

    def kill(self) -> None:
        """What is being called now still happens, nothing after it."""
        with self._changed:
            self._killed = True
            assert self._changed.wait_for(lambda: not self._calls, DEADLINE_S)

    @contextlib.contextmanager
    def call(self, failure: VirtfabricError) -> Iterator[None]:
        with self._changed:
            if self._killed:
                raise failure
            self._calls += 1
        try:
            yield
        except SimulatedCrash:
            # dead at once: no other thread of it finds out what this one leaves behind
            self._killed = True
            raise
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()


class _Port:
    def __init__(self, process: Process, port: Any, failure: VirtfabricError) -> None:
        self._process, self._port, self._failure = process, port, failure

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._process.call(self._failure):
                return found(*args, **kwargs)

        return call


class _Handlers:
    """Implements `ports.Handlers`."""

    def __init__(self, process: Process, handlers: Handlers) -> None:
        self._process, self._handlers = process, handlers

    def for_step(self, step: Step) -> StepHandler:
        return cast("StepHandler", self._process.wrap(self._handlers.for_step(step), GONE))


GONE = HypervisorGoneError("this agent was killed")
CUT_OFF = JournalError("this agent was killed")


@dataclass
class AgentWorld:
    """Everything a test looks at.

    `memory_mib` of DRAM may be granted in all; with `cxl_mib` there is a node 1 of CXL memory. With
    `cxl` there are memdevs and windows, and all of the nodes that regions become may be granted.
    """

    specs: tuple[GuestSpec, ...] = field(default_factory=default_specs)
    cores: int = 2
    threads: int = 1
    memory_mib: int = 1600
    overhead_mib: int = 16
    sample_interval_s: float = 3600.0
    settings: dict[str, Any] = field(default_factory=dict)
    functions: tuple[SimulatedFunction, ...] = ()
    cxl_mib: int = 0
    cxl: CxlInventory | None = None
    restarter: Restarter | None = None
    make_cards: Callable[[SimulatedHost], Any] | None = None

    def __post_init__(self) -> None:
        topology = make_topology(cores=self.cores, threads=self.threads)
        if self.cxl_mib:
            topology = with_cxl_node(topology)
        self.host: SimulatedHost = build_simulated_host(
            topology, self.specs, functions=copy.deepcopy(self.functions)
        )
        if self.cxl is not None:
            self.host.memory.cxl = self.cxl
        self.clock = LeapingClock()
        self.host.clock = self.clock
        self.topology = topology
        self.journal = MemoryJournal()
        self.audit = MemoryAudit(self.clock)
        self.capacity = Capacity(
            topology.cpus,
            CpuSet([0]),
            {0: Bytes(self.memory_mib * MIB)},
            Bytes(0),
            Bytes(self.overhead_mib * MIB),
            {1: Bytes(self.cxl_mib * MIB)} if self.cxl_mib else {},
        )
        self.agent = self.make_agent()

    def make_agent(self) -> Agent:
        settings = Settings(
            uri="simulated:///", libvirt_version="9.0.0", state_dir="/nowhere",
            deadline_s=5.0, sample_interval_s=self.sample_interval_s, drift_interval_s=3600.0,
            group=GROUP, ceiling_for=_no_ceiling, capacity_of=self.capacity_of, **self.settings,
        )  # fmt: skip
        self._process = Process()
        cards = self.make_cards(self.host) if self.make_cards else None
        handlers = JoinedHandlers(
            self.host.handlers, *([HandlerRegistry(card_handlers(cards))] if cards else [])
        )
        host = self._process.wrap(self.host, GONE)
        world = World(
            host=host, guests=host, devices=self._process.wrap(self.host.devices, GONE),
            memory=self._process.wrap(self.host.memory, GONE),
            pages=self._process.wrap(self.host.pages, GONE),
            vfs=self._process.wrap(self.host.devices, GONE), policies=host,
            events=self.host.events,
            definitions=self.host.definitions,
            handlers=_Handlers(self._process, handlers),
            journal=self._process.wrap(self.journal, CUT_OFF),
            audit=self._process.wrap(self.audit, CUT_OFF),
            clock=self.clock, load=self.host.load, stats=self.host.stats,
            restarter=self.restarter, cards=cards,
        )  # fmt: skip
        return Agent(world, settings, self.topology, self.capacity)

    def capacity_of(self, topology: HostTopology) -> Capacity:
        """As at the start, and all of what is of CXL, where there is to be any."""
        far = {n: topology.nodes[n].memory_total for n in topology.cxl_nodes} if self.cxl else {}
        return replace(self.capacity, cxl=self.capacity.cxl or far)

    def start(self) -> AgentWorld:
        self.agent.start()
        return self

    def close(self) -> None:
        self.host.faults.clear()
        self.agent.close()

    def kill_agent(self) -> None:
        """As SIGKILL: it gets no event and does nothing more; its journal stays as it is."""
        self.host.faults.clear()
        self._process.kill()
        self.host.events.close()
        self.agent._stop.set()
        self.agent._rounds.stop()
        self.agent._leases._stop.set()

    def restart_agent(self) -> None:
        """A new process on the same journal."""
        self.agent = self.make_agent()
        self.agent.start()

    def virsh_start(self, name: str, *, wait_s: float = DEADLINE_S) -> str:
        """As libvirt does: the hook first, whose line keeps the guest down; "" when it runs."""
        spec = self.spec(name)
        line = self.agent.hook_prepare(ROOT, format_prepare(spec), wait_s=wait_s)
        if not line:
            self.host.start_guest(spec.uuid)
        return line

    def spec(self, name: str) -> GuestSpec:
        """A guest's definition as it is now."""
        return next(g.spec for g in self.host.guests().values() if g.spec.name == name)

    def settle(self) -> None:
        """Wait until the agent has worked off all that it knows of, and differs from nothing.

        Events make errands, errands make jobs, and jobs make all three: it is over when each was
        found at rest, one after the other, and nothing was added to any meanwhile.
        """
        eventually(self._is_settled, self._describe_unrest)

    def _is_settled(self) -> bool:
        before = self._made_so_far()
        self.host.events.drain()
        assert self.agent._lifecycle._errands.drain(DEADLINE_S), "the lifecycle is stuck"
        if any(j["state"] == "running" for j in self.agent.jobs(ROOT)):
            return False
        return not self.agent.drift(ROOT) and self._made_so_far() == before

    def _describe_unrest(self) -> str:
        running = [j["title"] for j in self.agent.jobs(ROOT) if j["state"] == "running"]
        return f"never settled: running {running}, drift {self.agent.drift(ROOT)}"

    def _made_so_far(self) -> tuple[int, int, list[str]]:
        jobs = [j["id"] for j in self.agent.jobs(ROOT)]
        return self.host.events.count, self.agent._lifecycle._errands.count, jobs

    def finish(self, job: str) -> dict[str, Any]:
        return wait_for_job(self.agent, job)

    def allocate(self, guest: str, **wants: str) -> dict[str, Any]:
        return self.finish(self.agent.allocate(ROOT, guest, wants)["job"])

    def guest(self, name: str) -> dict[str, Any]:
        return next(g for g in self.agent.guests(ROOT) if g["name"] == name)

    def live(self, name: str) -> Any:
        return next(g for g in self.host.read_guests().values() if g.name == name)

    def functions_of(self, name: str) -> list[str]:
        """What QEMU really has."""
        kernel = self.host.kernel(self.spec(name).uuid)
        return sorted(kernel.functions) if kernel else []

    def frozen(self) -> dict[str, Any]:
        """What is live, without process numbers: to compare before and after."""
        return {
            g.name: (
                g.state, g.vcpus_online, dict(g.vcpu_affinity), g.emulator_affinity,
                g.scheduler, g.memory_current, tuple(d.requested for d in g.virtio_mem),
                tuple(d.address for d in g.devices),
            )
            for g in self.host.read_guests().values()
        } | {
            f.address: (f.driver, f.settings) for f in self.host.devices.read_functions().values()
        }  # fmt: skip


def wait_for_job(agent: Agent, job: str) -> dict[str, Any]:
    ended = threading.Event()

    def listen(notice: Any) -> None:
        if notice.kind == "job.done" and notice.body["job"] == job:
            ended.set()

    stop = agent.subscribe(listen)
    try:
        if agent.job(ROOT, JobId(job))["state"] == "running":
            assert ended.wait(DEADLINE_S), agent.job(ROOT, JobId(job))
        return agent.job(ROOT, JobId(job))
    finally:
        stop()


def eventually(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    """Poll a condition that no event announces, with a deadline."""
    until = time.monotonic() + DEADLINE_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < until, what() if callable(what) else what
        tick.wait(0.005)


def world_fixture(**options: Any) -> Iterator[AgentWorld]:
    world = AgentWorld(**options).start()
    yield world
    world.close()
