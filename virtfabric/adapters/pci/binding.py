"""Drivers of PCI functions: `BindDriver` through `driver_override` and `drivers_probe`.

Never through `new_id`, which changes what a driver takes everywhere. The last line of defence is
here as well: what the host uses at that very moment is not unbound, whatever a plan says.

Source: Documentation/ABI/testing/sysfs-bus-pci (driver_override).
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.handler import PciHandler
from virtfabric.model.device import VFIO_PCI
from virtfabric.model.devicesteps import BindDriver
from virtfabric.model.errors import DeviceError, VerificationError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.adapters.pci.holders import VfioHolders
    from virtfabric.model.device import PciAddress
    from virtfabric.ports import StepContext

    Uses = Callable[[PciAddress], tuple[str, ...]]
    """How the host itself uses a function now, for people; empty when it does not."""

_NO_OVERRIDE: Final = "\n"
_CONTAINER: Final = "vfio_iommu_type1"
"""QEMU maps a guest's memory through it. vfio-pci loads without it (Linux 6.12), and QEMU then says
"No available IOMMU models". It has parameters: its directory is there when it is built in, too."""
_CLOSED_S: Final = 10.0
"""QEMU closes a function within milliseconds; a guest with much memory takes seconds to unpin."""


def load_module(name: str) -> None:
    """modprobe(8). Not an error when there is none of this name: whoever binds looks anyway.

    Raises:
        DeviceError: it is there and does not load.
    """
    try:
        done = subprocess.run(
            ["modprobe", "--", name], capture_output=True, text=True, check=False,
            timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        return
    if done.returncode and "not found" not in done.stderr:
        raise DeviceError(f"modprobe {name}: {done.stderr.strip()}")


class DriverBinder:
    """Brings functions to drivers; everything absolute and safe to repeat."""

    def __init__(
        self,
        files: FunctionFiles,
        holders: VfioHolders,
        uses: Uses,
        load: Callable[[str], None] = load_module,
    ) -> None:
        """Work on these files; `uses` is asked right before a driver is taken away."""
        self._files = files
        self._holders = holders
        self._uses = uses
        self._load = load

    def bind(
        self, address: PciAddress, driver: str, cancelled: threading.Event | None = None
    ) -> None:
        """Bring it to `driver`, empty for none.

        While vfio-pci has it, `driver_override` keeps every other driver away, also one that is
        loaded later; with any other driver, a vendor's vfio driver too, nothing of this agent's
        stays behind.

        Raises:
            DeviceGoneError, DeviceError, StepCancelledError
        """
        if driver == VFIO_PCI and not (self._files.root / "module" / _CONTAINER).is_dir():
            self._load(_CONTAINER)
        if self._files.driver(address) != driver:
            self._release(address, cancelled)
            if driver:
                self._probe(address, driver)
        self._set_override(address, driver if driver == VFIO_PCI else "")

    def _release(self, address: PciAddress, cancelled: threading.Event | None) -> None:
        bound = self._files.driver(address)
        if not bound:
            return
        if uses := self._uses(address):
            raise DeviceError(
                f"PCI function {address} is in use by the host: {'; '.join(uses)}",
                advice="unmount it or set the interface down first",
            )
        if self._holders.is_openable(address):
            # The kernel would wait inside the unbind until the last user closes it, for ever.
            self._holders.wait_closed(address, _CLOSED_S, cancelled)
        self._files.write(address, "driver/unbind", address)

    def _probe(self, address: PciAddress, driver: str) -> None:
        if not (self._files.bus / "drivers" / driver).is_dir():
            self._load(driver)
        self._set_override(address, driver)
        try:
            self._files.put(self._files.bus / "drivers_probe", address)
        except OSError as error:
            self._files.path(address)
            raise DeviceError(
                f"PCI function {address}: driver {driver} does not take it: {error.strerror}"
            ) from error
        # A probe that finds no driver, or a driver that declines, is no error to the kernel.
        if (found := self._files.driver(address)) != driver:
            raise DeviceError(
                f"PCI function {address}: driver {driver} did not take it, "
                f"{found or 'none'} is bound",
                advice=f"is the module {driver} there? See dmesg",
            )

    def _set_override(self, address: PciAddress, driver: str) -> None:
        if read_override(self._files, address) != driver:
            self._files.write(address, "driver_override", driver or _NO_OVERRIDE)


def read_override(files: FunctionFiles, address: PciAddress) -> str:
    """`driver_override`; empty where it is not set, which the kernel shows as `(null)`."""
    found = files.read(address, "driver_override") or ""
    return "" if found == "(null)" else found


class BindDriverHandler(PciHandler[BindDriver]):
    """Carries out `BindDriver`."""

    step_type = BindDriver

    def __init__(self, files: FunctionFiles, binder: DriverBinder) -> None:
        """Bind by this binder."""
        super().__init__()
        self._files = files
        self._binder = binder

    def bring_about(self, step: BindDriver, context: StepContext) -> None:
        """Bind `after`."""
        self._binder.bind(step.address, step.after, context.cancelled)

    def give_back(self, step: BindDriver) -> None:
        """Bind `before` again, and take the override away."""
        self._binder.bind(step.address, step.before)

    def check(self, step: BindDriver) -> None:
        """The driver link says so, and so does the override."""
        found = self._files.driver(step.address)
        if found != step.after:
            raise VerificationError(
                f"PCI function {step.address}: driver {step.after or 'none'} expected, "
                f"{found or 'none'} found"
            )
        wanted = VFIO_PCI if step.after == VFIO_PCI else ""
        override = read_override(self._files, step.address)
        if override != wanted:
            raise VerificationError(
                f"PCI function {step.address}: driver_override {wanted or 'none'} expected, "
                f"{override or 'none'} found"
            )
