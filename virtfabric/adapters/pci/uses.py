"""How the host itself uses its functions: what is mounted, up, shown on, or behind them.

Reads only. A device belongs to the nearest function above it in sysfs, whatever lies between
(virtio, SCSI, USB). Not seen here: an interface in another network namespace, a ZFS member.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci.attributes import Attributes, parse_address
from virtfabric.adapters.pci.blocks import find_reached, find_uses, read_block_users, read_blocks
from virtfabric.model.device import HostUse, PciAddress, UseKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtfabric.adapters.pci.tree import SysTree

_ANY: Final = re.compile(r".+")
_UP: Final = 1  # IFF_UP


@dataclass(slots=True)
class HostUses:
    """What was found, by function.

    Attributes:
        parents: the function above each, if there is one.
    """

    parents: dict[PciAddress, PciAddress]
    _uses: dict[PciAddress, list[HostUse]] = field(default_factory=dict)
    _interfaces: dict[PciAddress, set[str]] = field(default_factory=dict)

    def of(self, address: PciAddress) -> tuple[HostUse, ...]:
        """The uses of a function, each once, in the order of their kinds."""
        kinds = list(UseKind)
        found = set(self._uses.get(address, ()))
        return tuple(sorted(found, key=lambda use: (kinds.index(use.kind), use.detail)))

    def interfaces_of(self, address: PciAddress) -> tuple[str, ...]:
        """Network interfaces and whole block devices of a function."""
        return tuple(sorted(self._interfaces.get(address, ())))

    def add(self, address: PciAddress, use: HostUse) -> None:
        """Note a use."""
        self._uses.setdefault(address, []).append(use)

    def add_interface(self, address: PciAddress, name: str) -> None:
        """Note a name."""
        self._interfaces.setdefault(address, set()).add(name)


def read_uses(sys: SysTree, proc: SysTree, homes: Mapping[PciAddress, str]) -> HostUses:
    """All uses of the functions at these places.

    Raises:
        InvalidValueError: a file does not have the form that the kernel documents.
    """
    above = {a: _owner(posixpath.dirname(home), homes) for a, home in homes.items()}
    uses = HostUses({address: parent for address, parent in above.items() if parent is not None})
    _add_bridges(uses)
    _add_blocks(uses, sys, proc, homes)
    _add_networks(uses, sys, homes)
    _add_displays(uses, sys, homes)
    _add_terminals(uses, sys, homes)
    return uses


def _owner(path: str, homes: Mapping[PciAddress, str]) -> PciAddress | None:
    """The nearest function that a path of sysfs passes; None also when it is no longer there.

    Then the port above is not the next best: what is left below the function goes with it.
    """
    for part in reversed(path.split("/")):
        address = parse_address(part) if ":" in part else None
        if address is not None:
            return address if address in homes else None
    return None


def _owned(
    sys: SysTree, directory: str, pattern: re.Pattern[str], homes: Mapping[PciAddress, str]
) -> Iterator[tuple[str, str, PciAddress]]:
    """Name, place and function of each device of a class that is below a function."""
    for name in sys.names(directory, pattern):
        home = sys.link(f"{directory}/{name}")
        owner = _owner(home or "", homes)
        if home is not None and owner is not None:
            yield name, home, owner


def _add_bridges(uses: HostUses) -> None:
    behind: dict[PciAddress, int] = {}
    for parent in uses.parents.values():
        behind[parent] = behind.get(parent, 0) + 1
    for address, count in behind.items():
        what = "a function" if count == 1 else f"{count} functions"
        uses.add(address, HostUse(UseKind.BRIDGE, f"{what} directly behind it"))


def _add_blocks(
    uses: HostUses, sys: SysTree, proc: SysTree, homes: Mapping[PciAddress, str]
) -> None:
    blocks, users = read_blocks(sys), read_block_users(sys, proc)
    for block in blocks.values():
        owner = _owner(block.home, homes)
        if owner is None:
            continue
        if not any(block.name in other.above for other in blocks.values()):
            heads = [name for name in block.above if name in blocks and _is_head(blocks[name].home)]
            uses.add_interface(owner, heads[0] if heads else block.name)
        for reached in find_reached([block.name], blocks):
            for use in find_uses(reached, users):
                uses.add(owner, use)


def _is_head(home: str) -> bool:
    return "/nvme-subsystem/" in home


def _add_networks(uses: HostUses, sys: SysTree, homes: Mapping[PciAddress, str]) -> None:
    for name, home, owner in _owned(sys, "class/net", _ANY, homes):
        interface = Attributes(sys, home)
        uses.add_interface(owner, name)
        master = interface.target("master")
        if master is not None:
            uses.add(owner, HostUse(UseKind.NETWORK, f"{name} is part of {master}"))
        elif (interface.number("flags", 16) or 0) & _UP:
            uses.add(owner, HostUse(UseKind.NETWORK, f"{name} is up"))


def _add_displays(uses: HostUses, sys: SysTree, homes: Mapping[PciAddress, str]) -> None:
    for address, home in homes.items():
        if Attributes(sys, home).word("boot_vga") == "1":
            uses.add(address, HostUse(UseKind.CONSOLE, "boot display"))
    if not _has_framebuffer_console(sys):
        return
    for name, _, owner in _owned(sys, "class/graphics", re.compile(r"fb\d+"), homes):
        uses.add(owner, HostUse(UseKind.CONSOLE, f"console on {name}"))


def _has_framebuffer_console(sys: SysTree) -> bool:
    for name in sys.names("class/vtconsole", re.compile(r"vtcon\d+")):
        console = Attributes(sys, sys.link(f"class/vtconsole/{name}") or "")
        if console.word("bind") == "1" and "frame buffer" in (console.word("name") or ""):
            return True
    return False


def _add_terminals(uses: HostUses, sys: SysTree, homes: Mapping[PciAddress, str]) -> None:
    """Serial ports that the kernel writes its messages to."""
    home = sys.link("class/tty/console")
    active = set(((home and sys.text(f"{home}/active")) or "").split())
    pattern = re.compile("|".join(map(re.escape, sorted(active))) or "(?!)")
    for name, _, owner in _owned(sys, "class/tty", pattern, homes):
        uses.add(owner, HostUse(UseKind.CONSOLE, f"kernel messages on {name}"))
