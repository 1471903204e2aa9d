"""`SysfsDeviceTree`: every PCIe function of the host, from sysfs. Reads only.

Source: Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci import configspace
from virtfabric.adapters.pci.attributes import Attributes
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.adapters.pci.uses import HostUses, read_uses
from virtfabric.adapters.pci.watch import DeviceWatcher
from virtfabric.model.device import PciAddress, PciFunction
from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.model.device import VfSettings

    ReadSettings = Callable[[PciAddress], Mapping[PciAddress, VfSettings]]
    """What a PF keeps for each of its VFs."""

log = logging.getLogger(__name__)

DEVICES: Final = "bus/pci/devices"
_ADDRESS: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_BRIDGE_CLASS: Final = 0x0604


class SysfsDeviceTree:
    """The host's functions; a DeviceTree."""

    def __init__(
        self,
        root: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        settings: ReadSettings | None = None,
    ) -> None:
        """Read below these, and VF settings by `settings`; nothing is touched before a call."""
        self._sys, self._proc = SysTree(root), SysTree(proc)
        self._settings = settings
        self._watchers: list[DeviceWatcher] = []

    def read_functions(self) -> dict[PciAddress, PciFunction]:
        """All functions by address, in order.

        Raises:
            InvalidValueError: a file does not have the form that the kernel documents.
        """
        functions = read_functions(self._sys, self._proc)
        return functions if self._settings is None else _add_settings(functions, self._settings)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` from a thread of its own when functions or their uses have changed."""
        watcher = DeviceWatcher(changed, proc=self._proc.root)
        self._watchers.append(watcher)
        watcher.start()

    def close(self) -> None:
        """Stop watching; safe to repeat."""
        while self._watchers:
            self._watchers.pop().close()


class CurrentUses:
    """How the host uses a function at this very moment: asked before a driver is taken away."""

    def __init__(self, root: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        """Read below these; nothing is read before a call."""
        self._sys, self._proc = SysTree(root), SysTree(proc)

    def __call__(self, address: PciAddress) -> tuple[str, ...]:
        """For people; empty when it does not."""
        uses = read_uses(self._sys, self._proc, _read_homes(self._sys))
        return tuple(map(str, uses.of(address)))


def read_functions(sys: SysTree, proc: SysTree) -> dict[PciAddress, PciFunction]:
    """As the method of the class, of any two trees."""
    homes = _read_homes(sys)
    uses = read_uses(sys, proc, homes)
    functions, vfs = {}, {}
    for address, home in homes.items():
        attributes = Attributes(sys, home)
        function = _read_function(attributes, address, uses)
        if function is not None:
            functions[address] = function
            vfs[address] = attributes.vfs() if function.vfs_max else {}
    return _join_links(_join_vfs(functions, vfs))


def _read_homes(sys: SysTree) -> dict[PciAddress, str]:
    """Where each function is: its path below `devices`, which names everything above it."""
    found = {}
    for name in sys.names(DEVICES, _ADDRESS):
        home = sys.link(f"{DEVICES}/{name}")
        if home is not None:
            found[PciAddress.parse(name)] = home
    return dict(sorted(found.items(), key=lambda item: item[0].parts))


def _read_function(read: Attributes, address: PciAddress, uses: HostUses) -> PciFunction | None:
    """None when it vanished meanwhile."""
    vendor, device, class_code = (read.number(name, 16) for name in ("vendor", "device", "class"))
    config = read.config(configspace.SIZE)
    bridge = configspace.parse_bridge(config)
    node = read.number("numa_node")
    function = PciFunction(
        address=address,
        vendor=vendor or 0,
        device=device or 0,
        subsystem_vendor=read.number("subsystem_vendor", 16) or 0,
        subsystem_device=read.number("subsystem_device", 16) or 0,
        class_code=class_code or 0,
        driver=read.target("driver"),
        driver_override=read.word("driver_override"),
        node=node if node is not None and node >= 0 else None,
        group=read.group(),
        parent=uses.parents.get(address),
        bridge=(class_code or 0) >> 8 == _BRIDGE_CLASS if bridge is None else bridge,
        pf=read.function("physfn"),
        vfs_max=read.number("sriov_totalvfs") or 0,
        link=read.link(),
        resets=tuple((read.word("reset_method") or "").split()),
        acs=configspace.parse_acs(config),
        uses=uses.of(address),
        interfaces=uses.interfaces_of(address),
        limit=configspace.parse_target_speed(config) if bridge else None,
        fatal_errors=read.fatal_errors(),
    )
    # Asked last: one that goes away meanwhile answers "none" to some of the above.
    whole = None not in (vendor, device, class_code) and read.is_there()
    return function if whole else None


def _join_vfs(
    functions: dict[PciAddress, PciFunction],
    vfs: dict[PciAddress, dict[int, PciAddress]],
) -> dict[PciAddress, PciFunction]:
    """PFs learn their VFs by number, and VFs their number."""
    joined = dict(functions)
    for pf, numbered in vfs.items():
        there = {number: vf for number, vf in numbered.items() if vf in functions}
        joined[pf] = replace(joined[pf], vfs=tuple(there.values()))
        for number, vf in there.items():
            joined[vf] = replace(joined[vf], vf_index=number)
    return joined


def _join_links(functions: dict[PciAddress, PciFunction]) -> dict[PciAddress, PciFunction]:
    """What a port aims at limits its link only where it could do more, and what is below it too."""
    ends: dict[PciAddress, list[int]] = {}
    for one in functions.values():
        for port in (one.address, one.parent):
            if port is not None and one.link.speed_max:
                ends.setdefault(port, []).append(one.link.speed_max)
    limits = {one.address: one.limit for one in functions.values() if one.limit is not None}
    return functions | {
        port: replace(functions[port], limit=aim if aim < min(ends.get(port, [aim])) else 0)
        for port, aim in limits.items()
    }


def _add_settings(
    functions: dict[PciAddress, PciFunction], read: ReadSettings
) -> dict[PciAddress, PciFunction]:
    """VFs learn what their PF keeps for them, as far as it tells."""
    known = dict(functions)
    for pf in [one.address for one in functions.values() if one.vfs]:
        try:
            settings = read(pf)
        except VirtfabricError as error:  # the PF is going away, or its driver is
            log.warning("VF settings of PF %s are not known: %s", pf, error)
            continue
        known |= {vf: replace(known[vf], settings=settings[vf]) for vf in settings if vf in known}
    return known
