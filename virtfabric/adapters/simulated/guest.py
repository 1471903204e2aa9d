"""One simulated guest: what it is defined as, what libvirt says of it, what the kernel shows.

The two last are kept apart, so that a check against the kernel can fail where libvirt says yes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Final

from virtfabric.domxml.policy import format_bare_policy, parse_bare_policy
from virtfabric.model.device import GuestDevice
from virtfabric.model.guest import (
    SMALL_PAGES,
    FixedMemory,
    GuestState,
    MemoryMechanism,
    MemoryRoom,
    NumaMode,
    RunState,
    SchedulerState,
    VirtioMem,
)
from virtfabric.model.hugepages import PoolKey
from virtfabric.model.mark import NO_MARK, PinMark
from virtfabric.model.units import MIB, Bytes, CpuSet

if TYPE_CHECKING:
    from virtfabric.model.device import PciAddress
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy

PERIOD_US: Final = 100_000
"""libvirt's default period of quotas, microseconds."""

_NOTHING: Final = Bytes(0)
_BLOCK: Final = Bytes(2 * MIB)
_BOOT_MEMORY: Final = Bytes(256 * MIB)
_ANY_NODE: Final = CpuSet()
_NO_ROOM: Final = MemoryRoom()


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A virtio-mem device as defined; `initial` is requested at start.

    `node` is the guest's cell, and the host's node where `host_nodes` is empty.
    """

    alias: str
    node: int
    size: Bytes
    initial: Bytes = _NOTHING
    block: Bytes = _BLOCK
    host_nodes: CpuSet = _ANY_NODE

    @property
    def home(self) -> int:
        """The host's node that its memory comes from."""
        return min(self.host_nodes, default=self.node)


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """A guest's definition (libvirt's CONFIG).

    Attributes:
        boot_memory: bytes without memory devices; a balloon's maximum.
        devices: makes it a virtio-mem guest.
        balloon: whether memory moves by balloon; never together with devices.
        config_pins: vCPU number -> pCPUs, pinned by the operator.
        functions: PCI functions that its definition names by hand.
        ports: PCIe ports for devices that come while it runs.
        memory_room: slots and bytes for memory devices that come while it runs.
        page: bytes of the huge pages that back all of its memory; 0 for small ones.
    """

    uuid: GuestId
    name: str
    vcpus: int = 1
    vcpus_max: int = 1
    boot_memory: Bytes = _BOOT_MEMORY
    devices: tuple[MemoryDevice, ...] = ()
    balloon: bool = False
    policy: GuestPolicy | None = None
    policy_error: str = ""
    config_pins: dict[int, CpuSet] = field(default_factory=dict)
    numa_mode: NumaMode | None = None
    numa_nodes: CpuSet = _ANY_NODE
    functions: tuple[GuestDevice, ...] = ()
    ports: int = 4
    memory_room: MemoryRoom = _NO_ROOM
    locked_memory: bool = False
    persistent: bool = True
    running: bool = True
    page: Bytes = SMALL_PAGES

    @property
    def mechanism(self) -> MemoryMechanism:
        """How its memory changes."""
        if self.devices:
            return MemoryMechanism.VIRTIO_MEM
        return MemoryMechanism.BALLOON if self.balloon else MemoryMechanism.FIXED


@dataclass
class Hardware:
    """What can be changed under a running guest.

    Attributes:
        quota_us: the whole guest's, -1 for none.
        policy: metadata of the live definition, as text.
        functions: PCI functions that came while it runs, with their aliases.
        came: memory devices that came while it runs.
        gone: aliases of those that it is defined with and let go while it runs.
        dimms: DIMMs that came while it runs.
    """

    vcpus: int
    affinity: dict[int, CpuSet]
    emulator: CpuSet
    boot_memory: int
    devices: dict[str, int]
    nodes: CpuSet
    quota_us: int = -1
    shares: int | None = None
    mark: PinMark = NO_MARK
    policy: str = ""
    functions: dict[PciAddress, str] = field(default_factory=dict)
    came: tuple[MemoryDevice, ...] = ()
    gone: frozenset[str] = frozenset()
    dimms: tuple[FixedMemory, ...] = ()

    def copy(self) -> Hardware:
        """An independent copy."""
        return replace(
            self,
            affinity=dict(self.affinity),
            devices=dict(self.devices),
            functions=dict(self.functions),
        )

    @property
    def memory(self) -> int:
        """Bytes in all."""
        dimms = sum(dimm.size for dimm in self.dimms)
        return self.boot_memory + dimms + sum(self.devices.values())


class SimulatedGuest:
    """A defined guest; not thread-safe, its host locks.

    Attributes:
        unplugging: functions that it was asked to let go and has not yet.
        halted: paused by an error, not by anybody.
    """

    def __init__(self, spec: GuestSpec, cpus: CpuSet) -> None:
        self.spec = spec
        self.state = RunState.SHUTOFF
        self.pid: int | None = None
        self.job: str | None = None
        self.unplugging: set[PciAddress] = set()
        self.halted = False
        self._cpus = cpus
        self.said = self._fresh()
        self.real = self._fresh()

    def start(self, pid: int) -> None:
        """Everything as defined again, under a new process."""
        self.pid = pid
        self.state = RunState.RUNNING
        self.said, self.real = self._fresh(), self._fresh()

    def stop(self) -> None:
        """No process, no job."""
        self.pid = self.job = None
        self.unplugging.clear()
        self.halted = False
        self.state = RunState.SHUTOFF
        self.said, self.real = self._fresh(), self._fresh()

    def default_affinity(self, vcpu: int) -> CpuSet:
        """Where a vCPU runs that nobody pinned live."""
        return self.spec.config_pins.get(vcpu, self._cpus)

    def plug(self, count: int, *, lost: bool = False) -> None:
        """Bring the vCPUs online to a count; new ones have a new thread with default affinity."""
        for hardware in (self.said,) if lost else (self.said, self.real):
            hardware.vcpus = count
            for vcpu in range(max(count, len(hardware.affinity))):
                if vcpu >= count:
                    hardware.affinity.pop(vcpu, None)
                else:
                    hardware.affinity.setdefault(vcpu, self.default_affinity(vcpu))

    def device(self, alias: str) -> MemoryDevice | None:
        """The device of this alias."""
        return next((d for d in self.memory_devices if d.alias == alias), None)

    @property
    def memory_devices(self) -> tuple[MemoryDevice, ...]:
        """Those that it is defined with and still has, and those that came."""
        kept = (d for d in self.spec.devices if d.alias not in self.real.gone)
        return (*kept, *self.real.came)

    @property
    def free_ports(self) -> int:
        """How many functions can still come."""
        return self.spec.ports - len(self.real.functions) - len(self.real.came)

    @property
    def memory_room(self) -> MemoryRoom:
        """For memory devices that can still come."""
        room = self.spec.memory_room
        came = [d.size for d in self.real.came] + [d.size for d in self.real.dimms]
        left = [d.size for d in self.spec.devices if d.alias in self.real.gone]
        size = Bytes(room.size - sum(came) + sum(left))
        return replace(room, slots=room.slots - len(came) + len(left), size=size)

    def _devices(self) -> tuple[GuestDevice, ...]:
        came = tuple(GuestDevice(a, alias) for a, alias in sorted(self.said.functions.items()))
        return (*self.spec.functions, *came)

    def nodes_used(self, first_node: int) -> dict[int, int]:
        """Bytes taken on each node; what is on huge pages is in the pools'."""
        if self.state is RunState.SHUTOFF or self.spec.page:
            return {}
        return self._nodes_of(self.real, first_node)

    def pages_used(self, first_node: int) -> dict[PoolKey, int]:
        """Huge pages taken of each pool."""
        if self.state is RunState.SHUTOFF or not self.spec.page:
            return {}
        return self._pages_of(self._nodes_of(self.real, first_node))

    def pages_wanted(self, first_node: int) -> dict[PoolKey, int]:
        """Huge pages that its start takes."""
        if not self.spec.page:
            return {}
        return self._pages_of(self._nodes_of(self._fresh(), first_node))

    def _pages_of(self, used: dict[int, int]) -> dict[PoolKey, int]:
        page = int(self.spec.page)
        return {PoolKey(node, page): -(-size // page) for node, size in used.items() if size}

    def _nodes_of(self, hardware: Hardware, first_node: int) -> dict[int, int]:
        home = min(hardware.nodes, default=first_node)
        used = {home: hardware.boot_memory}
        for device in (*self.spec.devices, *hardware.came):
            used[device.home] = used.get(device.home, 0) + hardware.devices.get(device.alias, 0)
        for dimm in hardware.dimms:
            home = min(dimm.host_nodes)
            used[home] = used.get(home, 0) + int(dimm.size)
        return used

    def read(self) -> GuestState:
        """As libvirt describes it. `scheduler.shares` are policy shares (100 is the default)."""
        spec, said, real = self.spec, self.said, self.real
        active = self.state is not RunState.SHUTOFF
        plugged = sum(dimm.size for dimm in real.dimms)
        return GuestState(
            uuid=spec.uuid,
            name=spec.name,
            state=self.state,
            pid=self.pid,
            vcpus_max=spec.vcpus_max,
            vcpus_online=real.vcpus if active else spec.vcpus,
            vcpu_threads={v: (self.pid or 0) + 1 + v for v in real.affinity} if active else {},
            vcpu_affinity={v: said.affinity.get(v, self._cpus) for v in real.affinity}
            if active
            else {},
            emulator_affinity=said.emulator if active else CpuSet(),
            scheduler=SchedulerState(said.shares, PERIOD_US, said.quota_us),
            boot_memory=Bytes(spec.boot_memory + plugged),
            memory_current=Bytes(real.memory),
            memory_max=Bytes(
                spec.boot_memory + plugged + sum(d.size for d in self.memory_devices)
            ),
            mechanism=MemoryMechanism.VIRTIO_MEM if said.came else spec.mechanism,
            virtio_mem=tuple(
                VirtioMem(
                    d.alias, d.node, d.size, d.block,
                    Bytes(said.devices.get(d.alias, 0)), Bytes(real.devices[d.alias]),
                    d.host_nodes, spec.page,
                )
                for d in self.memory_devices
            ),
            config_pins=dict(spec.config_pins),
            numa_mode=spec.numa_mode,
            numa_nodes=said.nodes,
            config_numa_nodes=spec.numa_nodes,
            job=self.job,
            persistent=spec.persistent,
            policy=read_policy(said.policy) if active else spec.policy,
            policy_error=spec.policy_error,
            marked_pins=said.mark,
            policy_text=said.policy if active else write_policy(spec.policy),
            config_policy_text=write_policy(spec.policy) if spec.persistent else "",
            devices=self._devices(),
            config_devices=spec.functions if spec.persistent else (),
            free_ports=self.free_ports,
            locked_memory=spec.locked_memory,
            halted=self.halted,
            fixed_memory=(
                FixedMemory("cell 0", spec.boot_memory, page=spec.page),
                *said.dimms,
            )
            if spec.page or said.dimms
            else (),
            memory_room=replace(self.memory_room, page=spec.page),
        )  # fmt: skip

    def _fresh(self) -> Hardware:
        return Hardware(
            vcpus=self.spec.vcpus,
            affinity={v: self.default_affinity(v) for v in range(self.spec.vcpus)},
            emulator=self._cpus,
            boot_memory=int(self.spec.boot_memory),
            devices={d.alias: int(d.initial) for d in self.spec.devices},
            nodes=self.spec.numa_nodes,
            policy=write_policy(self.spec.policy),
        )


@cache
def write_policy(policy: GuestPolicy | None) -> str:
    """A policy as metadata."""
    return "" if policy is None else format_bare_policy(policy)


@cache
def read_policy(text: str) -> GuestPolicy | None:
    """A policy from metadata."""
    return parse_bare_policy(text) if text else None
