"""A guest as libvirt, QEMU and the kernel show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from virtfabric.model.mark import NO_MARK, PinMark
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from virtfabric.model.device import GuestDevice
    from virtfabric.model.ids import GuestId
    from virtfabric.model.policy import GuestPolicy


class RunState(StrEnum):
    """A guest's life, as far as a decision needs it."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"


class MemoryMechanism(StrEnum):
    """How a guest's memory changes while it runs; never two on one guest."""

    VIRTIO_MEM = "virtio-mem"
    BALLOON = "balloon"
    FIXED = "fixed"


class NumaMode(StrEnum):
    """libvirt's `<numatune><memory mode>`."""

    STRICT = "strict"
    PREFERRED = "preferred"
    INTERLEAVE = "interleave"
    RESTRICTIVE = "restrictive"


SMALL_PAGES: Final = Bytes(0)
"""Of memory that needs no huge pages. None, in the same place, is the host's default huge size."""


@dataclass(frozen=True, slots=True)
class VirtioMem:
    """One virtio-mem device; sizes in bytes. `current` is what the guest really has.

    Attributes:
        node: the guest's cell that it belongs to.
        host_nodes: nodes of the host that its `<source>` names; empty: it follows the guest.
        page: bytes of the huge pages that back it; see `SMALL_PAGES`.
    """

    alias: str
    node: int
    size: Bytes
    block: Bytes
    requested: Bytes
    current: Bytes
    host_nodes: CpuSet = CpuSet()
    page: Bytes | None = SMALL_PAGES


@dataclass(frozen=True, slots=True)
class FixedMemory:
    """Memory that a guest has and this agent cannot take: a cell that it boots with, or a DIMM.

    Attributes:
        what: `cell 0`, `dimm dimm0`; for people.
        host_nodes: nodes of the host that it is bound to by itself; empty: it follows the guest.
        page: bytes of the huge pages that back it; see `SMALL_PAGES`.
    """

    what: str
    size: Bytes
    host_nodes: CpuSet = CpuSet()
    page: Bytes | None = SMALL_PAGES


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """What of memory devices can still be added to a running guest.

    Attributes:
        slots: of `<maxMemory slots>` that no device has.
        size: bytes up to `<maxMemory>`, by the sizes of the devices that are there.
        cell: the guest's cell that they go to: the last one without vCPUs, else the first.
            None for a guest without cells, which can have no memory device.
        page: bytes of the huge pages that back a device of that cell; see `SMALL_PAGES`.
    """

    slots: int = 0
    size: Bytes = Bytes(0)
    cell: int | None = None
    page: Bytes | None = SMALL_PAGES


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """Live `<cputune>`. `shares` None: the kernel's default; quotas in us, -1 unlimited."""

    shares: int | None = None
    global_period: int = 100_000
    global_quota: int = -1


@dataclass(frozen=True, slots=True)
class GuestState:
    """A guest at one moment.

    Attributes:
        pid: QEMU's process id, None when not running.
        vcpus_max: maximum of vCPUs declared.
        vcpus_online: how many are plugged now.
        vcpu_threads: kernel thread id by vCPU number, online ones.
        vcpu_affinity: live pin by vCPU number, online ones (what libvirt says).
        emulator_affinity: live emulator pin (what libvirt says).
        boot_memory: bytes present without virtio-mem (`<memory>` less the devices).
        memory_current: bytes the guest has now: boot memory or balloon, plus virtio-mem current.
        memory_max: bytes it could have at most with its mechanism.
        config_pins: vCPU number -> pCPUs from the persistent definition's `<vcpupin>`: a
            constraint for placement, the operator's hand.
        numa_mode, numa_nodes: live `<numatune>`, None and empty when not given.
        config_numa_nodes: nodes named in the persistent definition.
        job: name of the job running on it ("backup", "migration-out"), None when free.
        policy: None for an unmanaged guest.
        policy_error: why its policy metadata is invalid; the guest is unmanaged then.
        policy_text, config_policy_text: the metadata as it stands in the live and in the
            persistent definition, valid or not, without namespace and indentation; empty
            where there is none.
        vcpu_unplug: whether a vCPU may be taken away. False under TCG: with QEMU 7.2 any plug
            after an unplug corrupts QEMU's heap and kills the guest (measured, 5 of 5), so surplus
            vCPUs stay and share what the guest holds.
        vcpus_boot: how many QEMU was started with; these cannot be unplugged.
        devices, config_devices: `<hostdev>` PCI functions of the live and of the persistent
            definition.
        free_ports: PCIe root ports (or switch ports) of the live machine with nothing behind them:
            how many functions can still be attached.
        halted: whether it is paused by an error of QEMU or of a device, not by anybody's wish.
        locked_memory: whether `<memoryBacking><locked/>` pins all of it.
        marked_pins: which of the live pins this agent set, by the mark in the live metadata.
        fixed_memory: what `boot_memory` is made of; empty where that is not known in parts.
        memory_room: for memory devices that come while it runs.
    """

    uuid: GuestId
    name: str
    state: RunState
    pid: int | None = None
    vcpus_max: int = 1
    vcpus_online: int = 1
    vcpu_threads: dict[int, int] = field(default_factory=dict)
    vcpu_affinity: dict[int, CpuSet] = field(default_factory=dict)
    emulator_affinity: CpuSet = CpuSet()
    scheduler: SchedulerState = SchedulerState()
    boot_memory: Bytes = Bytes(0)
    memory_current: Bytes = Bytes(0)
    memory_max: Bytes = Bytes(0)
    mechanism: MemoryMechanism = MemoryMechanism.FIXED
    virtio_mem: tuple[VirtioMem, ...] = ()
    config_pins: dict[int, CpuSet] = field(default_factory=dict)
    numa_mode: NumaMode | None = None
    numa_nodes: CpuSet = CpuSet()
    config_numa_nodes: CpuSet = CpuSet()
    job: str | None = None
    persistent: bool = True
    vcpu_unplug: bool = True
    vcpus_boot: int = 1
    policy: GuestPolicy | None = None
    policy_error: str = ""
    marked_pins: PinMark = NO_MARK
    policy_text: str = ""
    config_policy_text: str = ""
    devices: tuple[GuestDevice, ...] = ()
    config_devices: tuple[GuestDevice, ...] = ()
    free_ports: int = 0
    locked_memory: bool = False
    halted: bool = False
    fixed_memory: tuple[FixedMemory, ...] = ()
    memory_room: MemoryRoom = MemoryRoom()

    @property
    def managed(self) -> bool:
        """Whether the agent may touch it."""
        return self.policy is not None

    @property
    def vcpus_kept(self) -> int:
        """vCPUs that stay plugged whoever asks."""
        return min(self.vcpus_boot, self.vcpus_online) if self.vcpu_unplug else self.vcpus_online

    @property
    def on_huge_pages(self) -> bool:
        """Whether huge pages back any of its memory."""
        return any(part.page != SMALL_PAGES for part in self.fixed_memory) or any(
            device.page != SMALL_PAGES for device in self.virtio_mem
        )

    @property
    def active(self) -> bool:
        """Whether it has a QEMU process."""
        return self.state is not RunState.SHUTOFF

    @property
    def detained(self) -> bool:
        """Whether libvirt's job on it bars changes: each call would wait 30 s for it, then fail.

        A backup does not: pins and vCPUs change meanwhile (measured, libvirt 9.0).
        """
        return self.job is not None and self.job != "backup"
