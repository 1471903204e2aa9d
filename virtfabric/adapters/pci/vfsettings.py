"""`SetUpVf`: what a PF keeps for its VFs (MAC, VLAN, trust, spoof check, rate), through ip(8).

Each setting is one call, so that one which a driver does not support is named. ip(8) rather than a
netlink library: every libvirt host has it, and its JSON is stable.

Source: ip-link(8), `vf NUM`; include/uapi/linux/if_link.h, IFLA_VFINFO_LIST.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.pci.handler import PciHandler
from virtfabric.model.device import VfSettings
from virtfabric.model.devicesteps import SetUpVf
from virtfabric.model.errors import DeviceError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.model.device import PciAddress
    from virtfabric.ports import StepContext

    Run = Callable[[tuple[str, ...]], subprocess.CompletedProcess[str]]

_WORDS: Final = {
    "mac": "mac", "vlan": "vlan", "trust": "trust", "spoofchk": "spoofchk", "rate": "max_tx_rate",
}  # fmt: skip
"""Setting -> ip(8)'s word, in the order of setting: the VLAN and the rate want a PF that is up."""


def run_ip(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """ip(8) with these arguments.

    Raises:
        DeviceError: it is not installed, or hangs.
    """
    try:
        return subprocess.run(
            ["ip", *arguments], capture_output=True, text=True, check=False, timeout=30,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise DeviceError("ip(8) is not installed", advice="install iproute2") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"ip {' '.join(arguments)}: no answer within 30 s") from None


class VfSettingsFiles:
    """The VF settings of one machine's PFs."""

    def __init__(self, files: FunctionFiles, run: Run = run_ip) -> None:
        """Nothing is asked before a call."""
        self._files = files
        self._run = run

    def read(self, address: PciAddress) -> VfSettings:
        """What the PF keeps for this VF; None for what its driver does not tell.

        Raises:
            DeviceGoneError, DeviceError: no VF, or its PF has no network interface.
        """
        return self._read_one(*self._find(address))

    def read_all(self, pf: PciAddress) -> dict[PciAddress, VfSettings]:
        """Of every VF of a PF, by address; empty where the PF has no network interface."""
        interface = self._interface(pf)
        vfs = self._files.vfs(pf)
        if interface is None or not vfs:
            return {}
        found = self._read_all(interface)
        return {address: found[number] for number, address in vfs.items() if number in found}

    def put(self, address: PciAddress, settings: VfSettings) -> None:
        """Set what differs; repeating is safe.

        Raises:
            DeviceGoneError, DeviceError: names the setting.
        """
        interface, number = self._find(address)
        now = self._read_one(interface, number)
        for name, word in _WORDS.items():
            value = getattr(settings, name)
            if value is not None and value != getattr(now, name):
                text = ("on" if value else "off") if isinstance(value, bool) else str(value)
                call = ("link", "set", "dev", interface, "vf", str(number), word, text)
                done = self._run(call)
                if done.returncode:
                    self._files.path(address)
                    raise DeviceError(
                        f"VF {address} ({interface} vf {number}): {name}={text} is not taken: "
                        f"{_last_line(done.stderr)}",
                        advice=f"leave {name} out of the pool's settings if the driver has none"
                        + (f"; is {interface} up?" if name == "rate" else ""),
                    )

    def _find(self, address: PciAddress) -> tuple[str, int]:
        """The PF's interface and the VF's number."""
        pf = self._files.pf(address)
        if pf is None:
            raise DeviceError(f"PCI function {address} is no VF: a PF keeps no settings for it")
        number = next((n for n, vf in self._files.vfs(pf).items() if vf == address), None)
        interface = self._interface(pf)
        if interface is None or number is None:
            raise DeviceError(
                f"VF {address}: its PF {pf} has no network interface to set it up through",
                advice="bind the PF to its host driver",
            )
        return interface, number

    def _interface(self, pf: PciAddress) -> str | None:
        directory = self._files.path(pf) / "net"
        return (
            min((e.name for e in directory.iterdir()), default=None) if directory.is_dir() else None
        )

    def _read_one(self, interface: str, number: int) -> VfSettings:
        found = self._read_all(interface).get(number)
        if found is None:
            raise DeviceError(f"ip link show dev {interface} tells nothing of VF {number}")
        return found

    def _read_all(self, interface: str) -> dict[int, VfSettings]:
        done = self._run(("-json", "link", "show", "dev", interface))
        if done.returncode:
            raise DeviceError(f"ip link show dev {interface}: {_last_line(done.stderr)}")
        try:
            entries = json.loads(done.stdout)[0].get("vfinfo_list", [])
            return {int(entry["vf"]): _parse_entry(entry) for entry in entries}
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DeviceError(
                f"ip link show dev {interface}: no VF can be read: {error}"
            ) from error


def _parse_entry(entry: dict[str, Any]) -> VfSettings:
    """One VF; ip(8) leaves out a VLAN and a rate of 0, and switches that the driver has not."""
    vlans = entry.get("vlan_list") or [entry]
    return VfSettings(
        mac=entry.get("address"),
        vlan=int(vlans[0].get("vlan", 0)),
        trust=entry.get("trust"),
        spoofchk=entry.get("spoofchk"),
        rate=int(entry.get("rate", {}).get("max_tx", 0) or entry.get("tx_rate", 0)),
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


class SetUpVfHandler(PciHandler[SetUpVf]):
    """Carries out `SetUpVf`."""

    step_type = SetUpVf

    def __init__(self, settings: VfSettingsFiles) -> None:
        """Set through this."""
        super().__init__()
        self._settings = settings

    def bring_about(self, step: SetUpVf, context: StepContext) -> None:
        """Set `after`."""
        self._settings.put(step.address, step.after)

    def give_back(self, step: SetUpVf) -> None:
        """Set `before`."""
        self._settings.put(step.address, step.before)

    def check(self, step: SetUpVf) -> None:
        """The PF tells each value that was to be set."""
        found = self._settings.read(step.address)
        for name in _WORDS:
            wanted, seen = getattr(step.after, name), getattr(found, name)
            if wanted is not None and wanted != seen:
                raise VerificationError(
                    f"VF {step.address}: {name}={wanted} expected, {seen} found"
                )
