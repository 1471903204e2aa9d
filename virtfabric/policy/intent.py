"""Intent: what one guest's live state should be under a layout, and how it differs from that.

Owns the translation of amounts and pCPUs into vCPUs, pins, cap, shares and memory. It must not
choose pCPUs (layout) or order steps (placement).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import CPU_KEY, CXL_KEY, MEMORY_KEY, Amounts
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.mark import MarkedPin, PinMark
from virtfabric.model.policy import DEFAULT_SHARES
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu
from virtfabric.policy.standing import WHOLE_CPU
from virtfabric.policy.tiers import part_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.policy.layout import Layout

UNCAPPED: Final = -1
LEAST_QUOTA: Final = 10
"""Milli-CPU: libvirt takes no quota below 1000 us, and 0 would mean uncapped
(https://libvirt.org/formatdomain.html#cpu-tuning, `global_quota`)."""
MEMORY_TOLERANCE: Final = {
    MemoryMechanism.VIRTIO_MEM: 4 * MIB,
    MemoryMechanism.BALLOON: MIB,
    MemoryMechanism.FIXED: 0,
}
"""Bytes by which memory may differ without being drift (virtio-mem may stick 4 MiB short)."""

_NOTHING: Final = Amounts()


@dataclass(frozen=True, slots=True)
class Intended:
    """A guest's live state as it should be.

    Attributes:
        vcpus: how many should be plugged.
        pins: one entry for each vCPU that is plugged now or should be.
        quota: milli-CPU, -1 uncapped.
        shares: policy shares (100 is the kernel's default).
        memory: bytes of DRAM visible to the guest; 0 where its memory is not ours to set.
        nodes: of a movable guest's memory, empty for any other guest.
        far_memory: bytes of CXL memory.
        cxl_nodes: the host's, by which its memory is told apart.
    """

    guest: GuestId
    vcpus: int
    pins: dict[int, CpuSet]
    emulator: CpuSet
    quota: int
    shares: int
    memory: Bytes
    nodes: CpuSet = CpuSet()
    far_memory: Bytes = Bytes(0)
    cxl_nodes: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as intended; both values in words."""

    what: str
    intended: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: {self.found} instead of {self.intended}"


def intended_state(
    snapshot: HostSnapshot, amounts: Mapping[GuestId, Amounts], layout: Layout, guest: GuestId
) -> Intended:
    """What a managed guest of the snapshot should look like when it holds these amounts.

    Raises:
        KeyError: the snapshot does not know the guest.
    """
    state = snapshot.guests[guest]
    held = amounts.get(guest, _NOTHING)
    cpu = held[CPU_KEY]
    order = layout.orders.get(guest, ())
    vcpus = min(state.vcpus_max, max(1, -(-cpu // WHOLE_CPU)))
    if order:
        vcpus = min(state.vcpus_max, len(order))
    # surplus vCPUs that cannot leave stay; pins and cap hold them to what the guest holds
    vcpus = max(vcpus, state.vcpus_kept)
    policy = state.policy
    fixed = state.mechanism is MemoryMechanism.FIXED
    return Intended(
        guest,
        vcpus,
        intended_pins(state, order, layout.pool, max(state.vcpus_online, vcpus)),
        layout.housekeeping,
        UNCAPPED if order else max(LEAST_QUOTA, cpu),
        policy.cpu.shares if policy else DEFAULT_SHARES,
        Bytes(0 if fixed else held[MEMORY_KEY]),
        layout.nodes.get(guest, CpuSet()),
        Bytes(held[CXL_KEY]),
        snapshot.topology.cxl_nodes,
    )


def intended_pins(
    state: GuestState, order: tuple[int, ...], pool: CpuSet, count: int
) -> dict[int, CpuSet]:
    """Pins of the first `count` vCPUs.

    A dedicated guest has one pCPU for each, and vCPUs beyond its holding are stacked on its own
    set; a shared guest floats on the pool, inside the operator's pins where these allow it.
    """
    around = CpuSet(order) if order else pool
    if not state.config_pins:
        if not order:
            return dict.fromkeys(range(count), around)
        seated = {v: CpuSet((cpu,)) for v, cpu in enumerate(order[:count])}
        return seated | dict.fromkeys(range(len(seated), count), around)
    pins = {}
    for vcpu in range(count):
        if vcpu < len(order):
            pins[vcpu] = CpuSet((order[vcpu],))
        else:
            pins[vcpu] = CpuSet(around & state.config_pins.get(vcpu, around)) or around
    return pins


def intended_mark(
    state: GuestState, pins: Mapping[int, CpuSet], emulator: CpuSet, everywhere: CpuSet
) -> PinMark:
    """Which of these pins are ours to mark, once they are live.

    Not the operator's own, and none where the guest is not pinned and need not be.
    """
    marked = []
    for vcpu, cpus in sorted(pins.items()):
        instead = state.config_pins.get(vcpu, CpuSet())
        # one that is plugged later is pinned in any case
        unpinned = vcpu < state.vcpus_online and not state.vcpu_affinity.get(vcpu)
        if cpus != instead and not (unpinned and cpus == everywhere):
            marked.append(MarkedPin(vcpu, cpus, instead))
    if emulator and (state.emulator_affinity or emulator != everywhere):
        marked.append(MarkedPin(None, emulator))
    return PinMark(tuple(marked))


def quota_of(state: GuestState) -> int:
    """The live cap of a guest in milli-CPU, -1 for none."""
    scheduler = state.scheduler
    if scheduler.global_quota <= 0 or scheduler.global_period <= 0:
        return UNCAPPED
    return round(scheduler.global_quota * WHOLE_CPU / scheduler.global_period)


def shares_of(state: GuestState) -> int:
    """The live shares of a guest in policy shares."""
    shares = state.scheduler.shares
    return DEFAULT_SHARES if shares is None else shares


def differences(intended: Intended, state: GuestState) -> list[Difference]:
    """What was found other than intended; empty when all is well."""
    found = [
        Difference(f"vcpu {vcpu} affinity", str(cpus), str(state.vcpu_affinity[vcpu]) or "any")
        for vcpu, cpus in intended.pins.items()
        if vcpu in state.vcpu_affinity and state.vcpu_affinity[vcpu] != cpus
    ]
    if state.vcpus_online != intended.vcpus:
        found.append(Difference("vcpus", str(intended.vcpus), str(state.vcpus_online)))
    if quota_of(state) != intended.quota:
        found.append(Difference("quota", _cap(intended.quota), _cap(quota_of(state))))
    if shares_of(state) != intended.shares:
        found.append(Difference("shares", str(intended.shares), str(shares_of(state))))
    found += _memory_differences(intended, state)
    if state.emulator_affinity != intended.emulator:
        found.append(
            Difference("emulator", str(intended.emulator), str(state.emulator_affinity) or "any")
        )
    if intended.nodes and state.numa_nodes != intended.nodes:
        found.append(Difference("nodes", str(intended.nodes), str(state.numa_nodes) or "any"))
    return found


def _memory_differences(intended: Intended, state: GuestState) -> list[Difference]:
    found = []
    if intended.memory and memory_differs(intended, state):
        near = part_of(state, MEMORY_KEY, intended.cxl_nodes)
        found.append(Difference("memory", str(intended.memory), str(Bytes(near.current))))
    if far_memory_differs(intended, state):
        far = part_of(state, CXL_KEY, intended.cxl_nodes)
        wanted, now = str(intended.far_memory), str(Bytes(far.current))
        found.append(Difference(CXL_KEY.words, wanted, now))
    return found


def memory_differs(intended: Intended, state: GuestState) -> bool:
    """Whether the guest's DRAM is off by more than its mechanism's tolerance."""
    near = part_of(state, MEMORY_KEY, intended.cxl_nodes)
    return abs(near.current - intended.memory) > MEMORY_TOLERANCE[state.mechanism]


def far_memory_differs(intended: Intended, state: GuestState) -> bool:
    """As `memory_differs`, of its CXL memory."""
    far = part_of(state, CXL_KEY, intended.cxl_nodes)
    return abs(far.current - intended.far_memory) > MEMORY_TOLERANCE[MemoryMechanism.VIRTIO_MEM]


def _cap(quota: int) -> str:
    return "none" if quota < 0 else f"{MilliCpu(quota)} CPU"
