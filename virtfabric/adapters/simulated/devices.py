"""The PCIe functions of a simulated host: what the kernel shows, and who has them.

Its host locks. There is one truth: what sysfs shows is what is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from virtfabric.model.device import (
    VFIO_PCI,
    DeviceNews,
    HostUse,
    Link,
    PciAddress,
    PciFunction,
    UseKind,
    VfSettings,
)
from virtfabric.model.errors import DeviceError, DeviceGoneError, HypervisorError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterable

    from virtfabric.model.ids import GuestId

NO_SETTINGS: Final = VfSettings(mac="00:00:00:00:00:00", vlan=0, trust=False, spoofchk=True, rate=0)
"""What igb keeps for a VF that nobody has set up."""


_NETWORK: Final = 0x02
"""PCI class."""


@dataclass
class SimulatedFunction:
    """One function.

    Attributes:
        shown: as the kernel shows it; replaced whole when it changes.
        user: the guest whose QEMU has it open.
        dirty: a guest used it since the last reset.
        limit: of a port, what its link is limited to in MT/s; 0 for no limit.
        limits: of a port, what its link can be limited to; empty where the kernel offers nothing.
        home: the driver that libvirt gives it back to, while `managed='yes'` has it.
        profiles: files that take a profile, with what they say; replaced whole when one changes.
        vfio_drivers: under which vfio can open it.
    """

    shown: PciFunction
    user: GuestId | None = None
    dirty: bool = False
    limit: int = 0
    limits: tuple[int, ...] = ()
    home: str | None = None
    profiles: dict[str, str] = field(default_factory=dict)
    vfio_drivers: tuple[str, ...] = (VFIO_PCI,)


class SimulatedDevices:
    """Implements `ports.DeviceTree` and `VfMaker`; what changes is told to `watch`'s caller."""

    def __init__(self, lock: threading.RLock, functions: Iterable[SimulatedFunction] = ()) -> None:
        self._lock = lock
        self._functions = {one.shown.address: one for one in functions}
        self._changed: Callable[[DeviceNews], None] | None = None

    # -- what the port asks ---------------------------------------------------------------------

    def read_functions(
        self,
        only: Collection[PciAddress] | None = None,
        settings: Collection[PciAddress] | None = None,
    ) -> dict[PciAddress, PciFunction]:
        """All of them as they are now, by address."""
        with self._lock:
            found = {a: self._functions[a] for a in sorted(self._functions)}
            return {
                a: replace(one.shown, limit=one.limit) if one.limits else one.shown
                for a, one in found.items()
            }

    def watch(self, changed: Callable[[DeviceNews], None]) -> None:
        """Call `changed` at each change, in the thread that makes it."""
        self._changed = changed

    def close(self) -> None:
        """Call nobody any more; safe to repeat."""
        self._changed = None

    def ensure(self, pf: PciAddress, count: int) -> int:
        """Make VFs where there are none."""
        with self._lock:
            shown = self.find(pf).shown
            if not 0 < count <= shown.vfs_max:
                raise DeviceError(f"PF {pf}: {count} VFs asked for, it can have {shown.vfs_max}")
            if shown.vfs:
                return len(shown.vfs)
            domain, bus, slot, _ = shown.address.parts
            first_group = 1 + max((o.shown.group or 0 for o in self._functions.values()), default=0)
            for index in range(count):
                place = f"{domain:04x}:{bus:02x}:{slot + 16 + index // 8:02x}.{index % 8}"
                vf = replace(
                    shown, address=PciAddress(place), driver=None, group=first_group + index,
                    pf=pf, vf_index=index, vfs=(), vfs_max=0, uses=(), interfaces=(),
                    resets=("flr",),
                    settings=NO_SETTINGS if shown.class_code >> 16 == _NETWORK else None,
                )  # fmt: skip
                self._functions[vf.address] = SimulatedFunction(vf)
                shown = replace(shown, vfs=(*shown.vfs, vf.address))
            self.change(pf, vfs=shown.vfs)
            return count

    def ensure_nvme(self, pf: PciAddress, queues: int) -> None:
        """Any controller has enough."""
        self.find(pf)

    # -- what happens beside the agent ----------------------------------------------------------

    def plug(self, function: SimulatedFunction) -> None:
        """A function is there from now on."""
        with self._lock:
            self._functions[function.shown.address] = function
        self._tell(function.shown.address)

    def remove(self, address: PciAddress) -> None:
        """A function is taken out without a word, whoever has it."""
        with self._lock:
            self._functions.pop(address, None)
        self._tell(address)

    def change(self, address: PciAddress, **values: object) -> None:
        """The kernel shows something else of a function: `uses`, `driver`..."""
        with self._lock:
            found = self.find(address)
            found.shown = replace(found.shown, **values)  # type: ignore[arg-type]
        self._tell(address)

    # -- for the handlers, under the host's lock ------------------------------------------------

    def find(self, address: PciAddress) -> SimulatedFunction:
        """One function, the live object.

        Raises:
            DeviceGoneError
        """
        found = self._functions.get(address)
        if found is None:
            raise DeviceGoneError(f"PCI function {address} is not there any more")
        return found

    def knows(self, address: PciAddress) -> bool:
        """Whether it is there."""
        return address in self._functions

    def bind(self, address: PciAddress, driver: str) -> None:
        """Bring it to a driver, empty for none.

        Raises:
            DeviceGoneError
            DeviceError: the host uses it, or a guest has it open.
        """
        found = self.find(address)
        if (found.shown.driver or "") == driver:
            return
        if found.shown.uses:
            raise DeviceError(
                f"PCI function {address} is in use by the host: "
                f"{'; '.join(map(str, found.shown.uses))}"
            )
        if found.user is not None:
            raise DeviceError(f"PCI function {address} is still open")
        override = VFIO_PCI if driver == VFIO_PCI else None
        self.change(address, driver=driver or None, driver_override=override)

    def open(self, address: PciAddress, guest: GuestId) -> None:
        """A guest's QEMU opens it.

        Raises:
            DeviceGoneError
            HypervisorError: another has it, or no vfio driver does.
        """
        found = self.find(address)
        if found.user not in (None, guest):
            raise HypervisorError(f"PCI device {address} is in use by driver QEMU")
        if found.shown.driver not in found.vfio_drivers:
            raise HypervisorError(f"{address} is bound to {found.shown.driver or 'no driver'}")
        found.user, found.dirty = guest, True

    def release(self, guest: GuestId, address: PciAddress | None = None) -> None:
        """A guest's QEMU closes one function, or all; libvirt gives back what it manages."""
        for one in list(self._functions.values()):
            if one.user == guest and address in (None, one.shown.address):
                one.user = None
                if one.home is not None:
                    self.bind(one.shown.address, one.home)
                    one.home = None

    def adopt(self, address: PciAddress, guest: GuestId) -> None:
        """libvirt itself binds a function of a guest that starts (`managed='yes'`)."""
        found = self.find(address)
        driver = found.shown.driver or ""
        self.bind(address, VFIO_PCI)
        self.open(address, guest)
        found.home = driver

    def _tell(self, address: PciAddress) -> None:
        if self._changed is not None:
            self._changed(DeviceNews(frozenset({address}), time.monotonic()))


def small_devices() -> tuple[SimulatedFunction, ...]:
    """Those of `virtfabricd --simulate`: a NIC with four VFs, a crypto function, a boot disk."""
    gen3 = Link(speed=8000, width=4, speed_max=8000, width_max=4)
    network, storage, crypto, root = (
        PciAddress(f"0000:00:{text}") for text in ("10.0", "10.1", "10.2", "1f.0")
    )
    pf = PciAddress("0000:01:00.0")
    vfs = tuple(PciAddress(f"0000:01:10.{index * 2}") for index in range(4))

    def port(address: PciAddress, group: int) -> SimulatedFunction:
        shown = PciFunction(
            address, 0x1B36, 0x000C, class_code=0x060400, driver="pcieport", node=0, group=group,
            bridge=True, link=gen3, acs=True,
        )  # fmt: skip
        return SimulatedFunction(shown, limits=(2500, 5000, 8000))

    def leaf(shown: PciFunction) -> SimulatedFunction:
        return SimulatedFunction(replace(shown, node=0, link=gen3))

    return (
        port(network, 1), port(storage, 2), port(crypto, 3),
        leaf(PciFunction(root, 0x8086, 0x2918, class_code=0x060100, group=4)),
        leaf(
            PciFunction(
                pf, 0x8086, 0x10C9, class_code=0x020000, driver="igb", group=5, parent=network,
                vfs=vfs, vfs_max=7, resets=("flr", "bus"), interfaces=("eth1",),
            )
        ),
        *(
            leaf(
                PciFunction(
                    vf, 0x8086, 0x10CA, class_code=0x020000, group=6 + index, parent=network,
                    pf=pf, vf_index=index, resets=("flr",), settings=NO_SETTINGS,
                )
            )
            for index, vf in enumerate(vfs)
        ),
        leaf(
            PciFunction(
                PciAddress("0000:02:00.0"), 0x1B36, 0x0010, class_code=0x010802, driver="nvme",
                group=10, parent=storage, resets=("flr", "bus"), interfaces=("nvme0n1",),
                uses=(HostUse(UseKind.MOUNTED, "nvme0n1p1 on /"),),
            )
        ),
        leaf(
            PciFunction(
                PciAddress("0000:03:00.0"), 0x1234, 0x11E8, class_code=0x00FF00, group=11,
                parent=crypto, resets=("bus",),
            )
        ),
    )  # fmt: skip
