"""A recorded machine with CXL memory, laid out so that a test can change its files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.cxl.memory import SysfsMemory
from virtfabric.adapters.pci.record import lay_out

if TYPE_CHECKING:
    from virtfabric.model.cxl import CxlInventory

MACHINES = Path(__file__).parents[2] / "data" / "machines"


class Machine:
    """Sysfs and procfs of one, below a directory of the test's own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.sys, self.proc = lay_out(MACHINES / name, directory)
        self.marks = directory / "marks"

    def memory(self) -> SysfsMemory:
        return SysfsMemory(self.sys, self.proc, marks=self.marks)

    def read(self) -> CxlInventory:
        return self.memory().read_cxl()

    def device(self, name: str) -> Path:
        """The directory of a device on the CXL or the dax bus."""
        bus = "dax" if name.startswith("dax") else "cxl"
        return (self.sys / "bus" / bus / "devices" / name).resolve()

    def memdev(self, serial: str) -> Path:
        """The directory of the memdev with this serial."""
        found = [m for m in self.read().memdevs if str(m.serial) == serial]
        return self.device(found[0].name)

    def drop(self, name: str) -> None:
        """A device of the CXL bus goes away."""
        assert re.fullmatch(r"[a-z0-9.]+", name)
        home = self.device(name)
        (self.sys / "bus/cxl/devices" / name).unlink()
        shutil.rmtree(home)
