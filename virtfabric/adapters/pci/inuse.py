"""Whether the host uses a function at this very moment: the question before a driver is taken away.

A file system or swap on it, a block device made of it, an interface that is up or part of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.model.device import PciAddress

_IFF_UP: Final = 1


def _read_number(device: Path) -> str:
    """`major:minor`; empty for a path of a multipath disk (nvme0c1n1), which has none."""
    try:
        return (device / "dev").read_text().strip()
    except OSError:
        return ""


class HostUses:
    """Asks sysfs and /proc; called with an address it tells the uses, for people."""

    def __init__(self, files: FunctionFiles, proc: Path = Path("/proc")) -> None:
        """Nothing is read before a call."""
        self._files = files
        self._proc = proc

    def __call__(self, address: PciAddress) -> tuple[str, ...]:
        """Empty when the host does not use it.

        Raises:
            DeviceGoneError
        """
        path = self._files.path(address).resolve()
        return (*self._read_network(path), *self._read_blocks(path))

    def _read_network(self, path: Path) -> Iterator[str]:
        for interface in sorted(path.glob("**/net/*/flags")):
            name = interface.parent.name
            if int(interface.read_text(), 16) & _IFF_UP:
                yield f"{name} is up"
            master = interface.parent / "master"
            if master.is_symlink():
                yield f"{name} is part of {master.readlink().name}"

    def _read_blocks(self, path: Path) -> Iterator[str]:
        mounts, swaps = self._read_mounts(), self._read_swaps()
        places = (path, *self._find_subsystems(path))
        for device in sorted((self._files.root / "class" / "block").glob("*")):
            if not any(device.resolve().is_relative_to(place) for place in places):
                continue
            mount = mounts.get(_read_number(device)) or mounts.get(device.name)
            if mount:
                yield f"{device.name} is on {mount}"
            if device.name in swaps:
                yield f"{device.name} is swap"
            for holder in sorted((device / "holders").glob("*")):
                yield f"{device.name} is part of {holder.name}"

    def _find_subsystems(self, path: Path) -> Iterator[Path]:
        """Of an NVMe controller: with multipath its disks hang below the subsystem."""
        for controller in path.glob("nvme/nvme*"):
            for entry in (self._files.root / "class" / "nvme-subsystem").glob("*/nvme*"):
                if entry.name == controller.name:
                    yield entry.parent.resolve()

    def _read_mounts(self) -> dict[str, str]:
        """Mount point by `major:minor`, and by the device's name, which says more for btrfs."""
        found = {}
        for line in (self._proc / "self" / "mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            fields = before.split()
            found[fields[2]] = fields[4]
            source = after.split()[1]
            if source.startswith("/dev/"):
                found[Path(source).name] = fields[4]
        return found

    def _read_swaps(self) -> frozenset[str]:
        lines = (self._proc / "swaps").read_text().splitlines()[1:]
        return frozenset(Path(line.split()[0]).name for line in lines if line.strip())
