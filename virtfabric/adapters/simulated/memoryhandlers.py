"""The step handlers for memory devices that come to a simulated guest and leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.adapters.simulated.guest import MemoryDevice
from virtfabric.adapters.simulated.handlers import SimulatedHandler, memory_difference
from virtfabric.model.devicesteps import Presence
from virtfabric.model.errors import HypervisorError, ShortfallError
from virtfabric.model.guest import FixedMemory
from virtfabric.model.memorysteps import AttachDimm, AttachMemory, DetachMemory
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.ports import EventKind

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.guest import SimulatedGuest
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.ports import StepHandler


class _AttachMemory(SimulatedHandler[AttachMemory]):
    step_type = AttachMemory
    event = EventKind.MEMORY

    def amount(self, guest: SimulatedGuest, step: AttachMemory) -> int:
        return guest.real.devices.get(step.alias, 0)

    def bring(self, guest: SimulatedGuest, step: AttachMemory, *, lost: bool) -> None:
        self._check(guest, step)
        if lost:
            return
        self._put(guest, step, step.after)
        reached = self.amount(guest, step)
        if abs(reached - step.after) > step.tolerance:
            guest.said.devices[step.alias] = reached
            raise ShortfallError(
                f"{step.describe()}: the guest stopped at {Bytes(reached)}", reached=reached
            )

    def differs(self, guest: SimulatedGuest, step: AttachMemory) -> str:
        device = guest.device(step.alias)
        if device is None or not step.after:
            return "" if bool(device) == bool(step.after) else f"{step.alias}: {device} found"
        if device.home != step.node:
            return f"{step.alias} is on node {device.home}"
        return memory_difference(self.amount(guest, step), step.after, step.tolerance)

    def give_back(self, guest: SimulatedGuest, step: AttachMemory) -> int:
        self._put(guest, step, step.before)
        return max(0, self.amount(guest, step) - step.before)

    def _check(self, guest: SimulatedGuest, step: AttachMemory) -> None:
        self.host.check_nodes(CpuSet((step.node,)))
        if not 0 <= step.after <= step.size or step.after % step.block:
            raise HypervisorError(f"{guest.spec.name}: requested size {step.after} is impossible")
        if step.after and guest.device(step.alias) is None:
            room = guest.memory_room
            if room.slots < 1 or room.size < step.size:
                raise HypervisorError(f"{guest.spec.name}: memory device exceeds slots or space")
            if guest.free_ports < 1:
                raise HypervisorError(f"{guest.spec.name}: No more available PCI slots")

    def _put(self, guest: SimulatedGuest, step: AttachMemory, target: int) -> None:
        """The device comes before its memory, and goes after it."""
        if target and guest.device(step.alias) is None:
            _plug(guest, step)
        if guest.device(step.alias) is None:
            return
        current = self.amount(guest, step)
        guest.said.devices[step.alias] = target
        guest.real.devices[step.alias] = self.host.moved(step.guest, current, target, step.block)
        if not target and not guest.real.devices[step.alias]:
            _unplug(guest, step.alias)


class _DetachMemory(SimulatedHandler[DetachMemory]):
    step_type = DetachMemory
    event = EventKind.MEMORY

    def amount(self, guest: SimulatedGuest, step: DetachMemory) -> int:
        return guest.real.devices.get(step.alias, 0)

    def bring(self, guest: SimulatedGuest, step: DetachMemory, *, lost: bool) -> None:
        held = self.amount(guest, step)
        if held and step.after is Presence.ABSENT:
            raise ShortfallError(
                f"{guest.spec.name}: {step.alias} still holds {Bytes(held)}", reached=held
            )
        if not lost:
            self._put(guest, step, step.after)

    def differs(self, guest: SimulatedGuest, step: DetachMemory) -> str:
        found = Presence.ATTACHED if guest.device(step.alias) else Presence.ABSENT
        return "" if found is step.after else f"{step.alias}: {step.after} expected, {found} found"

    def give_back(self, guest: SimulatedGuest, step: DetachMemory) -> int:
        self._put(guest, step, step.before)
        return 0

    def _put(self, guest: SimulatedGuest, step: DetachMemory, wanted: Presence) -> None:
        there = guest.device(step.alias) is not None
        if wanted is Presence.ATTACHED and not there:
            self.host.check_nodes(CpuSet((step.node,)))
            _plug(guest, step)
        elif wanted is Presence.ABSENT and there:
            if guest.spec.uuid in self.host.faults.keeps_memory_devices:
                raise ShortfallError(
                    f"{guest.spec.name}: {step.alias} is empty, but the guest does not let it go",
                    reached=0,
                )
            _unplug(guest, step.alias)


def _plug(guest: SimulatedGuest, step: AttachMemory | DetachMemory) -> None:
    """An empty device; one of its definition is that one again."""
    defined = step.alias in {d.alias for d in guest.spec.devices}
    device = MemoryDevice(
        step.alias, step.cell, Bytes(step.size), block=Bytes(step.block),
        host_nodes=CpuSet((step.node,)),
    )  # fmt: skip
    for hardware in (guest.said, guest.real):
        hardware.devices[step.alias] = 0
        if defined:
            hardware.gone -= {step.alias}
        else:
            hardware.came = (*hardware.came, device)


def _unplug(guest: SimulatedGuest, alias: str) -> None:
    defined = alias in {d.alias for d in guest.spec.devices}
    for hardware in (guest.said, guest.real):
        del hardware.devices[alias]
        hardware.came = tuple(d for d in hardware.came if d.alias != alias)
        if defined:
            hardware.gone |= {alias}


class _AttachDimm(SimulatedHandler[AttachDimm]):
    step_type = AttachDimm
    event = EventKind.MEMORY

    def bring(self, guest: SimulatedGuest, step: AttachDimm, *, lost: bool) -> None:
        self.host.check_nodes(CpuSet((step.node,)))
        room = guest.memory_room
        if step.after and not _dimm(guest, step) and (room.slots < 1 or room.size < step.size):
            raise HypervisorError(f"{guest.spec.name}: memory device exceeds slots or space")
        if not lost:
            self._put(guest, step, step.after)
            if not step.after and _dimm(guest, step):
                raise ShortfallError(f"{step.describe()}: the guest keeps it", reached=step.before)

    def differs(self, guest: SimulatedGuest, step: AttachDimm) -> str:
        found = _dimm(guest, step)
        size, nodes = (int(found.size), found.host_nodes) if found else (0, CpuSet())
        if size != step.after:
            return f"{Bytes(size)} found"
        return "" if not found or nodes == CpuSet((step.node,)) else f"is on node {nodes}"

    def give_back(self, guest: SimulatedGuest, step: AttachDimm) -> int:
        self._put(guest, step, step.before)
        found = _dimm(guest, step)
        return max(0, (int(found.size) if found else 0) - step.before)

    def _put(self, guest: SimulatedGuest, step: AttachDimm, size: int) -> None:
        """A guest that has a budget of what it gives lets go of none that is larger."""
        found = _dimm(guest, step)
        if size and not found:
            dimm = FixedMemory(
                f"dimm {step.alias}", Bytes(size), CpuSet((step.node,)), Bytes(step.page)
            )
            for hardware in (guest.said, guest.real):
                hardware.dimms = (*hardware.dimms, dimm)
        elif found and not size:
            whole = int(found.size)
            if self.host.moved(step.guest, whole, 0, whole):
                return
            for hardware in (guest.said, guest.real):
                hardware.dimms = tuple(d for d in hardware.dimms if d.what != found.what)


def _dimm(guest: SimulatedGuest, step: AttachDimm) -> FixedMemory | None:
    return next((d for d in guest.real.dimms if d.what == f"dimm {step.alias}"), None)


def memory_handlers(host: SimulatedHost) -> tuple[StepHandler, ...]:
    """One handler for each step type of `memorysteps`."""
    return (_AttachMemory(host), _DetachMemory(host), _AttachDimm(host))
