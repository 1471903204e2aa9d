"""`FakeSys`: a sysfs and a procfs written by hand, as the kernel lays them out."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.inventory import SysfsDeviceTree

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.model.device import PciAddress, PciFunction

ROOT_BUS = "devices/pci0000:00"


class FakeSys:
    """Starts empty; every method adds something. Paths are below sysfs."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "sys", root / "proc"
        self.write_proc("self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n")
        self.write_proc("swaps", "Filename Type Size Used Priority\n")

    def write(self, path: str, text: str | bytes) -> None:
        target = self.sys / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())

    def write_proc(self, path: str, text: str) -> None:
        target = self.proc / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def link(self, path: str, target: str) -> None:
        """A relative link, both ends below sysfs."""
        place = self.sys / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(posixpath.relpath(target, posixpath.dirname(path)))

    def function(self, address: str, above: str = ROOT_BUS, **files: str | bytes) -> str:
        """A function with ids, class and no driver; returns its place."""
        home = f"{above}/{address}"
        plain = {
            "vendor": "0x8086", "device": "0x10c9", "class": "0x020000",
            "subsystem_vendor": "0x1af4", "subsystem_device": "0x1100",
            "numa_node": "-1", "driver_override": "(null)",
        }  # fmt: skip
        for name, content in (plain | files).items():
            self.write(f"{home}/{name}", content)
        self.link(f"bus/pci/devices/{address}", home)
        return home

    def port(self, address: str, above: str = ROOT_BUS, **files: str | bytes) -> str:
        home = self.function(address, above, **({"class": "0x060400"} | files))
        self.driver(home, "pcieport")
        return home

    def driver(self, home: str, name: str) -> None:
        self.link(f"{home}/driver", f"bus/pci/drivers/{name}")

    def group(self, home: str, number: int) -> None:
        self.link(f"{home}/iommu_group", f"kernel/iommu_groups/{number}")

    def vf(self, pf: str, index: int, vf: str) -> None:
        self.link(f"{pf}/virtfn{index}", vf)
        self.link(f"{vf}/physfn", pf)

    def device(self, kind: str, home: str, **files: str) -> str:
        """A device of a class, such as `block`; returns its place."""
        for name, content in files.items():
            self.write(f"{home}/{name}", content)
        (self.sys / home).mkdir(parents=True, exist_ok=True)
        self.link(f"class/{kind}/{home.rpartition('/')[2]}", home)
        return home

    def disk(self, home: str, number: str, *, holders: tuple[str, ...] = ()) -> str:
        self.device("block", home, dev=number)
        for holder in holders:
            self.link(f"{home}/holders/{holder}", f"devices/virtual/block/{holder}")
        return home

    def mount(self, number: str, point: str, source: str = "/dev/x", kind: str = "ext4") -> None:
        path = self.proc / "self/mountinfo"
        line = f"30 1 {number} / {point} rw,relatime shared:1 - {kind} {source} rw\n"
        path.write_text(path.read_text() + line)

    def swap(self, source: str) -> None:
        path = self.proc / "swaps"
        path.write_text(path.read_text() + f"{source} partition 1048572 0 -2\n")

    def read(self) -> dict[PciAddress, PciFunction]:
        return SysfsDeviceTree(self.sys, self.proc).read_functions()
