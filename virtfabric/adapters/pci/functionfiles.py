"""The files of one PCI function in sysfs: read, written, followed; with the kernel's errors named.

Owns the paths. It decides nothing and waits for nothing.

Source: Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from virtfabric.model.device import PciAddress
from virtfabric.model.errors import DeviceError, DeviceGoneError

_GONE: Final = (FileNotFoundError, ProcessLookupError)


class FunctionFiles:
    """The functions below one `sys` root."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        """Nothing is touched before a call."""
        self.root = root
        self.bus = root / "bus" / "pci"

    def path(self, address: PciAddress) -> Path:
        """Where the kernel shows a function.

        Raises:
            DeviceGoneError: it does not.
        """
        found = self.bus / "devices" / address
        if not found.is_dir():
            raise DeviceGoneError(f"PCI function {address} is not there any more")
        return found

    def read(self, address: PciAddress, name: str) -> str | None:
        """An attribute without its line feed; None where the kernel has none of this name.

        Raises:
            DeviceGoneError, DeviceError
        """
        path = self.path(address) / name
        try:
            return path.read_text().rstrip("\n")
        except FileNotFoundError:
            self.path(address)  # the function itself may have gone
            return None
        except OSError as error:
            raise self._failure(address, f"reading {name}", error) from error

    def write(self, address: PciAddress, name: str, text: str) -> None:
        """Give an attribute this text.

        Raises:
            DeviceGoneError, DeviceError
        """
        try:
            self.put(self.path(address) / name, text)
        except OSError as error:
            raise self._failure(address, f"writing {text!r} to {name}", error) from error

    def put(self, path: Path, text: str) -> None:
        """One write(2) to a file of sysfs. A tree in which nobody answers is overridden here."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def has(self, address: PciAddress, name: str) -> bool:
        """Whether the kernel offers this attribute of the function."""
        return (self.path(address) / name).exists()

    def link(self, address: PciAddress, name: str) -> str | None:
        """The last part of what a symbolic link of the function points to; None without it."""
        try:
            return (self.path(address) / name).readlink().name
        except OSError:
            self.path(address)
            return None

    def driver(self, address: PciAddress) -> str:
        """The driver that is bound now; empty for none."""
        return self.link(address, "driver") or ""

    def pf(self, address: PciAddress) -> PciAddress | None:
        """Of a VF, its PF."""
        found = self.link(address, "physfn")
        return None if found is None else PciAddress(found)

    def vfs(self, address: PciAddress) -> dict[int, PciAddress]:
        """Of a PF, its VFs by number; empty for any other function."""
        numbered = {
            int(entry.name.removeprefix("virtfn")): PciAddress(entry.readlink().name)
            for entry in self.path(address).glob("virtfn*")
        }
        return dict(sorted(numbered.items()))

    def beside(self, address: PciAddress) -> tuple[PciAddress, ...]:
        """The other functions on its bus, in order."""
        own = self.path(address).resolve()
        return tuple(
            PciAddress(entry.name)
            for entry in sorted(own.parent.iterdir())
            if entry.name != own.name and (entry / "vendor").is_file()
        )

    def is_on_root_bus(self, address: PciAddress) -> bool:
        """Whether there is no bridge above it."""
        return not (self.path(address).resolve().parent / "vendor").is_file()

    def _failure(self, address: PciAddress, doing: str, error: OSError) -> DeviceError:
        if isinstance(error, _GONE) and not (self.bus / "devices" / address).is_dir():
            return DeviceGoneError(f"PCI function {address} is not there any more")
        return DeviceError(f"PCI function {address}: {doing}: {error.strerror}")
