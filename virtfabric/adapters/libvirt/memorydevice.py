"""`AttachMemory`: a virtio-mem device with memory of one host node comes to a running guest.

It comes empty and is then filled as any virtio-mem device, since a guest can take only so much at
once. It leaves only when it is empty: QEMU refuses before that, and the guest would have to be
asked twice.

Source: https://libvirt.org/formatdomain.html#memory-devices; libvirt 9.0,
qemuDomainAttachMemory and qemuDomainDetachPrepMemory.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtHandler, Surroundings, has_code
from virtfabric.adapters.libvirt.memory import VirtioMemHandler
from virtfabric.adapters.libvirt.residence import is_bound
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.memory import format_memory_device
from virtfabric.domxml.pciports import read_ports
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.memorysteps import AttachMemory
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from virtfabric.model.guest import VirtioMem
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_UNDO_WAIT_S: Final = 10.0
"""A guest's pciehp blinks for 5 s before it lets go of a device (see `hostdev`)."""
_PENDING: Final = "in the process of unplug"
"""QEMU's words (qmp_device_del)."""


class MemoryDeviceHandler(LibvirtHandler[AttachMemory]):
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
            self._memory.bring_about(_resize(step, int(device.requested), step.after), context)
            return
        if device is None:
            return
        until = time.monotonic() + step.deadline_s
        self._memory.bring_about(_resize(step, int(device.requested), 0, exact=True), context)
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

    # -- the device -------------------------------------------------------------------------

    def _attach(self, step: AttachMemory) -> VirtioMem:
        with self.host.connection.domain(step.guest) as dom:
            # libvirt takes virtio-mem for a conventional PCI device and looks for such a slot
            port = next((p.index for p in read_ports(dom.XMLDesc(0)) if p.free), None)
            dom.attachDeviceFlags(format_memory_device(step, port), _LIVE)
        device = self._find(step)
        if device is None:
            raise HypervisorError(f"{step.name}: libvirt attached {step.alias}, but shows none")
        return device

    def _detach(self, step: AttachMemory, until: float) -> bool:
        """Ask once and wait; whether the guest still has it."""
        try:
            with self.host.connection.domain(step.guest) as dom:
                dom.detachDeviceAlias(step.alias, _LIVE)
        except (GuestGoneError, HypervisorGoneError):
            raise
        except HypervisorError as error:
            if _PENDING not in str(error) and not has_code(error, libvirt.VIR_ERR_DEVICE_MISSING):
                raise
        left = self.host.pulse.wait_for(
            lambda: self._find(step), lambda found: found is None, until=until
        )
        return left is not None

    def _find(self, step: AttachMemory) -> VirtioMem | None:
        with self.host.connection.domain(step.guest) as dom:
            state = parse_domain(dom.XMLDesc(0), None)
        if not state.active:  # a persistent guest's definition outlives it
            raise GuestGoneError(f"{state.name}: is not running any more")
        return next((d for d in state.virtio_mem if d.alias == step.alias), None)


def _resize(step: AttachMemory, before: int, after: int, *, exact: bool = False) -> ResizeVirtioMem:
    """The device's memory alone; `exact` where nothing may stay behind."""
    return ResizeVirtioMem(
        guest=step.guest, name=step.name, alias=step.alias, before=before, after=after,
        tolerance=0 if exact else step.tolerance, deadline_s=step.deadline_s, tier=step.tier,
    )  # fmt: skip
