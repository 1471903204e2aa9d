"""Where each guest stands: what it holds, its floor, its ceiling, what it costs the host.

Owns the rules for one guest and one resource class, and the sum of what is free. Who has to pay
for whom is the arbiter's business; which pCPUs and nodes it is, placement's. Inner loops work on
plain integers (milli-CPU, bytes): with 1,000 guests `Amounts` are too slow there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.policy import GuestPolicy, Placement
from virtfabric.model.units import MIB

if TYPE_CHECKING:
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.units import CpuSet

CPU_KEY: Final = Key(CPU)
MEMORY_KEY: Final = Key(MEMORY)
KEYS: Final = (CPU_KEY, MEMORY_KEY)
"""Every coordinate that has rules here, in the order in which decisions treat them."""

WHOLE_CPU: Final = 1000
LEAST_CPU: Final = 100
"""Milli-CPU that a shared guest always keeps, so that it still answers (agent, watchdog, SSH).

libvirt takes no quota below 1000 us of a 100000 us period, 10 milli-CPU
(https://libvirt.org/formatdomain.html#cpu-tuning); a guest at that minimum misses its timers.
"""
LEAST_BALLOONED: Final = 64 * MIB
"""Bytes that a balloon guest always keeps: what a small Linux needs to boot. Inflating past what
the guest can free ends in its OOM killer."""
BALLOON_STEP: Final = MIB
"""Bytes; `setMemory` counts KiB, the step's tolerance is 1 MiB."""
VIRTIO_MEM_BLOCK: Final = 2 * MIB
"""Bytes; the block size of a virtio-mem device on x86 with 4 KiB or 2 MiB pages."""

_NO_POLICY: Final = GuestPolicy()


class Line(NamedTuple):
    """One managed guest's standing for one resource, in its unit (milli-CPU or bytes).

    Attributes:
        held: of its holding; 0 when it has none.
        granule, origin: amounts are `origin` plus a multiple of `granule`.
        prepaid: growing up to the ceiling costs nothing, it is counted as used already (a balloon
            guest whose memory is not lent).
    """

    held: int
    floor: int
    ceiling: int
    granule: int
    shares: int
    origin: int = 0
    prepaid: bool = False

    @property
    def slack(self) -> int:
        """What could be given up, in whole granules."""
        return max(0, self.held - self.floor) // self.granule * self.granule

    def round_down(self, amount: int) -> int:
        """The highest amount it can hold up to this one."""
        return self.origin + (amount - self.origin) // self.granule * self.granule

    def round_up(self, amount: int) -> int:
        """The lowest amount it can hold from this one on."""
        return self.origin - (self.origin - amount) // self.granule * self.granule


def is_dedicated(guest: GuestState) -> bool:
    """Whether its CPU counts in whole pCPUs."""
    return guest.policy is not None and guest.policy.cpu.placement is Placement.DEDICATED


def held_of(snapshot: HostSnapshot, guest: GuestId) -> Amounts:
    """What the books say that it holds; nothing when it has no holding."""
    holding = snapshot.books.holdings.get(guest)
    return holding.amounts if holding else Amounts()


def line_of(guest: GuestState, key: Key, snapshot: HostSnapshot) -> Line:
    """A guest's standing for one of `KEYS`."""
    policy = guest.policy or _NO_POLICY
    holding = snapshot.books.holdings.get(guest.uuid)
    held = holding.amounts[key] if holding else 0
    if key.resource == CPU:
        floor, ceiling = _cpu_bounds(guest, policy)
        granule = WHOLE_CPU if policy.cpu.placement is Placement.DEDICATED else 1
        return Line(held, floor, ceiling, granule, policy.cpu.shares)
    lends = snapshot.lend_ballooned
    floor, ceiling = _memory_bounds(guest, policy, lends=lends)
    if guest.mechanism is MemoryMechanism.VIRTIO_MEM:
        granule, origin = _block_of(guest), int(guest.boot_memory)
    else:
        granule, origin = BALLOON_STEP, held % BALLOON_STEP
    prepaid = guest.mechanism is MemoryMechanism.BALLOON and not lends
    return Line(held, floor, ceiling, granule, policy.memory.shares, origin, prepaid)


def floor_of(guest: GuestState, snapshot: HostSnapshot) -> Amounts:
    """What nobody can take from it: its reservation, or more where its mechanism cannot go there.

    CPU: the reservation, for a dedicated guest in whole CPUs and at least one, for a shared one at
    least `LEAST_CPU`; never more than its vCPUs can use. Memory: boot memory with virtio-mem; all
    of it with a fixed size, or with a balloon that may not be lent from.
    """
    return Amounts({key: line_of(guest, key, snapshot).floor for key in KEYS})


def ceiling_of(guest: GuestState, snapshot: HostSnapshot) -> Amounts:
    """What it can hold at most: its limit, or less where vCPUs or memory slots end before.

    Never below its floor. CPU of a dedicated guest is rounded down to whole CPUs.
    """
    return Amounts({key: line_of(guest, key, snapshot).ceiling for key in KEYS})


def _cpu_bounds(guest: GuestState, policy: GuestPolicy) -> tuple[int, int]:
    most = max(1, guest.vcpus_max) * WHOLE_CPU
    limit = policy.cpu.limit
    ceiling = most if limit is None else min(int(limit), most)
    floor = int(policy.cpu.reservation)
    if policy.cpu.placement is Placement.DEDICATED:
        ceiling = ceiling // WHOLE_CPU * WHOLE_CPU
        floor = max(WHOLE_CPU, -(-floor // WHOLE_CPU) * WHOLE_CPU)
    floor = min(max(floor, LEAST_CPU), most)
    return floor, max(floor, ceiling)


def _memory_bounds(guest: GuestState, policy: GuestPolicy, *, lends: bool) -> tuple[int, int]:
    most, reservation = int(guest.memory_max), int(policy.memory.reservation)
    limit = most if policy.memory.limit is None else min(int(policy.memory.limit), most)
    match guest.mechanism:
        case MemoryMechanism.FIXED:
            floor = limit = max(most, int(guest.memory_current))
        case MemoryMechanism.VIRTIO_MEM:
            boot, block = int(guest.boot_memory), _block_of(guest)
            blocks = -(-max(0, min(reservation, most) - boot) // block)
            floor = boot + min(blocks, max(0, most - boot) // block) * block
            limit = boot + max(0, limit - boot) // block * block
        case MemoryMechanism.BALLOON:
            floor = min(max(reservation, LEAST_BALLOONED), most) if lends else most
    return floor, max(floor, limit)


def _block_of(guest: GuestState) -> int:
    return max((int(device.block) for device in guest.virtio_mem), default=0) or VIRTIO_MEM_BLOCK


def charge_of(guest: GuestState, held: Amounts | None, snapshot: HostSnapshot) -> Amounts:
    """What a guest costs of the capacity when it holds this much.

    Args:
        guest: an active or a starting guest.
        held: None for a guest without a holding. An unmanaged one counts with all the memory it
            can reach and with the part of its vCPUs' time that can fall on managed pCPUs; one
            that was not taken over yet, with its floor and the memory it has.
        snapshot: for the capacity.
    """
    cpu, memory = _charge(guest, held, snapshot)
    return Amounts.of(cpu=cpu, memory=memory)


def _charge(guest: GuestState, held: Amounts | None, snapshot: HostSnapshot) -> tuple[int, int]:
    overhead = int(snapshot.capacity.overhead)
    if held is None and guest.policy is not None:
        # Managed, but not taken over yet (several run when the agent starts): it is owed its
        # floor, and has its memory; counting more would leave no room for the first one's grant.
        floor = floor_of(guest, snapshot)
        held = floor.with_value(MEMORY_KEY, max(floor[MEMORY_KEY], int(guest.memory_current)))
    if held is None:
        memory = max(int(guest.memory_max), int(guest.memory_current))
        return _stray_cpu(guest, snapshot.capacity, snapshot.topology.cpus), memory + overhead
    memory = held[MEMORY_KEY]
    match guest.mechanism:
        case MemoryMechanism.VIRTIO_MEM:
            pass
        case MemoryMechanism.BALLOON:
            # Nothing but the guest's goodwill keeps a ballooned page away from it.
            memory = memory if snapshot.lend_ballooned else max(memory, int(guest.memory_max))
        case MemoryMechanism.FIXED:
            memory = max(memory, int(guest.memory_max))
    return held[CPU_KEY], memory + overhead


def _stray_cpu(guest: GuestState, capacity: Capacity, everywhere: CpuSet) -> int:
    """Milli-CPU of managed pCPUs that the vCPUs of a guest without a holding may use."""
    alike: dict[frozenset[int], int] = {}
    for affinity in guest.vcpu_affinity.values():
        where = affinity or everywhere
        alike[where] = alike.get(where, 0) + 1
    known = sum(alike.values())
    if guest.vcpus_online > known:
        alike[everywhere] = alike.get(everywhere, 0) + guest.vcpus_online - known
    return sum(
        -(-count * WHOLE_CPU * len(where & capacity.cpus) // max(1, len(where)))
        for where, count in alike.items()
    )


def capacity_of(snapshot: HostSnapshot) -> Amounts:
    """What may be granted in all."""
    capacity = snapshot.capacity
    return Amounts.of(cpu=len(capacity.cpus) * WHOLE_CPU, memory=int(capacity.grantable_memory))


def free(snapshot: HostSnapshot, *, without: GuestId | None = None) -> Amounts:
    """Capacity less everything in use; below zero when the host is overcommitted.

    In use are the charges of all guests that are active or have a holding already, what running
    plans have reserved, and memory residues (a vCPU residue costs nothing: quota and pins hold it).

    Args:
        snapshot: the host.
        without: a guest that is left out (one that starts now and is counted by the caller).
    """
    books = snapshot.books
    cpu = memory = 0
    for uuid, guest in snapshot.guests.items():
        holding = books.holdings.get(uuid)
        if uuid == without or (holding is None and not guest.active):
            continue
        # A guest whose policy was cleared is bound by its old holding no more.
        stray = holding is None or (guest.active and not guest.managed)
        charge = _charge(guest, None if stray or holding is None else holding.amounts, snapshot)
        cpu += charge[0]
        memory += charge[1]
    for uuid, holding in books.holdings.items():
        if uuid not in snapshot.guests and uuid != without:
            cpu += holding.amounts[CPU_KEY]
            memory += holding.amounts[MEMORY_KEY] + int(snapshot.capacity.overhead)
    memory += sum(r.amount for r in books.residues if r.what == "memory" and r.guest != without)
    return capacity_of(snapshot) - Amounts.of(cpu=cpu, memory=memory) - snapshot.pending
