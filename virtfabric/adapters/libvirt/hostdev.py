"""`AttachFunction`: a function that a vfio driver holds goes to a running guest, or leaves it.

libvirt gets `managed='no'`: which driver has the function is this agent's business. A request to
unplug is made once and cannot be withdrawn; what ends it is that the live XML has lost the device
and that the kernel shows the function closed, for both events that tell of it have come too early.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtHandler, Surroundings, has_code
from virtfabric.adapters.libvirt.memlock import ADVICE, REFUSAL
from virtfabric.adapters.libvirt.residence import Residence, format_strays, read_residence
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.hostdev import format_function
from virtfabric.domxml.pciports import read_ports
from virtfabric.model.device import VFIO_PCI
from virtfabric.model.devicesteps import AttachFunction, Presence
from virtfabric.model.errors import (
    DeviceError,
    DeviceGoneError,
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    VerificationError,
)

if TYPE_CHECKING:
    from virtfabric.model.device import GuestDevice, PciAddress
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_UNDO_WAIT_S: Final = 10.0
"""A guest's pciehp blinks for 5 s before it lets go (measured: see tests/lab)."""
_CLOSED_S: Final = 10.0
_PENDING: Final = "in the process of unplug"
"""QEMU's words (qmp_device_del); libvirt passes them on as an internal error."""


class FunctionHandler(LibvirtHandler[AttachFunction]):
    """Carries out `AttachFunction`."""

    step_type = AttachFunction

    def __init__(self, host: Surroundings) -> None:
        """Remembers where a guest's memory lay before each attach, for the check after it."""
        super().__init__(host)
        self._lock = threading.Lock()
        self._before: dict[tuple[GuestId, PciAddress], Residence] = {}

    def bring_about(self, step: AttachFunction, context: StepContext) -> None:
        """Attach, or ask the guest once and wait until it has let go."""
        if step.after is Presence.ATTACHED:
            self._attach(step)
            return
        until = time.monotonic() + step.deadline_s
        if self._detach(step, until, context.cancelled):
            raise ShortfallError(
                f"{step.name}: {step.address} is still attached {step.deadline_s:g} s after the "
                "guest was asked to let it go",
                reached=1,
            )

    def check(self, step: AttachFunction) -> None:
        """Live XML, driver, QEMU's files and the guest's memory: all say so."""
        found = self._find(step)
        if step.after is Presence.ABSENT:
            if found is not None:
                raise VerificationError(f"{step.name}: {step.address} is still in the live XML")
            self._check_closed(step)
            return
        if found is None:
            raise VerificationError(f"{step.name}: {step.address} is not in the live XML")
        if not self.host.holders.is_openable(step.address):
            driver = self.host.functions.driver(step.address)
            raise VerificationError(
                f"{step.name}: {step.address}: driver {VFIO_PCI} expected, {driver or 'none'} found"
            )
        pid = self.find_pid(step)
        if not self.host.holders.holds(pid, step.address):
            raise VerificationError(
                f"{step.name}: {step.address} is in the live XML, but QEMU (process {pid}) does "
                "not hold it"
            )
        self._check_residence(step, pid)

    def give_back(self, step: AttachFunction) -> int:
        """Attach again what had left, or take back what was attached; 1 when the guest keeps it.

        A request to unplug that is still pending cannot be withdrawn: the function counts as the
        guest's again, and when it leaves all the same, an event tells.
        """
        if step.before is Presence.ATTACHED:
            with suppress(DeviceGoneError):  # taken out of the host: nothing to give back
                self._attach(step.inverse())
            return 0
        return int(self._detach(step, time.monotonic() + _UNDO_WAIT_S, None))

    # -- attach ---------------------------------------------------------------------------------

    def _attach(self, step: AttachFunction) -> None:
        state = self._read(step)
        if _find_device(state, step.address) is not None:
            return
        if not self.host.holders.is_openable(step.address):
            driver = self.host.functions.driver(step.address)
            raise HypervisorError(
                f"{step.name}: {step.address} is bound to {driver or 'no driver'}, "
                f"not to {VFIO_PCI} nor to a driver that offers it to vfio (it has no vfio-dev)"
            )
        pid = self.find_pid(step)
        self.host.locked_memory.check(state, pid)
        before = self._read_residence(pid)
        self._request(step)
        # Nothing more to wait for: QEMU has the function now, and only the guest's own driver
        # (it may have none) knows when it is in use.
        with self._lock:
            self._before[step.guest, step.address] = before

    def _request(self, step: AttachFunction) -> None:
        try:
            with self.host.connection.domain(step.guest) as dom:
                port = self._choose_port(step.address, dom.XMLDesc(0))
                dom.attachDeviceFlags(format_function(step.address, port), _LIVE)
        except HypervisorError as error:
            if REFUSAL in str(error):
                error.advice = error.advice or ADVICE
            raise

    def _choose_port(self, address: PciAddress, xml: str) -> int | None:
        """A port for a function that is no PCIe one; libvirt finds one for all others.

        Left to itself libvirt wants a conventional slot for it ("No more available PCI slots",
        libvirt 11.3); named, it takes a PCIe port.
        """
        if self.host.functions.has(address, "max_link_speed"):
            return None
        return next((port.index for port in read_ports(xml) if port.free), None)

    def _read_residence(self, pid: int) -> Residence:
        return read_residence(self.host.proc, pid, self.host.processes.read_nodes(pid, pid))

    def _check_residence(self, step: AttachFunction, pid: int) -> None:
        with self._lock:
            before = self._before.get((step.guest, step.address))
        if before is None:  # attached by an earlier agent: nothing to compare with
            return
        if strays := self._read_residence(pid).strayed_since(before):
            raise VerificationError(
                f"{step.name}: attaching {step.address} moved memory that is bound elsewhere: "
                f"{format_strays(strays)}"
            )

    # -- detach ---------------------------------------------------------------------------------

    def _detach(
        self, step: AttachFunction, until: float, cancelled: threading.Event | None
    ) -> bool:
        """Ask once and wait; whether the guest still has it."""
        device = self._find(step)
        if device is not None:
            self._ask(step, device.alias)
            device = self.host.pulse.wait_for(
                lambda: self._find(step), lambda found: found is None, until=until,
                cancelled=cancelled,
            )  # fmt: skip
        if device is None:
            with self._lock:
                self._before.pop((step.guest, step.address), None)
            self.host.holders.wait_closed(step.address, _CLOSED_S, cancelled)
        return device is not None

    def _ask(self, step: AttachFunction, alias: str) -> None:
        """Request the unplug, unless one is pending or it has gone meanwhile.

        A second request is never sent to press an earlier one: on a PCIe port that is the attention
        button once more, which cancels the first.
        """
        try:
            with self.host.connection.domain(step.guest) as dom:
                dom.detachDeviceAlias(alias, _LIVE)
        except (GuestGoneError, HypervisorGoneError):
            raise
        except HypervisorError as error:
            if _PENDING in str(error) or has_code(error, libvirt.VIR_ERR_DEVICE_MISSING):
                return
            raise

    def _check_closed(self, step: AttachFunction) -> None:
        try:
            still = self.host.holders.is_open(step.address)
        except DeviceError:  # it has vanished: nobody has it
            return
        if still:
            raise VerificationError(
                f"{step.name}: {step.address} has left the live XML, but is still open"
            )

    # -- state ----------------------------------------------------------------------------------

    def _find(self, step: AttachFunction) -> GuestDevice | None:
        return _find_device(self._read(step), step.address)

    def _read(self, step: AttachFunction) -> GuestState:
        with self.host.connection.domain(step.guest) as dom:
            state = _parse(dom)
        if not state.active:  # a persistent guest's definition outlives it
            raise GuestGoneError(f"{state.name}: is not running any more")
        return state


def _parse(dom: Any) -> GuestState:
    return parse_domain(dom.XMLDesc(0), None)


def _find_device(state: GuestState, address: PciAddress) -> GuestDevice | None:
    """Whoever attached it, and under whatever alias."""
    return next((device for device in state.devices if device.address == address), None)
