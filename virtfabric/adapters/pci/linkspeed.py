"""`LimitLink` through the kernel's PCIe bandwidth controller: a cooling device for each port.

`/sys/class/thermal/cooling_device*/type` is `PCIe_Port_Link_Speed_<address of the port>`; state 0
is the port's fastest speed and each one more is the next slower generation, down to 2.5 GT/s. The
write returns when the link has been trained again. Width cannot be limited.

Source: drivers/thermal/pcie_cooling.c and drivers/pci/pcie/bwctrl.c, Linux 6.13 and later with
CONFIG_PCIE_THERMAL.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.configspace import SPEEDS
from virtfabric.adapters.pci.handler import PciHandler
from virtfabric.model.device import PciAddress
from virtfabric.model.devicesteps import LimitLink
from virtfabric.model.errors import DeviceError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.ports import StepContext

_TYPE: Final = "PCIe_Port_Link_Speed_"


class LinkSpeeds:
    """The links of one machine."""

    def __init__(self, files: FunctionFiles) -> None:
        """Nothing is read before a call."""
        self._files = files

    def offered(self, port: PciAddress) -> tuple[int, ...]:
        """Speeds (MT/s, slowest first) that the link below a port can be limited to.

        Empty where the kernel offers no limit there: it is older than 6.13, or this is no port.
        """
        cooling = self._find_cooling(port)
        return () if cooling is None else SPEEDS[: _read_number(cooling / "max_state") + 1]

    def limit(self, port: PciAddress, speed: int) -> None:
        """Limit the link below a port to `speed` MT/s, 0 for none.

        Raises:
            DeviceGoneError, DeviceError: it is not offered; the link did not come up so.
        """
        self._files.path(port)
        cooling = self._find_cooling(port)
        if cooling is None:
            raise DeviceError(
                f"the link below {port} cannot be limited: this kernel offers no bandwidth "
                "control for it",
                advice="it needs Linux 6.13 or later with CONFIG_PCIE_THERMAL, and a PCIe port",
            )
        top = _read_number(cooling / "max_state")
        offered = SPEEDS[: top + 1]
        if speed and speed not in offered:
            words = ", ".join(f"{one / 1000:g}" for one in offered)
            raise DeviceError(
                f"the link below {port} cannot be limited to {speed / 1000:g} GT/s: "
                f"it offers {words} GT/s"
            )
        state = top - offered.index(speed) if speed else 0
        try:
            self._files.put(cooling / "cur_state", str(state))
        except OSError as error:
            # More than the function behind the port can do: the kernel sets what both can, and
            # tells that it is not what was asked for.
            if error.errno != errno.EAGAIN or self.current(port) > (speed or SPEEDS[-1]):
                raise DeviceError(
                    f"the link below {port}: limiting it to {speed / 1000:g} GT/s: {error.strerror}"
                ) from error

    def current(self, port: PciAddress) -> int:
        """What the link below a port runs at now, MT/s; 0 where nothing is told."""
        return _parse_speed(self._files.read(port, "current_link_speed"))

    def attainable(self, port: PciAddress) -> int:
        """What it would run at without a limit, MT/s: the slower of the port and what is there."""
        speeds = [_parse_speed(self._files.read(port, "max_link_speed"))]
        for entry in sorted(self._files.path(port).resolve().iterdir()):
            if (entry / "max_link_speed").is_file():
                below = self._files.read(PciAddress(entry.name), "max_link_speed")
                speeds.append(_parse_speed(below))
        return min((speed for speed in speeds if speed), default=0)

    def _find_cooling(self, port: PciAddress) -> Path | None:
        for entry in sorted((self._files.root / "class" / "thermal").glob("cooling_device*")):
            try:
                if (entry / "type").read_text().strip() == f"{_TYPE}{port}":
                    return entry
            except OSError:  # it went with its port
                continue
        return None


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path}: {error}") from error


def _parse_speed(text: str | None) -> int:
    """`8.0 GT/s PCIe` in MT/s; 0 for `Unknown` or none."""
    match = re.match(r"([\d.]+) GT/s", text or "")
    return round(float(match[1]) * 1000) if match else 0


class LimitLinkHandler(PciHandler[LimitLink]):
    """Carries out `LimitLink`."""

    step_type = LimitLink

    def __init__(self, links: LinkSpeeds) -> None:
        """Limit these links."""
        super().__init__()
        self._links = links

    def bring_about(self, step: LimitLink, context: StepContext) -> None:
        """Limit to `after`."""
        self._links.limit(step.address, step.after)

    def give_back(self, step: LimitLink) -> None:
        """Limit to `before`. Where nothing is offered, nothing was limited."""
        if self._links.offered(step.address):
            self._links.limit(step.address, step.before)

    def check(self, step: LimitLink) -> None:
        """The link runs as fast as it is allowed to, and no faster."""
        free = self._links.attainable(step.address)
        wanted = min(step.after, free) if step.after else free
        found = self._links.current(step.address)
        if found != wanted:
            raise VerificationError(
                f"the link below {step.address}: {wanted / 1000:g} GT/s expected, "
                f"{found / 1000:g} found"
            )
