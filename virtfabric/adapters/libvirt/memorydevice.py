"""`AttachMemory`, `DetachMemory`: virtio-mem devices come to a running guest, and leave it.

One comes empty and is then filled as any virtio-mem device, since a guest can take only so much at
once. It leaves only when it is empty: QEMU refuses before that, and the guest would have to be
asked twice. Only the live machine changes, never the persistent definition.

Source: https://libvirt.org/formatdomain.html#memory-devices; libvirt 9.0,
qemuDomainAttachMemory and qemuDomainDetachPrepMemory.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtHandler, Surroundings, has_code
from virtfabric.adapters.libvirt.memory import VirtioMemHandler
from virtfabric.adapters.libvirt.residence import is_bound
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.memory import format_memory_device
from virtfabric.domxml.pciports import read_ports
from virtfabric.model.devicesteps import Presence
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.memorysteps import AttachMemory, DetachMemory
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    import threading

    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_UNDO_WAIT_S: Final = 10.0
"""A guest's pciehp blinks for 5 s before it lets go of a device (see `hostdev`)."""
_UNMAPPED_S: Final = 5.0
_PENDING: Final = "in the process of unplug"
"""QEMU's words (qmp_device_del)."""


_S = TypeVar("_S", bound=AttachMemory | DetachMemory)


class _DeviceHandler(LibvirtHandler[_S]):
    """Finds, plugs and unplugs one memory device of a running guest."""

    def _attach(self, step: _S) -> VirtioMem:
        with self.host.connection.domain(step.guest) as dom:
            # libvirt takes virtio-mem for a conventional PCI device and looks for such a slot
            port = next((p.index for p in read_ports(dom.XMLDesc(0)) if p.free), None)
            dom.attachDeviceFlags(format_memory_device(step, port), _LIVE)
        device = self._find(step)
        if device is None:
            raise HypervisorError(f"{step.name}: libvirt attached {step.alias}, but shows none")
        return device

    def _detach(self, step: _S, until: float, cancelled: threading.Event | None = None) -> bool:
        """Ask once and wait for the event; whether the guest still has it."""
        try:
            with self.host.connection.domain(step.guest) as dom:
                dom.detachDeviceAlias(step.alias, _LIVE)
        except (GuestGoneError, HypervisorGoneError):
            raise
        except HypervisorError as error:
            if _PENDING not in str(error) and not has_code(error, libvirt.VIR_ERR_DEVICE_MISSING):
                raise
        left = self.host.pulse.wait_for(
            lambda: self._find(step), lambda found: found is None, until=until,
            cancelled=cancelled,
        )  # fmt: skip
        return left is not None

    def _find(self, step: _S) -> VirtioMem | None:
        return next((d for d in self._read(step).virtio_mem if d.alias == step.alias), None)

    def _read(self, step: _S) -> GuestState:
        with self.host.connection.domain(step.guest) as dom:
            state = parse_domain(dom.XMLDesc(0), None)
        if not state.active:  # a persistent guest's definition outlives it
            raise GuestGoneError(f"{state.name}: is not running any more")
        return state


class MemoryDeviceHandler(_DeviceHandler[AttachMemory]):
    """Carries out `AttachMemory`."""

    step_type = AttachMemory

    def __init__(self, host: Surroundings) -> None:
        """The device's memory moves as that of any other one."""
        super().__init__(host)
        self._memory = VirtioMemHandler(host)

    def bring_about(self, step: AttachMemory, context: StepContext) -> None:
        """Attach and fill, or empty and detach."""
        device = self._find(step)
        if step.after:
            device = device or self._attach(step)
            self._memory.move(_resize(step, int(device.requested), step.after), context)
            return
        if device is None:
            return
        until = time.monotonic() + step.deadline_s
        self._memory.move(_resize(step, int(device.requested), 0, exact=True), context)
        if self._detach(step, until):
            raise ShortfallError(
                f"{step.name}: {step.alias} is empty, but still attached {step.deadline_s:g} s "
                "after the guest was asked to let it go",
                reached=0,
            )

    def check(self, step: AttachMemory) -> None:
        """Live XML and QEMU's memory policy say the node; the guest has the memory."""
        device = self._find(step)
        if not step.after:
            if device is not None:
                raise VerificationError(f"{step.name}: {step.alias} is still in the live XML")
            return
        if device is None:
            raise VerificationError(f"{step.name}: {step.alias} is not in the live XML")
        if device.host_nodes != CpuSet((step.node,)):
            found = device.host_nodes or "no node"
            raise VerificationError(
                f"{step.name}: {step.alias}: node {step.node} expected, {found} in the live XML"
            )
        pid = self.find_pid(step)
        if not is_bound(self.host.proc, pid, step.node):
            raise VerificationError(
                f"{step.name}: {step.alias} is in the live XML, but QEMU (process {pid}) has no "
                f"memory bound to node {step.node}"
            )
        self._memory.check(_resize(step, int(device.requested), step.after))

    def give_back(self, step: AttachMemory) -> int:
        """Take the device away once it is empty; else what the guest keeps in it.

        A device that was there before is filled again.
        """
        device = self._find(step)
        if step.before:
            if device is None:
                device = self._attach(step.inverse())
            requested = int(device.requested)
            return self._memory.give_back(_resize(step, step.before, requested))
        if device is None:
            return 0
        kept = self._memory.give_back(_resize(step, 0, int(device.requested)))
        if not kept:
            self._detach(step, time.monotonic() + _UNDO_WAIT_S)
        return kept


class DetachMemoryHandler(_DeviceHandler[DetachMemory]):
    """Carries out `DetachMemory`."""

    step_type = DetachMemory

    def bring_about(self, step: DetachMemory, context: StepContext) -> None:
        """Ask the guest once to let go of the empty device, and wait; or attach it, empty."""
        device = self._find(step)
        if step.after is Presence.ATTACHED:
            if device is None:
                self._attach(step)
            return
        if device is None:
            return
        holds = max(int(device.requested), int(device.current))
        if holds:
            raise ShortfallError(
                f"{step.name}: {step.alias} still holds {Bytes(holds)}; an empty device alone can "
                "be detached",
                reached=holds,
            )
        if self._detach(step, time.monotonic() + step.deadline_s, context.cancelled):
            raise ShortfallError(
                f"{step.name}: {step.alias} is empty, but still attached {step.deadline_s:g} s "
                "after the guest was asked to let it go",
                reached=0,
            )
        # QEMU unmaps it in a thread of its own (by its source: qemu_ram_free, call_rcu)
        self.host.pulse.wait_for(
            lambda: self._lingers(step), lambda lingers: not lingers,
            until=time.monotonic() + _UNMAPPED_S, cancelled=context.cancelled,
        )  # fmt: skip

    def check(self, step: DetachMemory) -> None:
        """Gone from the live XML, and QEMU has no memory bound to its node on its account."""
        state = self._read(step)
        there = any(d.alias == step.alias for d in state.virtio_mem)
        if step.after is Presence.ATTACHED:
            if not there:
                raise VerificationError(f"{step.name}: {step.alias} is not in the live XML")
            return
        if there:
            raise VerificationError(f"{step.name}: {step.alias} is still in the live XML")
        if self._lingers(step):
            raise VerificationError(
                f"{step.name}: {step.alias} has left the live XML, but QEMU still has memory bound "
                f"to node {step.node}"
            )

    def _lingers(self, step: DetachMemory) -> bool:
        """Whether QEMU has memory on the node that nothing else of the guest is bound to."""
        state = self._read(step)
        bound = [device.host_nodes for device in state.virtio_mem]
        bound += [part.host_nodes for part in state.fixed_memory]
        if any(step.node in (nodes or state.numa_nodes) for nodes in bound):
            return False
        return is_bound(self.host.proc, self.find_pid(step), step.node)

    def give_back(self, step: DetachMemory) -> int:
        """Attach it again where it left, or detach it where it came; it is empty either way.

        A request to unplug that is still pending cannot be withdrawn: then it leaves later, and
        the next growth attaches another.
        """
        device = self._find(step)
        if step.before is Presence.ATTACHED:
            if device is None:
                self._attach(step)
        elif device is not None:
            self._detach(step, time.monotonic() + _UNDO_WAIT_S)
        return 0


def _resize(step: AttachMemory, before: int, after: int, *, exact: bool = False) -> ResizeVirtioMem:
    """The device's memory alone; `exact` where nothing may stay behind."""
    return ResizeVirtioMem(
        guest=step.guest, name=step.name, alias=step.alias, before=before, after=after,
        tolerance=0 if exact else step.tolerance, deadline_s=step.deadline_s, tier=step.tier,
    )  # fmt: skip
