"""`Census`: the functions of one host as last read; reads again what may be another now.

It owns what was read before. What a function is lasts as long as its link on the bus, which sysfs
never gives the same inode number twice: so nobody has to be told that one came or went. How it is
(driver, VFs, link, uses, errors) is read each time, of all functions or of those asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci import configspace
from virtfabric.adapters.pci.attributes import Attributes
from virtfabric.adapters.pci.lasting import Lasting, complete, read_lasting
from virtfabric.adapters.pci.uses import HostUses, read_uses
from virtfabric.model.device import Link, PciAddress, PciFunction

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from virtfabric.adapters.pci.tree import SysTree

DEVICES: Final = "bus/pci/devices"
ADDRESS: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_VIRTUAL: Final = "sriov_totalvfs"


@dataclass(slots=True)
class Reading:
    """What is known of all functions.

    Attributes:
        inodes: of the links on the bus, in order of the addresses.
        homes: where each is: its path below `devices`, which names everything above it.
        lasting: what it is; none of one that was going away.
        functions: as each by itself tells.
        vfs: of those that can have any, by number.
        newcomers: those of which something lasting was not known at the reading before.
    """

    inodes: dict[PciAddress, int] = field(default_factory=dict)
    homes: dict[PciAddress, str] = field(default_factory=dict)
    lasting: dict[PciAddress, Lasting] = field(default_factory=dict)
    functions: dict[PciAddress, PciFunction] = field(default_factory=dict)
    vfs: dict[PciAddress, dict[int, PciAddress]] = field(default_factory=dict)
    newcomers: frozenset[PciAddress] = frozenset()

    def joined(self) -> dict[PciAddress, PciFunction]:
        """Each with what others tell of it, by address, in order."""
        return _join_links(_join_vfs(self.functions, self.vfs))


class Census:
    """Not thread-safe."""

    def __init__(self, sys: SysTree, proc: SysTree) -> None:
        """Nothing is read before a call."""
        self._sys, self._proc = sys, proc
        self._last = Reading()

    def read(self, only: Collection[PciAddress] | None = None) -> Reading:
        """Which functions there are, and how they are; `only` these and whoever matters for them.

        Those are their PF, the ports above and the others of their IOMMU group. Of all others, but
        newcomers, it is told what was read last.

        Raises:
            InvalidValueError: a file does not have the form that the kernel documents.
        """
        last, now = self._last, Reading(inodes=read_bus(self._sys))
        for address, inode in now.inodes.items():
            same = last.inodes.get(address) == inode and address in last.homes
            home = last.homes[address] if same else self._sys.link(f"{DEVICES}/{address}")
            if home is not None:
                now.homes[address] = home
                self._look_up(address, now)
        now.newcomers = frozenset(a for a, one in now.lasting.items() if last.lasting.get(a) != one)
        moved = now.newcomers | (last.inodes.keys() - now.inodes.keys())
        asked = now.lasting.keys() if only is None else self._around({*only, *moved}, now)
        self._read_functions(asked, now)
        self._leave_out_the_gone(now)
        self._last = now
        return now

    def _look_up(self, address: PciAddress, now: Reading) -> None:
        """What the function is, as far as that is not known."""
        inode, known = now.inodes[address], self._last.lasting.get(address)
        read = Attributes(self._sys, now.homes[address])
        if known is not None and known.certain and known.inode == inode:
            now.lasting[address] = complete(known, read)
        else:
            found = read_lasting(read, inode)
            if found is not None:
                now.lasting[address] = found

    def _around(self, addresses: set[PciAddress], now: Reading) -> list[PciAddress]:
        """These and those whose state decides on them, and those that nothing is known of yet."""
        found = {a for a in now.lasting if a not in self._last.functions}
        groups = set()
        for address in addresses:
            lasting = now.lasting.get(address)
            before = self._last.functions.get(address)
            if lasting is not None:
                groups.add(lasting.group)
                found |= {address, lasting.pf or address}
            elif before is not None:
                found.add(before.pf or address)
            found.update(_above(now.homes.get(address) or self._last.homes.get(address, "")))
        groups.discard(None)
        return [a for a, one in now.lasting.items() if a in found or one.group in groups]

    def _read_functions(self, asked: Collection[PciAddress], now: Reading) -> None:
        displays = [a for a in asked if "boot_vga" in now.lasting[a].present]
        uses = read_uses(self._sys, self._proc, now.homes, asked, displays)
        known = self._last.functions | {
            address: self._read_function(address, now.lasting[address], uses) for address in asked
        }
        now.functions = {a: known[a] for a in now.lasting}
        for address in asked:
            if now.functions[address].vfs_max:
                now.vfs[address] = Attributes(self._sys, now.homes[address]).vfs()
        rest = self._last.vfs.keys() - set(asked)
        now.vfs |= {pf: self._last.vfs[pf] for pf in rest if pf in now.lasting}

    def _read_function(self, address: PciAddress, known: Lasting, uses: HostUses) -> PciFunction:
        read, there = Attributes(self._sys, known.home), known.present
        acs = read.capability(known.acs, configspace.ACS_BYTES)
        port = known.express if known.bridge else None
        express = read.capability(port, configspace.EXPRESS_BYTES)
        node = read.number("numa_node")
        return PciFunction(
            address=address,
            vendor=known.vendor,
            device=known.device,
            subsystem_vendor=known.subsystem_vendor,
            subsystem_device=known.subsystem_device,
            class_code=known.class_code,
            driver=read.target("driver"),
            driver_override=read.word("driver_override"),
            node=node if node is not None and node >= 0 else None,
            group=known.group,
            parent=uses.parents.get(address),
            bridge=known.bridge,
            pf=known.pf,
            vfs_max=(read.number(_VIRTUAL) or 0) if _VIRTUAL in there else 0,
            link=Link(
                speed=read.speed("current_link_speed") if "current_link_speed" in there else 0,
                width=read.width("current_link_width") if "current_link_width" in there else 0,
                speed_max=known.speed_max,
                width_max=known.width_max,
            ),
            resets=tuple((read.word("reset_method") or "").split())
            if "reset_method" in there
            else (),
            acs=configspace.parse_acs(acs),
            uses=uses.of(address),
            interfaces=uses.interfaces_of(address),
            limit=configspace.parse_target_speed(express),
            fatal_errors=_read_fatal_errors(read, there),
            badge=known.badge,
        )

    def _leave_out_the_gone(self, now: Reading) -> None:
        """Asked last: one that goes away meanwhile answered "none" to some of what was asked."""
        there = read_bus(self._sys)
        for address in [a for a in now.lasting if there.get(a) != now.inodes[a]]:
            for known in (now.lasting, now.functions, now.vfs):
                known.pop(address, None)
            now.newcomers -= {address}


def read_bus(sys: SysTree) -> dict[PciAddress, int]:
    """The functions on the bus in order, with the inode numbers of their links."""
    found = sys.inodes(DEVICES, ADDRESS)
    addresses = {PciAddress(name): inode for name, inode in found.items()}
    return dict(sorted(addresses.items(), key=lambda item: item[0].parts))


def _above(home: str) -> Iterable[PciAddress]:
    """The functions that a path passes, without the one it leads to."""
    return (PciAddress(part) for part in home.split("/")[:-1] if ADDRESS.fullmatch(part))


def _read_fatal_errors(read: Attributes, there: Collection[str]) -> int | None:
    """Fatal errors counted by AER: its own, and at a root port those that reached it.

    An endpoint cannot be asked after a fatal error of its own: then its root port alone counts it
    (drivers/pci/pcie/aer.c: aer_get_device_error_info, pci_rootport_aer_stats_incr).
    """
    own = read.fatal_errors() if "aer_dev_fatal" in there else None
    name = "aer_rootport_total_err_fatal"
    arrived = read.number(name) if name in there else None
    return None if own is None and arrived is None else (own or 0) + (arrived or 0)


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
