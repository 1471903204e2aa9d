"""Single steps for one guest: from what was found to what it should be, value by value.

A step that changes nothing is not made. It must not choose values (intent, layout) or order steps
(placement).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from virtfabric.model.amounts import Tier
from virtfabric.model.device import OUR_ALIAS
from virtfabric.model.guest import MemoryMechanism
from virtfabric.model.mark import NO_MARK
from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory
from virtfabric.model.plan import (
    MarkPins,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.policy.intent import intended_mark, quota_of, shares_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.model.step import Step
    from virtfabric.model.units import CpuSet
    from virtfabric.policy.tiers import Part

DEADLINE_S: Final = 30.0
NOTHING_STUCK: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Stepper:
    """Makes steps for one guest from what was found; a step that changes nothing is not made."""

    state: GuestState
    everywhere: CpuSet
    deadline_s: float = DEADLINE_S

    def pin(self, vcpu: int, after: CpuSet) -> PinVcpu | None:
        """Of a plugged vCPU."""
        before = self.state.vcpu_affinity.get(vcpu) or self.everywhere
        if not after or before == after:
            return None
        return PinVcpu(
            guest=self.state.uuid, name=self.state.name, vcpu=vcpu, before=before, after=after
        )

    def new_pin(self, vcpu: int, after: CpuSet) -> PinVcpu:
        """Of a vCPU that an earlier step plugs: undoing that takes the pin along."""
        return PinVcpu(
            guest=self.state.uuid, name=self.state.name, vcpu=vcpu, before=after, after=after
        )

    def quota(self, after: int) -> list[SetQuota]:
        """The cap of the whole guest."""
        before = quota_of(self.state)
        if before == after:
            return []
        return [SetQuota(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def shares(self, after: int) -> list[Step]:
        """Its weight."""
        before = shares_of(self.state)
        if before == after:
            return []
        return [SetShares(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def emulator(self, after: CpuSet) -> list[Step]:
        """Its emulator threads."""
        before = self.state.emulator_affinity or self.everywhere
        if not after or before == after:
            return []
        return [
            PinEmulator(guest=self.state.uuid, name=self.state.name, before=before, after=after)
        ]

    def nodeset(self, after: CpuSet) -> list[Step]:
        """Nodes of a movable guest's memory."""
        before = self.state.numa_nodes
        if not after or not before or before == after:
            return []
        return [SetNodeset(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def mark(self, pins: Mapping[int, CpuSet], emulator: CpuSet) -> list[Step]:
        """Of these pins, where it does not say so already; entries of other vCPUs do no harm."""
        before = self.state.marked_pins
        after = intended_mark(self.state, pins, emulator, self.everywhere)
        if before.only({None, *pins}) == after:
            return []
        return [MarkPins(guest=self.state.uuid, name=self.state.name, before=before, after=after)]

    def no_mark(self) -> list[Step]:
        """Remove it."""
        before = self.state.marked_pins
        if not before:
            return []
        return [MarkPins(guest=self.state.uuid, name=self.state.name, before=before, after=NO_MARK)]

    def vcpus(self, after: int, *, optional: bool) -> SetVcpuCount:
        """Plug, or unplug where the guest lets go."""
        return SetVcpuCount(
            guest=self.state.uuid, name=self.state.name, optional=optional,
            before=self.state.vcpus_online, after=after, deadline_s=self.deadline_s,
        )  # fmt: skip

    def memory(
        self, after: int, near: Part, least: Mapping[str, int]
    ) -> list[ResizeVirtioMem | SetBalloon]:
        """Bring the guest's DRAM, which is `near` now, to `after` bytes.

        `least` is the size below which a virtio-mem device does not go, by alias.
        """
        match self.state.mechanism:
            case MemoryMechanism.VIRTIO_MEM:
                return self._virtio_mem(after, near, least)
            case MemoryMechanism.BALLOON if after != self.state.memory_current:
                return [
                    SetBalloon(
                        guest=self.state.uuid, name=self.state.name,
                        before=int(self.state.memory_current), after=after,
                        deadline_s=self.deadline_s,
                    )
                ]  # fmt: skip
            case _:
                return []

    def _virtio_mem(
        self, after: int, near: Part, least: Mapping[str, int]
    ) -> list[ResizeVirtioMem | SetBalloon]:
        sizes = spread_virtio_mem(near.devices, after - near.boot, least)
        return [
            self.resize(device, size, Tier.DRAM)
            for device, size in zip(near.devices, sizes, strict=True)
            if size != device.requested
        ]

    def resize(self, device: VirtioMem, size: int, tier: Tier) -> ResizeVirtioMem:
        """Ask one virtio-mem device for another size."""
        return ResizeVirtioMem(
            guest=self.state.uuid, name=self.state.name, alias=device.alias,
            before=int(device.requested), after=size, deadline_s=self.deadline_s, tier=tier.value,
        )  # fmt: skip

    def attach_memory(
        self, node: int, size: int, block: int, after: int, page: int = 0
    ) -> AttachMemory:
        """Plug a device on a CXL node; the guest has room for it (`tierterms.why_no_device`)."""
        cell = self.state.memory_room.cell
        assert cell is not None
        return AttachMemory(
            guest=self.state.uuid, name=self.state.name, alias=f"{OUR_ALIAS}cxl{node}",
            node=node, cell=cell, size=size, block=block, before=0, after=after,
            deadline_s=self.deadline_s, page=page,
        )  # fmt: skip

    def attach_dimm(self, node: int, size: int, page: int) -> AttachDimm:
        """Plug a DIMM on a CXL node, beside those that are there."""
        cell = self.state.memory_room.cell
        assert cell is not None
        taken = {part.what for part in self.state.fixed_memory}
        names = (f"{OUR_ALIAS}cxl{node}-dimm{n}" for n in range(len(taken) + 1))
        return AttachDimm(
            guest=self.state.uuid, name=self.state.name,
            alias=next(name for name in names if f"dimm {name}" not in taken),
            node=node, cell=cell, before=0, after=size, deadline_s=self.deadline_s, page=page,
        )  # fmt: skip

    def detach_memory(self, device: VirtioMem, node: int, page: int) -> DetachMemory:
        """Unplug a device that is empty by then; that it stays is no reason to undo the rest."""
        return DetachMemory(
            guest=self.state.uuid, name=self.state.name, alias=device.alias, node=node,
            cell=device.node, size=int(device.size), block=int(device.block),
            deadline_s=self.deadline_s, optional=True, page=page,
        )  # fmt: skip


def spread_virtio_mem(
    devices: tuple[VirtioMem, ...], total: int, least: Mapping[str, int] = NOTHING_STUCK
) -> list[int]:
    """What to request of each device so that they make `total` bytes together.

    The last device shrinks first, the first grows first, in whole blocks: a guest never gets more
    than `total` by growing nor less by shrinking; less than a block is inside the tolerance.
    What is `least` of one, by its alias, it keeps; the others give in its place.
    """
    sizes = [int(d.requested) for d in devices]
    change = total - sum(sizes)
    indexes = range(len(devices)) if change > 0 else reversed(range(len(devices)))
    for index in indexes:
        device = devices[index]
        most, stays = int(device.size), least.get(device.alias, 0)
        room = max(0, most - sizes[index] if change > 0 else sizes[index] - stays)
        block = int(device.block) or 1
        part = min(abs(change), room) // block * block
        sizes[index] += part if change > 0 else -part
        change -= part if change > 0 else -part
    return sizes
