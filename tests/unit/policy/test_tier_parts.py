"""What of a guest's memory can be taken back, part by part; DIMMs and huge pages among it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from host_data import BOOT_MEMORY
from tier_lives import FUNCTION
from tier_world import ask, host, moves, plan_of, refused, tiered

from virtfabric.model.amounts import CXL_KEY, MEMORY_KEY, Amounts, Key, Tier
from virtfabric.model.errors import Reason
from virtfabric.model.guest import (
    FixedMemory,
    GuestState,
    MemoryMechanism,
    MemoryRoom,
)
from virtfabric.model.ledger import Books, Holding, HostSnapshot
from virtfabric.model.memorysteps import AttachDimm, AttachMemory
from virtfabric.model.policy import Growth
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet
from virtfabric.policy.returnability import held_memory
from virtfabric.policy.standing import line_of
from virtfabric.policy.tiers import node_key

# -- returnability ----------------------------------------------------------------------------


def test_every_part_says_whether_it_can_be_taken_back_and_why_not() -> None:
    cells = (FixedMemory("cell 0", Bytes(BOOT_MEMORY)),)
    guest = tiered(far=64, fixed_memory=cells)
    assert [str(part) for part in held_memory(guest, host(guest))] == [
        "128MiB of DRAM (cell 0, node 0); not reclaimable: the guest booted with it; not "
        "offlinable: node 0 is not of ZONE_MOVABLE alone",
        "64MiB of CXL (virtio-mem far2, node 2); reclaimable; offlinable",
    ]


def test_virtio_mem_is_reclaimable_with_a_function_and_its_node_is_not_offlinable() -> None:
    guest = replace(tiered(far=64), devices=(FUNCTION,))
    part = held_memory(guest, host(guest))[-1]
    assert (part.reclaimable, part.offlinable) == (True, False)
    assert part.why_not_offlinable == "a PCIe function of the guest pins its pages"


def test_node_of_zone_normal_says_why() -> None:
    guest = tiered(far=64)
    part = held_memory(guest, host(guest, stays=(2,)))[-1]
    assert part.why_not_offlinable == "block memory9 is of ZONE_NORMAL"


@pytest.mark.parametrize(
    ("lends", "devices", "why"),
    [
        (True, (), ""),
        (False, (), "only its balloon could free it, and nothing enforces that"),
        (True, (FUNCTION,), "a PCIe function pins it, a balloon would free nothing"),
    ],
)
def test_balloon(lends: bool, devices: tuple[object, ...], why: str) -> None:
    guest = tiered(mechanism=MemoryMechanism.BALLOON, memory=256 * MIB, memory_max=256 * MIB)
    guest = replace(guest, devices=devices, memory_current=Bytes(200 * MIB))
    (part,) = held_memory(guest, host(guest, lend_ballooned=lends))
    assert part.size == 200 * MIB
    assert part.reclaimable == (not why)
    assert part.why_not_reclaimable.startswith(why)


def test_dimm_is_not_reclaimable() -> None:
    parts = (FixedMemory("cell 0", Bytes(MIB)), FixedMemory("dimm d0", Bytes(MIB), CpuSet([2])))
    guest = tiered(fixed_memory=parts)
    dimm = held_memory(guest, host(guest))[1]
    assert (dimm.tier, dimm.offlinable) == (Tier.CXL, True)
    assert dimm.why_not_reclaimable == "the guest may have pages on the DIMM that cannot move"


@pytest.mark.parametrize(
    ("page", "stays"),
    [
        (Bytes(2 * MIB), "it is on huge pages (2MiB), which move only where another node has such"),
        (Bytes(GIB), "it is on gigantic pages (1GiB), which cannot move"),
        (None, "it is on huge pages (2MiB)"),
    ],
)
def test_huge_pages_are_neither_reclaimable_nor_offlinable(page: Bytes | None, stays: str) -> None:
    guest = tiered(far=64)
    devices = tuple(replace(device, page=page) for device in guest.virtio_mem)
    part = held_memory(replace(guest, virtio_mem=devices), host(guest))[-1]
    assert (part.reclaimable, part.offlinable) == (False, False)
    assert "good for their pool only" in part.why_not_reclaimable
    assert part.why_not_offlinable.startswith(stays)


def test_a_balloon_frees_no_huge_pages() -> None:
    guest = tiered(mechanism=MemoryMechanism.BALLOON, memory=256 * MIB, memory_max=256 * MIB)
    guest = replace(
        guest, memory_current=Bytes(200 * MIB), boot_memory=Bytes(256 * MIB),
        fixed_memory=(FixedMemory("boot memory", Bytes(256 * MIB), page=Bytes(2 * MIB)),),
    )  # fmt: skip
    snapshot = host(guest, lend_ballooned=True)
    (part,) = held_memory(guest, snapshot)
    assert part.why_not_reclaimable == "it is on huge pages, of which a balloon frees hardly any"
    assert line_of(guest, MEMORY_KEY, snapshot).floor == 256 * MIB


def test_a_device_that_comes_to_a_guest_on_huge_pages_has_them_too() -> None:
    """By whole pages: libvirt's default would give it the same ones, but a smaller block."""
    guest = tiered(memory_room=MemoryRoom(2, Bytes(4 * GIB), 0, Bytes(GIB)))
    plan = plan_of(host(guest), ask(guest, 1024))
    (step,) = (s for s in plan.steps if isinstance(s, AttachMemory))
    assert (step.page, step.block, step.after) == (GIB, GIB, GIB)
    assert refused(host(guest), ask(guest, 512)).reason is Reason.INVALID_ARGUMENT


# -- DIMMs ------------------------------------------------------------------------------------


def with_dimms(guest: GuestState, *dimms: FixedMemory) -> GuestState:
    size = sum(dimm.size for dimm in dimms)
    cell = FixedMemory("cell 0", guest.boot_memory)
    memory = replace(guest.policy.memory, growth=Growth.DIMM)
    return replace(
        guest, policy=replace(guest.policy, memory=memory), fixed_memory=(cell, *dimms),
        boot_memory=Bytes(guest.boot_memory + size),
        memory_max=Bytes(guest.memory_max + size),
        memory_current=Bytes(guest.memory_current + size),
    )  # fmt: skip


def holding_far(snapshot: HostSnapshot, guest: GuestState, far: int) -> HostSnapshot:
    held = Amounts({Key.parse("cpu"): 500, MEMORY_KEY: guest.memory_current - far, CXL_KEY: far})
    books = Books(7, snapshot.books.holdings | {guest.uuid: Holding(guest.uuid, held)})
    return replace(snapshot, books=books)


def test_a_guest_whose_policy_says_so_gets_a_dimm_and_needs_no_port() -> None:
    guest = with_dimms(tiered(free_ports=0))
    plan = plan_of(host(guest), ask(guest, 256))
    (step,) = (s for s in plan.steps if isinstance(s, AttachDimm))
    assert (step.node, step.after, step.cell) == (2, 256 * MIB, 0)
    assert step.alias == "ua-virtfabric-cxl2-dimm0"
    assert plan.node_needs == Amounts({node_key(2): 256 * MIB})


def test_another_dimm_comes_beside_the_first() -> None:
    first = FixedMemory("dimm ua-virtfabric-cxl2-dimm0", Bytes(256 * MIB), CpuSet([2]))
    guest = with_dimms(tiered(), first)
    snapshot = holding_far(host(guest, cxl=(1024, 0)), guest, 256 * MIB)
    plan = plan_of(snapshot, ask(guest, 128))
    (step,) = (s for s in plan.steps if isinstance(s, AttachDimm))
    assert (step.alias, step.after) == ("ua-virtfabric-cxl2-dimm1", 128 * MIB)


def test_a_dimm_is_sized_by_what_a_guest_brings_online() -> None:
    guest = with_dimms(tiered())
    answer = refused(host(guest), ask(guest, 100))
    assert answer.reason is Reason.INVALID_ARGUMENT
    assert "128MiB" in answer.detail


def test_a_dimm_is_never_paid_for_by_another_guest() -> None:
    """Its guest could not give the loan back."""
    victim = tiered(2, far=512)
    lower = replace(victim, policy=replace(victim.policy, priority=1))
    guest = with_dimms(tiered())
    snapshot = host(guest, lower, cxl=(512, 0))
    assert refused(snapshot, ask(guest, 256)).reason is Reason.NO_CAPACITY
    by_virtio = tiered()
    plan_of(host(by_virtio, lower, cxl=(512, 0)), ask(by_virtio, 256))


def test_no_slot_no_dimm() -> None:
    guest = with_dimms(tiered(memory_room=MemoryRoom(0, Bytes(GIB), 0)))
    answer = refused(host(guest), ask(guest, 128))
    assert answer.reason is Reason.NO_MECHANISM
    assert "0 slots" in answer.detail


def test_a_dimm_cannot_be_given_back() -> None:
    dimm = FixedMemory("dimm ua-virtfabric-cxl2-dimm0", Bytes(256 * MIB), CpuSet([2]))
    guest = with_dimms(tiered(), dimm)
    snapshot = holding_far(host(guest), guest, 256 * MIB)
    assert refused(snapshot, ask(guest, -128)).reason is Reason.BELOW_FLOOR
    part = next(p for p in held_memory(guest, snapshot) if p.tier is Tier.CXL)
    assert not part.reclaimable


def test_a_dimm_is_never_smaller_than_what_a_guest_brings_online() -> None:
    """Its virtio-mem device is sized by 2 MiB and has room for half of it."""
    guest = with_dimms(tiered(far=1024 - 32))
    snapshot = holding_far(host(guest, cxl=(2048, 0)), guest, (1024 - 32) * MIB)
    assert refused(snapshot, ask(guest, 64)).reason is Reason.NO_PLACEMENT
    assert moves(plan_of(snapshot, ask(guest, 32))) == [("far2", 1024 - 32, 1024)]
    plan = plan_of(snapshot, ask(guest, 128))
    assert [s.after for s in plan.steps if isinstance(s, AttachDimm)] == [128 * MIB]
