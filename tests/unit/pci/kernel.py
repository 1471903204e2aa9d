"""A sysfs tree on disk, and the kernel's answers to what is written into it.

`Machine` makes the tree; `AnsweringFiles` is `FunctionFiles` whose writes have the effects that
Linux 6.12 showed in the lab: drivers bind, links train, VFs appear.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.model.device import PciAddress

if TYPE_CHECKING:
    from pathlib import Path

SPEEDS = (2500, 5000, 8000, 16000, 32000, 64000)


def a(text: str) -> PciAddress:
    return PciAddress.parse(text)


class Machine:
    """One host below `root`: `sys`, `proc`."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "sys", root / "proc"
        self.bus = self.sys / "bus" / "pci"
        for directory in (self.bus / "devices", self.bus / "drivers", self.sys / "class" / "block"):
            directory.mkdir(parents=True)
        (self.bus / "drivers_probe").touch()
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "mountinfo").write_text("1 1 0:1 / / rw - rootfs none rw\n")
        (self.proc / "swaps").write_text("Filename Type Size Used Priority\n")
        self.matches: dict[str, str] = {}
        """Address -> driver that claims it when there is no override."""
        self.declines: set[str] = set()
        """Drivers whose probe finds nothing to its liking: no error, no driver."""
        self.files = AnsweringFiles(self)

    def add_driver(self, name: str) -> None:
        directory = self.bus / "drivers" / name
        directory.mkdir()
        (directory / "unbind").touch()

    def add(
        self,
        address: PciAddress,
        *,
        parent: PciAddress | None = None,
        group: int | None = None,
        driver: str = "",
        pf: PciAddress | None = None,
        **attributes: str,
    ) -> Path:
        above = self.path(parent) if parent else self.sys / "devices" / "pci0000:00"
        path = above / address
        path.mkdir(parents=True)
        values = {"vendor": "0x8086", "enable": "0", "driver_override": "(null)"} | attributes
        for name, text in values.items():
            (path / name).write_text(f"{text}\n")
        (path / "config").write_bytes(bytes(64))
        (self.bus / "devices" / address).symlink_to(path)
        if group is not None:
            members = self.sys / "kernel" / "iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (path / "iommu_group").symlink_to(members.parent)
        if pf is not None:
            number = len(list(self.path(pf).glob("virtfn*")))
            (path / "physfn").symlink_to(self.path(pf))
            (self.path(pf) / f"virtfn{number}").symlink_to(path)
        if driver:
            self.link_driver(address, driver)
        return path

    def path(self, address: PciAddress) -> Path:
        return (self.bus / "devices" / address).resolve()

    def link_driver(self, address: PciAddress, driver: str) -> None:
        if not (self.bus / "drivers" / driver).exists():
            self.add_driver(driver)
        (self.path(address) / "driver").symlink_to(self.bus / "drivers" / driver)

    def driver(self, address: PciAddress) -> str:
        link = self.path(address) / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def remove(self, address: PciAddress) -> None:
        """Taken out without a word."""
        (self.bus / "devices" / address).unlink()

    def add_process(self, pid: int, *targets: str) -> Path:
        directory = self.proc / str(pid) / "fd"
        directory.mkdir(parents=True)
        for number, target in enumerate(targets):
            (directory / str(number)).symlink_to(target)
        return directory

    def add_cooling(self, port: PciAddress, fastest: int, number: int = 0) -> Path:
        directory = self.sys / "class" / "thermal" / f"cooling_device{number}"
        directory.mkdir(parents=True)
        (directory / "type").write_text(f"PCIe_Port_Link_Speed_{port}\n")
        (directory / "max_state").write_text(f"{SPEEDS.index(fastest)}\n")
        (directory / "cur_state").write_text("0\n")
        return directory


class AnsweringFiles(FunctionFiles):
    """What the kernel does at a write; anything else is an ordinary file.

    Attributes:
        log: every write, as `name=text` with the function's address in front.
        fails: name of a file -> errno of the next write to it.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.sys)
        self.machine = machine
        self.log: list[str] = []
        self.fails: dict[str, int] = {}

    def put(self, path: Path, text: str) -> None:
        self.log.append(f"{path.name}={text.strip()}")
        if path.name in self.fails:
            number = self.fails.pop(path.name)
            raise OSError(number, os.strerror(number))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        answer = getattr(self, f"_{path.name}", None)
        if answer is None:
            super().put(path, text)
        else:
            answer(path, text.strip())

    def _driver_override(self, path: Path, text: str) -> None:
        path.write_text(f"{text or '(null)'}\n")

    def _current_vgpu_type(self, path: Path, text: str) -> None:
        path.write_text(f"{text}\n")

    def _unbind(self, path: Path, text: str) -> None:
        (self.bus / "devices" / text / "driver").unlink()

    def _drivers_probe(self, path: Path, text: str) -> None:
        device = self.bus / "devices" / text
        override = (device / "driver_override").read_text().strip()
        driver = self.machine.matches.get(text, "") if override == "(null)" else override
        known = driver and (self.bus / "drivers" / driver).is_dir()
        if known and driver not in self.machine.declines and not (device / "driver").is_symlink():
            (device / "driver").symlink_to(self.bus / "drivers" / driver)

    def _sriov_numvfs(self, path: Path, text: str) -> None:
        if path.read_text().strip() != "0":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        path.write_text(f"{text}\n")
        probe = (path.parent / "sriov_drivers_autoprobe").read_text().strip() == "1"
        for number in range(int(text)):
            vf = a(f"0000:01:10.{number}")
            self.machine.add(vf, pf=a(path.parent.name), driver="igbvf" if probe else "")

    def _cur_state(self, path: Path, text: str) -> None:
        port = a((path.parent / "type").read_text().strip().rpartition("Speed_")[2])
        top = int((path.parent / "max_state").read_text())
        asked = SPEEDS[top - int(text)]
        below = [
            round(float(speed.read_text().split()[0]) * 1000)
            for speed in self.machine.path(port).glob("*:*/max_link_speed")
        ]
        reached = min([asked, *below])
        current = self.machine.path(port) / "current_link_speed"
        current.write_text(f"{reached / 1000:.1f} GT/s PCIe\n")
        path.write_text(f"{text}\n")
        if reached != asked:  # pcie_set_target_speed
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
