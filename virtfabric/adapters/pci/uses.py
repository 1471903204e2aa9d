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
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from virtfabric.adapters.pci.tree import SysTree

_ANY: Final = re.compile(r".+")
_TERMINAL: Final = re.compile(r"[\w-]+")
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


def read_uses(
    sys: SysTree,
    proc: SysTree,
    homes: Mapping[PciAddress, str],
    asked: Collection[PciAddress],
    displays: Collection[PciAddress],
) -> HostUses:
    """The uses of some of the functions at these places.

    Args:
        sys: the tree of devices.
        proc: who has what mounted, and what is swap.
        homes: all functions of the host: what is below one that is left out counts for its port.
        asked: those of them whose uses are read.
        displays: those of these that may be the boot display.

    Raises:
        InvalidValueError: a file does not have the form that the kernel documents.
    """
    above = {a: _owner(posixpath.dirname(home), homes) for a, home in homes.items()}
    uses = HostUses({address: parent for address, parent in above.items() if parent is not None})
    places = _Places(sys, homes, asked)
    _add_bridges(uses)
    _add_blocks(uses, places, proc)
    _add_networks(uses, places)
    _add_displays(uses, places, displays)
    _add_terminals(uses, places)
    return uses


@dataclass(frozen=True, slots=True)
class _Places:
    """Where all functions are, and which of them are asked for."""

    sys: SysTree
    homes: Mapping[PciAddress, str]
    asked: Collection[PciAddress]

    def owner(self, path: str) -> PciAddress | None:
        """Whose a device is; None where that function is not asked for."""
        owner = _owner(path, self.homes)
        return owner if owner in self.asked else None

    def owned(self, directory: str, names: Iterable[str]) -> Iterator[tuple[str, str, PciAddress]]:
        """Name, place and function of those devices of a class."""
        for name in names:
            home = self.sys.link(f"{directory}/{name}")
            owner = None if home is None else self.owner(home)
            if home is not None and owner is not None:
                yield name, home, owner


def _owner(path: str, homes: Mapping[PciAddress, str]) -> PciAddress | None:
    """The nearest function that a path of sysfs passes; None also when it is no longer there.

    Then the port above is not the next best: what is left below the function goes with it.
    """
    for part in reversed(path.split("/")):
        address = parse_address(part) if ":" in part else None
        if address is not None:
            return address if address in homes else None
    return None


def _add_bridges(uses: HostUses) -> None:
    behind: dict[PciAddress, int] = {}
    for parent in uses.parents.values():
        behind[parent] = behind.get(parent, 0) + 1
    for address, count in behind.items():
        what = "a function" if count == 1 else f"{count} functions"
        uses.add(address, HostUse(UseKind.BRIDGE, f"{what} directly behind it"))


def _add_blocks(uses: HostUses, places: _Places, proc: SysTree) -> None:
    blocks = read_blocks(places.sys, lambda home: places.owner(home) is not None)
    users = read_block_users(places.sys, proc) if blocks else None
    for block in blocks.values():
        owner = places.owner(block.home)
        if owner is None or users is None:
            continue
        if not any(block.name in other.above for other in blocks.values()):
            heads = [name for name in block.above if name in blocks and _is_head(blocks[name].home)]
            uses.add_interface(owner, heads[0] if heads else block.name)
        for reached in find_reached([block.name], blocks):
            for use in find_uses(reached, users):
                uses.add(owner, use)


def _is_head(home: str) -> bool:
    return "/nvme-subsystem/" in home


def _add_networks(uses: HostUses, places: _Places) -> None:
    names = places.sys.names("class/net", _ANY)
    for name, home, owner in places.owned("class/net", names):
        interface = Attributes(places.sys, home)
        uses.add_interface(owner, name)
        master = interface.target("master")
        if master is not None:
            uses.add(owner, HostUse(UseKind.NETWORK, f"{name} is part of {master}"))
        elif (interface.number("flags", 16) or 0) & _UP:
            uses.add(owner, HostUse(UseKind.NETWORK, f"{name} is up"))


def _add_displays(uses: HostUses, places: _Places, displays: Collection[PciAddress]) -> None:
    for address in displays:
        if Attributes(places.sys, places.homes[address]).word("boot_vga") == "1":
            uses.add(address, HostUse(UseKind.CONSOLE, "boot display"))
    frames = places.sys.names("class/graphics", re.compile(r"fb\d+"))
    if not frames or not _has_framebuffer_console(places.sys):
        return
    for name, _, owner in places.owned("class/graphics", frames):
        uses.add(owner, HostUse(UseKind.CONSOLE, f"console on {name}"))


def _has_framebuffer_console(sys: SysTree) -> bool:
    for name in sys.names("class/vtconsole", re.compile(r"vtcon\d+")):
        console = Attributes(sys, sys.link(f"class/vtconsole/{name}") or "")
        if console.word("bind") == "1" and "frame buffer" in (console.word("name") or ""):
            return True
    return False


def _add_terminals(uses: HostUses, places: _Places) -> None:
    """Serial ports that the kernel writes its messages to."""
    home = places.sys.link("class/tty/console")
    active = ((home and places.sys.text(f"{home}/active")) or "").split()
    names = sorted({name for name in active if _TERMINAL.fullmatch(name)})
    for name, _, owner in places.owned("class/tty", names):
        uses.add(owner, HostUse(UseKind.CONSOLE, f"kernel messages on {name}"))
