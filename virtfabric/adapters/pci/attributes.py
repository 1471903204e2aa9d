"""`Attributes`: the files and links of one function, as values.

Source: Documentation/ABI/testing/sysfs-bus-pci; the words of link speeds are those of
drivers/pci/probe.c (pci_speed_string).
"""

from __future__ import annotations

import posixpath
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from virtfabric.model.device import PciAddress
from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from virtfabric.adapters.pci.tree import SysTree

_SPEED: Final = re.compile(r"(\d+)(?:\.(\d))? GT/s( PCIe)?")
_NO_WIDTH: Final = 255  # PCIE_LNK_WIDTH_UNKNOWN


@lru_cache(maxsize=1 << 14)
def parse_address(text: str) -> PciAddress | None:
    """The address that a name of sysfs is; None for any other name."""
    try:
        return PciAddress.parse(text)
    except InvalidValueError:
        return None


class Attributes:
    """One directory of sysfs. What is not there is None; what is there and wrong is an error."""

    def __init__(self, sys: SysTree, home: str) -> None:
        """`home` is the directory itself, not a link to it."""
        self._sys = sys
        self.home = home

    def number(self, name: str, base: int = 10) -> int | None:
        """A file with one number.

        Raises:
            InvalidValueError: names the file.
        """
        text = self._sys.text(f"{self.home}/{name}")
        return None if text is None else self._number(name, text, base)

    def word(self, name: str) -> str | None:
        """A file with one word; sysfs writes no word as nothing or `(null)`."""
        text = self._sys.text(f"{self.home}/{name}")
        return None if text in (None, "", "(null)") else text

    def config(self, limit: int) -> bytes:
        """The configuration space as far as this process may read it."""
        return self._sys.data(f"{self.home}/config", limit) or b""

    def capability(self, offset: int | None, size: int) -> bytes:
        """A piece of the configuration space; empty for None, and where it cannot be read."""
        if offset is None:
            return b""
        return self._sys.piece(f"{self.home}/config", offset, size) or b""

    def among(self, names: re.Pattern[str]) -> frozenset[str]:
        """Which files and directories of these names the function has."""
        return frozenset(self._sys.inodes(self.home, names))

    def target(self, name: str) -> str | None:
        """The last part of where a link leads."""
        link = self._sys.link(f"{self.home}/{name}")
        return None if link is None else posixpath.basename(link)

    def function(self, name: str) -> PciAddress | None:
        """The function that a link leads to."""
        return parse_address(self.target(name) or "")

    def group(self) -> int | None:
        """The IOMMU group.

        Raises:
            InvalidValueError: the link leads elsewhere.
        """
        target = self.target("iommu_group")
        return None if target is None else self._number("iommu_group", target, 10)

    def vfs(self) -> dict[int, PciAddress]:
        """VFs by number."""
        links = self._sys.names(self.home, re.compile(r"virtfn\d+"))
        found = {int(name.removeprefix("virtfn")): self.function(name) for name in links}
        return {number: vf for number, vf in sorted(found.items()) if vf is not None}

    def speed(self, name: str) -> int:
        """A file with the speed of a link, MT/s; 0 where it is not told.

        Raises:
            InvalidValueError: names the file.
        """
        text = self._sys.text(f"{self.home}/{name}")
        if text is None or text.startswith("Unknown"):
            return 0
        match = _SPEED.fullmatch(text)
        if match is None:
            raise InvalidValueError(self._path(name), text, "is not a link speed")
        return int(match[1]) * 1000 + int(match[2] or 0) * 100

    def width(self, name: str) -> int:
        """A file with the width of a link; 0 where it is not told.

        Raises:
            InvalidValueError: names the file.
        """
        width = self.number(name) or 0
        return 0 if width == _NO_WIDTH else width

    def fatal_errors(self) -> int | None:
        """Fatal errors that it counted itself (AER); None where it counts none.

        Source: Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats.

        Raises:
            InvalidValueError: names the file.
        """
        counted = dict(
            line.rsplit(maxsplit=1)
            for line in (self._sys.text(f"{self.home}/aer_dev_fatal") or "").splitlines()
            if " " in line
        )
        total = counted.get("TOTAL_ERR_FATAL")
        return None if total is None else self._number("aer_dev_fatal", total, 10)

    def _number(self, name: str, text: str, base: int) -> int:
        try:
            return int(text, base)
        except ValueError:
            raise InvalidValueError(self._path(name), text, "is not a number") from None

    def _path(self, name: str) -> str:
        return str(self._sys.root / self.home / name)
