"""`AttachDimm`: a DIMM with memory of one host node comes to a running guest.

Whether the guest's kernel uses it, and for what, nobody here is told. So it is believed to stay:
an undo asks for it once, and what the guest keeps is a residue.

Source: https://libvirt.org/formatdomain.html#memory-devices; libvirt 9.0,
qemuDomainAttachMemory and qemuDomainDetachMemoryDevice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtHandler, has_code
from virtfabric.adapters.libvirt.residence import is_bound
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.memory import format_dimm
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.memorysteps import AttachDimm
from virtfabric.model.units import Bytes, CpuSet

if TYPE_CHECKING:
    from virtfabric.model.guest import FixedMemory
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_UNDO_WAIT_S: Final = 10.0
"""A guest that can let it go moves its pages away within that; one that cannot says nothing."""
_PENDING: Final = "in the process of unplug"
"""QEMU's words (qmp_device_del)."""


class DimmHandler(LibvirtHandler[AttachDimm]):
    """Carries out `AttachDimm`."""

    step_type = AttachDimm

    def bring_about(self, step: AttachDimm, context: StepContext) -> None:
        """Attach, or ask the guest to let it go."""
        if step.after:
            self._attach(step)
        elif self._detach(step, time.monotonic() + step.deadline_s):
            raise ShortfallError(
                f"{step.name}: DIMM {step.alias} is still attached {step.deadline_s:g} s after "
                "the guest was asked to let it go: it has pages on it that cannot move",
                reached=step.before,
            )

    def check(self, step: AttachDimm) -> None:
        """Live XML and QEMU's memory policy say the node."""
        found = self._find(step)
        size = found.size if found else Bytes(0)
        if size != step.after:
            raise VerificationError(
                f"{step.name}: DIMM {step.alias}: {Bytes(step.after)} expected, {size} in the "
                "live XML"
            )
        if found is None:
            return
        if found.host_nodes != CpuSet((step.node,)):
            nodes = found.host_nodes or "no node"
            raise VerificationError(
                f"{step.name}: {step.alias}: node {step.node} expected, {nodes} in the live XML"
            )
        pid = self.find_pid(step)
        if not is_bound(self.host.proc, pid, step.node):
            raise VerificationError(
                f"{step.name}: {step.alias} is in the live XML, but QEMU (process {pid}) has no "
                f"memory bound to node {step.node}"
            )

    def give_back(self, step: AttachDimm) -> int:
        """Take it away if the guest lets it go; else all of it stays with the guest."""
        if step.before:
            self._attach(step.inverse())
            return 0
        kept = self._detach(step, time.monotonic() + _UNDO_WAIT_S)
        return int(kept.size) if kept else 0

    def _attach(self, step: AttachDimm) -> None:
        if self._find(step) is not None:
            return
        with self.host.connection.domain(step.guest) as dom:
            dom.attachDeviceFlags(format_dimm(step), _LIVE)
        if self._find(step) is None:
            raise HypervisorError(f"{step.name}: libvirt attached {step.alias}, but shows none")

    def _detach(self, step: AttachDimm, until: float) -> FixedMemory | None:
        """Ask once and wait; what the guest still has."""
        if self._find(step) is None:
            return None
        try:
            with self.host.connection.domain(step.guest) as dom:
                dom.detachDeviceAlias(step.alias, _LIVE)
        except (GuestGoneError, HypervisorGoneError):
            raise
        except HypervisorError as error:
            if _PENDING not in str(error) and not has_code(error, libvirt.VIR_ERR_DEVICE_MISSING):
                raise
        return self.host.pulse.wait_for(
            lambda: self._find(step), lambda found: found is None, until=until
        )

    def _find(self, step: AttachDimm) -> FixedMemory | None:
        with self.host.connection.domain(step.guest) as dom:
            state = parse_domain(dom.XMLDesc(0), None)
        if not state.active:  # a persistent guest's definition outlives it
            raise GuestGoneError(f"{state.name}: is not running any more")
        return next((p for p in state.fixed_memory if p.what == f"dimm {step.alias}"), None)
