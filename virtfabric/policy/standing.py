"""Where each guest stands: what it holds, its floor, its ceiling, what it costs the host.

Owns the rules for one guest and one resource class, and the sum of what is free. Who has to pay
for whom is the arbiter's business; which pCPUs and nodes it is, placement's. Inner loops work on
plain integers (milli-CPU, bytes): with 1,000 guests `Amounts` are too slow there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.amounts import CPU, CPU_KEY, CXL_KEY, MEMORY, MEMORY_KEY, Amounts, Key, Tier
from virtfabric.model.capability import device_key
from virtfabric.model.guest import MemoryMechanism, RunState
from virtfabric.model.policy import GuestPolicy, Placement
from virtfabric.model.units import MIB
from virtfabric.policy.deviceterms import device_bounds
from virtfabric.policy.stock import Stock, device_amounts
from virtfabric.policy.tiers import Part, block_of, part_of, used_nodes
from virtfabric.policy.tierterms import NEW_BLOCK, addable, may_have, new_block

if TYPE_CHECKING:
    from virtfabric.model.guest import GuestState
    from virtfabric.model.host import Capacity
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.units import CpuSet

KEYS: Final = (CPU_KEY, MEMORY_KEY)
"""The coordinates that every guest has, in the order in which decisions treat them; those that
count CXL memory, and functions by capability, follow."""

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

# Names for the inner loops: looking a member up on its enum costs as much as the comparison.
_SHUTOFF: Final = RunState.SHUTOFF
_VIRTIO_MEM: Final = MemoryMechanism.VIRTIO_MEM
_BALLOON: Final = MemoryMechanism.BALLOON
_DEDICATED: Final = Placement.DEDICATED


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
    return guest.policy is not None and guest.policy.cpu.placement is _DEDICATED


def held_of(snapshot: HostSnapshot, guest: GuestId) -> Amounts:
    """What the books say that it holds; nothing when it has no holding."""
    holding = snapshot.books.holdings.get(guest)
    return holding.amounts if holding else Amounts()


def line_of(guest: GuestState, key: Key, snapshot: HostSnapshot) -> Line:
    """A guest's standing for one coordinate."""
    amounts = held_of(snapshot, guest.uuid)
    held = amounts[key]
    policy, lends = guest.policy or _NO_POLICY, snapshot.lend_ballooned
    if key.resource == CPU:
        return Line(held, *cpu_bounds(guest), policy.cpu.shares, 0, prepaid=False)
    if key.resource != MEMORY:
        return Line(held, *device_bounds(guest, key, held, snapshot), 1, 1)
    part = part_of(guest, key, snapshot.topology.cxl_nodes)
    if key == CXL_KEY:
        more, block = addable(guest, snapshot), new_block(guest, snapshot)
        bounds = far_bounds(guest, part, besides=amounts[MEMORY_KEY], addable=more, new_block=block)
        return Line(held, *bounds, policy.memory.shares, part.boot)
    virtio, balloon = guest.mechanism is _VIRTIO_MEM, guest.mechanism is _BALLOON
    return Line(
        held,
        *memory_bounds(guest, part, lends=lends, besides=amounts[CXL_KEY]),
        policy.memory.shares,
        part.boot if virtio else held % BALLOON_STEP,
        prepaid=balloon and not lends,
    )


def cpu_bounds(guest: GuestState) -> tuple[int, int, int]:
    """Floor, ceiling and granule of CPU."""
    policy = (guest.policy or _NO_POLICY).cpu
    most = (guest.vcpus_max or 1) * WHOLE_CPU
    ceiling, floor = most, int(policy.reservation)
    if policy.limit is not None and policy.limit < most:
        ceiling = int(policy.limit)
    granule = 1
    if policy.placement is _DEDICATED:
        granule = WHOLE_CPU
        ceiling = ceiling // WHOLE_CPU * WHOLE_CPU
        floor = -(-floor // WHOLE_CPU) * WHOLE_CPU or WHOLE_CPU
    elif floor < LEAST_CPU:
        floor = LEAST_CPU
    if floor > most:
        floor = most
    return floor, ceiling if ceiling > floor else floor, granule


def memory_bounds(
    guest: GuestState, part: Part, *, lends: bool, besides: int = 0
) -> tuple[int, int, int]:
    """Floor, ceiling and granule of DRAM.

    Args:
        guest: with its policy.
        part: what it has of DRAM.
        lends: whether what a balloon takes may be granted onward.
        besides: what it holds of other tiers: the limit is of all together.
    """
    policy = (guest.policy or _NO_POLICY).memory
    most, limit = part.most, policy.limit
    ceiling = most if limit is None else min(most, limit - besides)
    if guest.mechanism is _VIRTIO_MEM:
        floor, granule = part.boot, block_of(part.devices, VIRTIO_MEM_BLOCK)
        ceiling = floor + (ceiling - floor) // granule * granule
        if policy.reservation > floor:
            end = floor + (most - floor) // granule * granule
            floor = min(end, floor - (floor - int(policy.reservation)) // granule * granule)
    elif guest.mechanism is _BALLOON:
        granule = BALLOON_STEP
        # vfio-pci pins all of it: an inflated balloon would free nothing
        # and of huge pages it frees hardly any
        lends = lends and not guest.devices and not guest.on_huge_pages
        floor = min(max(int(policy.reservation), LEAST_BALLOONED), most) if lends else most
    else:
        floor, granule = max(most, part.current), BALLOON_STEP
    return floor, ceiling if ceiling > floor else floor, granule


def far_bounds(
    guest: GuestState,
    part: Part,
    *,
    besides: int = 0,
    addable: int = 0,
    new_block: int = NEW_BLOCK,
) -> tuple[int, int, int]:
    """Floor, ceiling and granule of CXL memory: nothing of it is reserved.

    Args:
        guest: with its policy.
        part: what it has of CXL memory.
        besides: what it holds of DRAM.
        addable: what devices could hold that it does not have yet.
        new_block: by what these would change.
    """
    limit = (guest.policy or _NO_POLICY).memory.limit
    most = part.most + addable if may_have(guest, Tier.CXL) else part.most
    if limit is not None:
        most = min(most, limit - besides)
    granule = block_of(part.devices, new_block)
    return part.boot, part.boot + max(0, most - part.boot) // granule * granule, granule


def keys_of(guest: GuestState, snapshot: HostSnapshot) -> tuple[Key, ...]:
    """The coordinates that mean something to a guest.

    CXL memory where it has some or its policy allows it; capabilities that it has or wishes for.
    """
    held = held_of(snapshot, guest.uuid)
    wishes = guest.policy.devices if guest.policy else ()
    keys = {device_key(wish.capability) for wish in wishes}
    far = (CXL_KEY,) if held[CXL_KEY] or has_far(guest, snapshot) else ()
    return (*KEYS, *far, *sorted(keys.union(device_amounts(held))))


def has_far(guest: GuestState, snapshot: HostSnapshot) -> bool:
    """Whether CXL memory means anything to a guest on this host."""
    cxl = snapshot.topology.cxl_nodes
    return bool(cxl) and (may_have(guest, Tier.CXL) or part_of(guest, CXL_KEY, cxl).most > 0)


def floor_of(guest: GuestState, snapshot: HostSnapshot) -> Amounts:
    """What nobody can take from it: its reservation, or more where its mechanism cannot go there.

    CPU: the reservation, for a dedicated guest in whole CPUs and at least one, for a shared one at
    least `LEAST_CPU`; never more than its vCPUs can use. Memory: boot memory with virtio-mem; all
    of it with a fixed size, or with a balloon that may not be lent from. Functions: those that it
    holds and its policy asks for, unless they are reclaimable.
    """
    return Amounts({k: line_of(guest, k, snapshot).floor for k in keys_of(guest, snapshot)})


def ceiling_of(guest: GuestState, snapshot: HostSnapshot) -> Amounts:
    """What it can hold at most: its limit, or less where vCPUs or memory slots end before.

    Never below its floor. CPU of a dedicated guest is rounded down to whole CPUs.
    """
    return Amounts({k: line_of(guest, k, snapshot).ceiling for k in keys_of(guest, snapshot)})


def charge_of(guest: GuestState, held: Amounts | None, snapshot: HostSnapshot) -> Amounts:
    """What a guest costs of the capacity when it holds this much.

    Args:
        guest: an active or a starting guest.
        held: None for a guest without a holding. An unmanaged one counts with all the memory it
            can reach and with the part of its vCPUs' time that can fall on managed pCPUs; one
            that was not taken over yet, with its floor and the memory it has.
        snapshot: for the capacity.
    """
    if held is None and guest.policy is not None:
        held = owed_to(guest, snapshot)
    cxl = snapshot.topology.cxl_nodes
    if held is None:
        far, near = part_of(guest, CXL_KEY, cxl), part_of(guest, MEMORY_KEY, cxl)
        return Amounts(
            {
                CPU_KEY: _stray_cpu(guest, snapshot.capacity, snapshot.topology.cpus),
                MEMORY_KEY: _stray_memory(near) + int(snapshot.capacity.overhead),
                CXL_KEY: _stray_memory(far),
            }
        )
    memory = _memory_charge(guest, cxl, held[MEMORY_KEY], lends=snapshot.lend_ballooned)
    cost = {
        CPU_KEY: held[CPU_KEY],
        MEMORY_KEY: memory + int(snapshot.capacity.overhead),
        CXL_KEY: held[CXL_KEY],
    }
    return Amounts(cost | device_amounts(held))


def _memory_charge(guest: GuestState, cxl: frozenset[int], held: int, *, lends: bool) -> int:
    """Without overhead. Nothing but the guest's goodwill keeps a ballooned page away from it."""
    if guest.mechanism is _VIRTIO_MEM or (lends and guest.mechanism is _BALLOON):
        return held
    return max(held, part_of(guest, MEMORY_KEY, cxl).most)


def owed_to(guest: GuestState, snapshot: HostSnapshot) -> Amounts:
    """What a managed guest without a holding is counted with: its floor, and what it has."""
    owed = floor_of(guest, snapshot)
    for key in (MEMORY_KEY, CXL_KEY):
        part = part_of(guest, key, snapshot.topology.cxl_nodes)
        owed = owed.with_value(key, max(owed[key], part.current))
    return owed


def _stray_memory(part: Part) -> int:
    return max(part.most, part.current)


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
    """What may be granted in all: of functions, those in stock and those that are held."""
    capacity = snapshot.capacity
    total = Amounts.of(cpu=len(capacity.cpus) * WHOLE_CPU, memory=int(capacity.grantable_memory))
    if snapshot.topology.cxl_nodes:
        there = sum(capacity.cxl.get(n, 0) for n in snapshot.topology.cxl_nodes)
        total = total.with_value(CXL_KEY, there + _stuck(snapshot))
    if not snapshot.devices.pools:
        return total
    return total + Amounts(Stock(snapshot).capacity())


def _stuck(snapshot: HostSnapshot) -> int:
    """CXL memory that guests have on nodes of which nothing more is granted (quarantine).

    It counts as long as they have it: it is in use as well, and must take nothing from what other
    nodes can give. What is called home is nobody's any more: no loan goes home of it.
    """
    kept = snapshot.capacity.withheld.keys() - snapshot.recall.nodes
    stuck = snapshot.topology.cxl_nodes & kept
    if not stuck:
        return 0
    active = [guest for guest in snapshot.guests.values() if guest.active]
    return sum(size for g in active for n, size in used_nodes(g).items() if n in stuck)


class Tally(NamedTuple):
    """One pass over all guests.

    Attributes:
        free: capacity less everything in use; below zero when the host is overcommitted.
        guests: those that are active or hold something, by UUID.
        held: what each of them holds, one column per resource; 0 without a holding.
        engaged: those that nothing can be taken from now: another plan or a job works on them,
            they are not running yet, or not in the books yet.
        without: a guest that is left out.
    """

    free: Amounts
    guests: list[GuestState]
    held: dict[Key, list[int]]
    engaged: set[GuestId]
    without: GuestId | None = None


def tally(snapshot: HostSnapshot, *, without: GuestId | None = None) -> Tally:
    """Count every guest once.

    In use are the charges of all guests that are active or have a holding already, what running
    plans have reserved, and memory residues (a vCPU residue costs nothing: quota and pins hold it).

    Args:
        snapshot: the host.
        without: a guest that is left out (one that starts now and is counted by the caller).
    """
    holdings, lends = snapshot.books.holdings, snapshot.lend_ballooned
    known: list[GuestState] = []
    engaged = set(snapshot.busy)
    cpus: list[int] = []
    memories: list[int] = []
    cpu = memory = far = 0
    fars: list[int] = []
    cxl = snapshot.topology.cxl_nodes
    for uuid in sorted(snapshot.guests):
        guest, holding = snapshot.guests[uuid], holdings.get(uuid)
        active = guest.state is not _SHUTOFF
        if uuid == without or (holding is None and not active):
            continue
        held_cpu = holding.amounts[CPU_KEY] if holding else 0
        held_memory = holding.amounts[MEMORY_KEY] if holding else 0
        if guest.job is not None or holding is None or not active:
            engaged.add(uuid)
        known.append(guest)
        cpus.append(held_cpu)
        memories.append(held_memory)
        fars.append(holding.amounts[CXL_KEY] if cxl and holding else 0)
        if holding is None and guest.policy is not None:
            # Not taken over yet (several run when the agent starts): counting more than it is
            # owed and has would leave no room for the grant of the first one.
            owed = owed_to(guest, snapshot)
            cpu += owed[CPU_KEY]
            memory += _memory_charge(guest, cxl, owed[MEMORY_KEY], lends=lends)
            far += owed[CXL_KEY]
        elif holding is None or (active and guest.policy is None):
            # A guest whose policy was cleared is bound by its old holding no more.
            cpu += _stray_cpu(guest, snapshot.capacity, snapshot.topology.cpus)
            memory += _stray_memory(part_of(guest, MEMORY_KEY, cxl))
            far += _stray_memory(part_of(guest, CXL_KEY, cxl))
        else:
            cpu += held_cpu
            memory += _memory_charge(guest, cxl, held_memory, lends=lends)
            far += fars[-1]
    unknown = [h for g, h in holdings.items() if g not in snapshot.guests and g != without]
    cpu += sum(h.amounts[CPU_KEY] for h in unknown)
    memory += sum(h.amounts[MEMORY_KEY] for h in unknown)
    far += sum(h.amounts[CXL_KEY] for h in unknown)
    memory += (len(known) + len(unknown)) * int(snapshot.capacity.overhead)
    memory += _left_over(snapshot, MEMORY_KEY, without)
    far += _left_over(snapshot, CXL_KEY, without)
    used = Amounts({CPU_KEY: cpu, MEMORY_KEY: memory, CXL_KEY: far}) + snapshot.pending
    held = {CPU_KEY: cpus, MEMORY_KEY: memories, CXL_KEY: fars}
    if snapshot.devices.pools:
        used = used + _held_functions(snapshot, without)
        for key in Stock(snapshot).keys:
            held[key] = [held_of(snapshot, guest.uuid)[key] for guest in known]
    return Tally(capacity_of(snapshot) - used, known, held, engaged, without)


def _held_functions(snapshot: HostSnapshot, without: GuestId | None) -> Amounts:
    """Functions of everyone, by capability; a guest that does not run holds its own as well."""
    total: dict[Key, int] = {}
    for uuid, holding in snapshot.books.holdings.items():
        if holding.functions and uuid != without:
            for key, count in device_amounts(holding.amounts).items():
                total[key] = total.get(key, 0) + count
    return Amounts(total)


def _left_over(snapshot: HostSnapshot, key: Key, without: GuestId | None) -> int:
    """Residues of memory of one tier."""
    residues = snapshot.books.residues
    return sum(r.amount for r in residues if r.what == str(key) and r.guest != without)


def free(snapshot: HostSnapshot, *, without: GuestId | None = None) -> Amounts:
    """Capacity less everything in use, as `tally` counts it; below zero when overcommitted."""
    return tally(snapshot, without=without).free
