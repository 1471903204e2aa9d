"""Steps of functions: what it takes to bring one to a guest, to pass it on, or to give it back.

Owns their order: detached, reset, bound to its vfio driver and the rest of its group to vfio-pci,
set up, given its profile, link limited, attached. It must not choose functions (policy.functions).
What is given back comes last and is optional: a function that cannot be restored is the host's
trouble (quarantine), not the guests'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from virtfabric.model.cardsteps import AssignSlice, BringSlice, SlicePresence
from virtfabric.model.device import VFIO_PCI, Found, HeldFunction, VfSettings
from virtfabric.model.devicesteps import (
    AttachFunction,
    BindDriver,
    LimitLink,
    Presence,
    ResetFunction,
    SetProfile,
    SetUpVf,
)
from virtfabric.policy.functions import replaced_settings
from virtfabric.policy.pools import is_bound_for_guests, pool_of, vfio_driver_of
from virtfabric.policy.stock import Stock

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from virtfabric.model.device import PciAddress, PciFunction
    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId
    from virtfabric.model.ledger import HostSnapshot
    from virtfabric.model.profile import Profile
    from virtfabric.model.step import Step
    from virtfabric.policy.functions import Allotment

_STUB: Final = "pci-stub"
"""Keeps nobody from the group (drivers/vfio/vfio_main.c, `vfio_dev_driver_allowed`)."""


@dataclass
class FunctionSteps:
    """Steps by phase, for functions that come and go.

    Attributes:
        after: every function that somebody holds afterwards.
        detaches: need a guest, and cannot be withdrawn.
        prepares: of the host, before anybody is given anything.
        attaches: need a guest.
        returns: of the host, for functions that nobody has afterwards.
        ends: of slices that were made for a guest and that nobody has afterwards; their functions
            go with them.
    """

    snapshot: HostSnapshot
    after: Mapping[PciAddress, HeldFunction]
    deadline_s: float
    detaches: list[Step] = field(default_factory=list)
    prepares: list[Step] = field(default_factory=list)
    attaches: list[Step] = field(default_factory=list)
    returns: list[Step] = field(default_factory=list)
    ends: list[Step] = field(default_factory=list)
    _handled: set[PciAddress] = field(default_factory=set)
    _passed: dict[PciAddress, HeldFunction] = field(default_factory=dict)
    """What the guest has now that another one gets, as it was prepared for the first."""

    def carry_out(self, allotment: Allotment) -> None:
        """All that an allotment moves."""
        for guest, held in allotment.leaving:
            self.leave(guest, held, passes=held.address in self.after)
        for guest, held in allotment.coming:
            state = self.snapshot.guests.get(guest)
            if state is not None and state.active:
                self.come(state, held)

    def leave(self, guest: GuestId, held: HeldFunction, *, passes: bool) -> None:
        """A function leaves a guest that runs or has gone; `passes`: another one gets it."""
        state, function = self._state(guest), self._function(held.address)
        name = state.name if state else ""
        attached = state is not None and state.active and is_attached(state, held.address)
        if attached:
            self.detaches.append(
                self._attachment(guest, name, held.address, Presence.ATTACHED, Presence.ABSENT)
            )
        used = attached or self._is_used(held)
        theirs = function is None or held.address in self._strangers
        if passes:
            if attached:
                self._passed[held.address] = held
            if used and not theirs:
                # the next guest must not find anything of this one
                self.prepares.append(
                    ResetFunction(guest=guest, name=name, address=held.address, optional=False)
                )
            return
        if used and not theirs:
            self.returns.append(ResetFunction(guest=guest, name=name, address=held.address))
        self._unlimit(guest, name, held.found, used=used)
        if function is not None and not theirs:
            self._restore_settings(guest, name, held, function)
            self._clear_profile(guest, name, held, function, attached=attached)
        for address, driver in ((held.address, held.found.driver), *held.found.siblings):
            self._unbind(guest, name, address, driver)
        self._give_back(held)

    def come(self, state: GuestState, held: HeldFunction) -> None:
        """A function comes to a guest that runs."""
        function = self._function(held.address)
        if function is None:
            return
        self._assign(state.uuid, held)
        former = self._keep_profile(state, held, function)
        self._bind(state, held.address, held.found.vfio_driver)
        for address, _ in held.found.siblings:
            self._bind(state, address, VFIO_PCI, but=(_STUB,))
        pool = pool_of(self.snapshot.devices, held.address)
        before = replaced_settings(function, pool)
        if pool is not None and function.pf is not None and before != pool.settings:
            self.prepares.append(
                SetUpVf(
                    guest=state.uuid, name=state.name, address=held.address,
                    before=before, after=pool.settings,
                )
            )  # fmt: skip
        self._set_profile(state, held, former)
        self._limit(state, held)
        self.attaches.append(
            self._attachment(
                state.uuid, state.name, held.address, Presence.ABSENT, Presence.ATTACHED
            )
        )

    # -- slices -----------------------------------------------------------------------------

    def _assign(self, guest: GuestId, held: HeldFunction) -> None:
        """The card learns who uses its slice from now on."""
        one = self.snapshot.devices.slices.get(held.address)
        if one is not None and one.holder != guest:
            self.prepares.append(
                AssignSlice(key=one.key, card=one.card, before=one.holder, after=guest)
            )

    def _give_back(self, held: HeldFunction) -> None:
        """A slice that was made for a guest ends, any other is nobody's again.

        Optional: what a card cannot be told now it is told when it is back, by the books.
        """
        one = self.snapshot.books.slices.get(held.slice)
        if one is None:
            return
        if one.holder:
            self.ends.append(
                AssignSlice(
                    key=one.key, card=one.card, name=one.slice, optional=True,
                    before=one.holder, after="",
                )
            )  # fmt: skip
        if one.transient:
            self.ends.append(
                BringSlice(
                    key=one.key, card=one.card, spec=one.part, optional=True,
                    before=SlicePresence.GRANTED, after=SlicePresence.ABSENT,
                )
            )  # fmt: skip

    # -- parts ------------------------------------------------------------------------------

    def _bind(
        self, state: GuestState, address: PciAddress, driver: str, but: Container[str] = ()
    ) -> None:
        """To this driver, unless one of `but` has it."""
        function = self._function(address)
        now = (function.driver or "") if function else driver
        if address in self._handled or now == driver or now in but:
            return
        self._handled.add(address)
        self.prepares.append(
            BindDriver(guest=state.uuid, name=state.name, address=address, before=now, after=driver)
        )

    def _keep_profile(
        self, state: GuestState, held: HeldFunction, function: PciFunction
    ) -> Profile | None:
        """The profile that the guest before left and that can stay, or be replaced where it is.

        One in another file, or of a driver that has to go, is taken back first.
        """
        former = self._passed.get(held.address)
        old, new = former.found.profile if former else None, held.found.profile
        if old is None:
            return None
        stays = function.driver == held.found.vfio_driver
        if new is not None and new.file == old.file and stays:
            return old
        self.prepares.append(
            SetProfile(
                guest=state.uuid, name=state.name, address=held.address, file=old.file,
                before=old.value, after=old.none,
            )
        )  # fmt: skip
        return None

    def _set_profile(self, state: GuestState, held: HeldFunction, former: Profile | None) -> None:
        profile = held.found.profile
        if profile is None:
            return
        before = former.value if former else profile.none
        if before != profile.value:
            self.prepares.append(
                SetProfile(
                    guest=state.uuid, name=state.name, address=held.address, file=profile.file,
                    before=before, after=profile.value,
                )
            )  # fmt: skip

    def _clear_profile(
        self,
        guest: GuestId,
        name: str,
        held: HeldFunction,
        function: PciFunction,
        *,
        attached: bool,
    ) -> None:
        """Under another driver the file is not there, nor is what was written into it."""
        profile = held.found.profile
        drivers = (held.found.vfio_driver, vfio_driver_of(self.snapshot.devices, held.address))
        if profile is not None and (attached or function.driver in drivers):
            self.returns.append(
                SetProfile(
                    guest=guest, name=name, address=held.address, file=profile.file, optional=True,
                    before=profile.value, after=profile.none,
                )
            )  # fmt: skip

    def _limit(self, state: GuestState, held: HeldFunction) -> None:
        """The first with a limit sets it; while it has it, nobody sets another."""
        port, speed = held.found.port, held.found.speed
        if port is None or port in self._handled:
            return
        now = self._limit_of(port)
        shared = any(one.found.port == port for one in self._before if one.address != held.address)
        if now == speed or (shared and now != 0):
            return
        self._handled.add(port)
        self.prepares.append(
            LimitLink(guest=state.uuid, name=state.name, address=port, before=now or 0, after=speed)
        )

    def _restore_settings(
        self, guest: GuestId, name: str, held: HeldFunction, function: PciFunction
    ) -> None:
        found, pool = held.found, pool_of(self.snapshot.devices, held.address)
        if not found.settings or function.pf is None:
            return
        now = pool.settings if pool else VfSettings()
        if function.settings is not None:
            now = replaced_settings(function, pool)
        if now != found.settings:
            self.returns.append(
                SetUpVf(
                    guest=guest, name=name, address=held.address, optional=True,
                    before=now, after=found.settings,
                )
            )  # fmt: skip

    def _unlimit(self, guest: GuestId, name: str, found: Found, *, used: bool) -> None:
        """The last with a limit lifts it, also where it lost the function meanwhile."""
        if found.port is None or found.port in self._handled or not self._function(found.port):
            return
        if any(held.found.port == found.port for held in self.after.values()):
            return
        now = self._limit_of(found.port)
        if now is None and used:
            now = found.speed
        if not now:
            return
        self._handled.add(found.port)
        self.returns.append(
            LimitLink(
                guest=guest, name=name, address=found.port, optional=True, before=now, after=0
            )
        )

    def _limit_of(self, port: PciAddress) -> int | None:
        function = self._function(port)
        return function.limit if function else None

    @cached_property
    def _before(self) -> tuple[HeldFunction, ...]:
        """What anybody holds now."""
        holdings = self.snapshot.books.holdings.values()
        return tuple(held for holding in holdings for held in holding.functions)

    def _unbind(self, guest: GuestId, name: str, address: PciAddress, driver: str | None) -> None:
        function = self._function(address)
        now = (function.driver or "") if function else None
        if driver is None or now is None or now == driver or address in self._handled:
            return
        if self._is_needed(address):
            return
        self._handled.add(address)
        self.returns.append(
            BindDriver(
                guest=guest, name=name, address=address, optional=True, before=now, after=driver
            )
        )

    def _attachment(
        self, guest: GuestId, name: str, address: PciAddress, before: Presence, after: Presence
    ) -> AttachFunction:
        return AttachFunction(
            guest=guest, name=name, address=address, before=before, after=after,
            deadline_s=self.deadline_s,
        )  # fmt: skip

    def _is_used(self, held: HeldFunction) -> bool:
        """Whether a guest may have left something in it; of one that vanished, around it."""
        function, devices = self._function(held.address), self.snapshot.devices
        return function is None or is_bound_for_guests(devices, function, held.found)

    def _state(self, guest: GuestId) -> GuestState | None:
        return self.snapshot.guests.get(guest)

    def _function(self, address: PciAddress) -> PciFunction | None:
        return self.snapshot.devices.functions.get(address)

    def _is_needed(self, address: PciAddress) -> bool:
        """Whether it, or one of its group, is with a guest afterwards: vfio takes whole groups."""
        alike = (address, *(one.address for one in self.snapshot.devices.group_of(address)))
        return any(one in self.after or one in self._strangers for one in alike)

    @cached_property
    def _strangers(self) -> Container[PciAddress]:
        return Stock(self.snapshot).strangers


def is_attached(state: GuestState, address: PciAddress) -> bool:
    """Whether the running guest has it now."""
    return any(device.address == address for device in state.devices)
