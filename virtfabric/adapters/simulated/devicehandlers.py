"""Step handlers for the PCIe functions of a simulated host: one for each type of `devicesteps`.

The steps of the host's alone (driver, VF settings, reset, link) go on without their guest, as the
real ones do; a function that has vanished counts as undone.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Generic

from virtfabric.adapters.simulated.handlers import S, SimulatedHandler
from virtfabric.model.device import VfSettings, alias_of
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Presence,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.model.errors import (
    DeviceError,
    DeviceGoneError,
    HypervisorError,
    ShortfallError,
)

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.devices import SimulatedDevices
    from virtfabric.adapters.simulated.guest import SimulatedGuest
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.model.device import PciAddress
    from virtfabric.ports import StepHandler


class _OfHost(SimulatedHandler[S], Generic[S]):
    """A change of the host's alone; libvirt tells nobody of it."""

    event = None
    of_host = True

    @property
    def devices(self) -> SimulatedDevices:
        return self.host.devices

    def change(self, step: S, *, lost: bool) -> None:
        self.devices.find(self.place(step))
        if not lost:
            self.put(step)

    def bring(self, guest: SimulatedGuest, step: S, *, lost: bool) -> None:
        self.change(step, lost=lost)

    def compare(self, step: S) -> str:
        self.devices.find(self.place(step))
        return self.problem(step)

    def restore(self, step: S) -> int:
        with suppress(DeviceGoneError):
            self.put(step.inverse())
        return 0

    def place(self, step: S) -> PciAddress:
        """The function that the step is about."""
        return step.address  # type: ignore[attr-defined, no-any-return]

    def put(self, step: S) -> None:
        """Bring about `after`."""
        raise NotImplementedError

    def problem(self, step: S) -> str:
        """How the kernel differs from `after`."""
        raise NotImplementedError


class _BindDriver(_OfHost[BindDriver]):
    step_type = BindDriver

    def put(self, step: BindDriver) -> None:
        self.devices.bind(step.address, step.after)

    def problem(self, step: BindDriver) -> str:
        found = self.devices.find(step.address).shown.driver or ""
        return "" if found == step.after else f"driver {found or 'none'} found"


class _SetUpVf(_OfHost[SetUpVf]):
    step_type = SetUpVf

    def put(self, step: SetUpVf) -> None:
        found = self.devices.find(step.address).shown
        if found.settings is None:
            raise DeviceError(f"PCI function {step.address} is no VF: a PF keeps no settings")
        values = {
            f.name: value
            for f in fields(VfSettings)
            if (value := getattr(step.after, f.name)) is not None
        }
        self.devices.change(step.address, settings=replace(found.settings, **values))

    def problem(self, step: SetUpVf) -> str:
        found = self.devices.find(step.address).shown.settings
        wanted = ((f.name, getattr(step.after, f.name)) for f in fields(VfSettings))
        wrong = [n for n, v in wanted if v is not None and v != getattr(found, n)]
        return f"{', '.join(wrong)} as before" if wrong else ""


class _Reset(_OfHost[ResetFunction]):
    step_type = ResetFunction

    def put(self, step: ResetFunction) -> None:
        found = self.devices.find(step.address)
        if found.user is not None:
            raise DeviceError(f"PCI function {step.address} is still open")
        if not found.shown.resets:
            raise DeviceError(f"PCI function {step.address} cannot be reset")
        found.dirty = False

    def problem(self, step: ResetFunction) -> str:
        return "does not answer" if self.devices.find(step.address).dirty else ""

    def restore(self, step: ResetFunction) -> int:
        return 0


class _LimitLink(_OfHost[LimitLink]):
    step_type = LimitLink

    def put(self, step: LimitLink) -> None:
        found = self.devices.find(step.address)
        if step.after and step.after not in found.limits:
            raise DeviceError(f"the link below {step.address} cannot be limited")
        found.limit = step.after

    def problem(self, step: LimitLink) -> str:
        found = self.devices.find(step.address).limit
        return "" if found == step.after else f"{found} found"


class _SetProfile(_OfHost[SetProfile]):
    step_type = SetProfile

    def put(self, step: SetProfile) -> None:
        now = self._read(step)
        if now not in (step.before, step.after):
            raise DeviceError(f"PCI function {step.address}: {step.file} is {now}")
        found = self.devices.find(step.address)
        if now != step.after and found.user is not None:
            raise DeviceError(f"PCI function {step.address} is still open")
        found.profiles = found.profiles | {step.file: step.after}

    def problem(self, step: SetProfile) -> str:
        found = self._read(step)
        return "" if found == step.after else f"{found} found"

    def restore(self, step: SetProfile) -> int:
        with suppress(DeviceGoneError):
            found = self.devices.find(step.address).profiles.get(step.file)
            if found == step.after:
                self.put(step.inverse())
        return 0

    def _read(self, step: SetProfile) -> str:
        found = self.devices.find(step.address).profiles.get(step.file)
        if found is None:
            raise DeviceError(f"PCI function {step.address} has no {step.file}")
        return found


class _AttachFunction(SimulatedHandler[AttachFunction]):
    step_type = AttachFunction
    event = None

    def bring(self, guest: SimulatedGuest, step: AttachFunction, *, lost: bool) -> None:
        if step.after is Presence.ATTACHED:
            self._attach(guest, step, lost=lost)
        elif not self._detach(guest, step, lost=lost):
            raise ShortfallError(f"{step.describe()}: the guest does not let it go", reached=1)

    def differs(self, guest: SimulatedGuest, step: AttachFunction) -> str:
        there = step.address in guest.real.functions
        if there == (step.after is Presence.ATTACHED):
            return ""
        return f"QEMU {'still holds' if there else 'does not hold'} it"

    def give_back(self, guest: SimulatedGuest, step: AttachFunction) -> int:
        if step.before is Presence.ATTACHED:
            with suppress(DeviceGoneError):
                self._attach(guest, step, lost=False)
            return 0
        return 0 if self._detach(guest, step, lost=False) else 1

    def amount(self, guest: SimulatedGuest, step: AttachFunction) -> int:
        return int(step.address in guest.real.functions)

    def _attach(self, guest: SimulatedGuest, step: AttachFunction, *, lost: bool) -> None:
        if step.address in guest.real.functions:
            return
        self.host.devices.find(step.address)
        if not guest.free_ports:
            raise HypervisorError("internal error: No more available PCI slots")
        if not lost:
            self.host.devices.open(step.address, guest.spec.uuid)
            guest.real.functions[step.address] = alias_of(step.address)
        guest.said.functions[step.address] = alias_of(step.address)

    def _detach(self, guest: SimulatedGuest, step: AttachFunction, *, lost: bool) -> bool:
        """Whether the guest has let go."""
        if step.address not in guest.real.functions:
            guest.said.functions.pop(step.address, None)
            return True
        if guest.spec.uuid in self.host.faults.keeps_functions:
            guest.unplugging.add(step.address)
            return False
        if lost:
            guest.said.functions.pop(step.address, None)
        else:
            self.host.let_go(guest.spec.uuid, step.address)
        return True


def device_handlers(host: SimulatedHost) -> tuple[StepHandler, ...]:
    """One handler for each of these step types."""
    return (
        _BindDriver(host), _SetUpVf(host), _SetProfile(host), _Reset(host), _LimitLink(host),
        _AttachFunction(host),
    )  # fmt: skip
