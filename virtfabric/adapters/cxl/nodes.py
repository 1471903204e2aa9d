"""What a NUMA node's memory is good for: its tier, whether it can be given back, how fast it is.

Reads `/proc/zoneinfo` and not each block's `valid_zones`: a host has thousands of blocks.
Source: Documentation/admin-guide/mm/memory-hotplug.rst and numaperf.rst.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.cxl.daxdevices import read_dax_devices
from virtfabric.model.amounts import Tier
from virtfabric.model.cxl import MemoryState
from virtfabric.model.host import Access
from virtfabric.model.units import GIB, KIB, Bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.adapters.pci.tree import SysTree
    from virtfabric.model.host import HugePages

_ZONE: Final = re.compile(r"^Node (\d+), zone +(\w+)$(?:\n +.*)*?\n +present +(\d+)$", re.MULTILINE)
_MOVABLE: Final = "Movable"
_PAGE: Final = 4 * KIB
"""Of x86-64, the one architecture that this agent runs on."""


def read_tiers(sys: SysTree) -> dict[int, Tier]:
    """The nodes that CXL regions became; any other is DRAM."""
    return {
        dax.node: Tier.CXL
        for dax in read_dax_devices(sys).values()
        if dax.node is not None and dax.state is not MemoryState.DEVICE
    }


def read_zones(proc: SysTree) -> dict[int, dict[str, Bytes]]:
    """Bytes that are present of each zone, by node and name; zones without any are left out."""
    zones: dict[int, dict[str, Bytes]] = {}
    for node, zone, pages in _ZONE.findall(proc.text("zoneinfo") or ""):
        known = zones.setdefault(int(node), {})
        if int(pages):
            known[zone] = Bytes(int(pages) * _PAGE)
    return zones


def explain_staying(zones: Mapping[str, Bytes] | None, huge_pages: tuple[HugePages, ...]) -> str:
    """Why a node cannot be given back, for people; empty when it can."""
    if zones is None:
        return "the kernel does not say which zones it has"
    if not zones:
        return "it has no memory online"
    fixed = {zone: amount for zone, amount in zones.items() if zone != _MOVABLE}
    if fixed:
        amount, names = Bytes(sum(fixed.values())).rounded(), ", ".join(map(str.upper, fixed))
        return f"{amount} in ZONE_{names}: the kernel's own data may be there, which cannot move"
    gigantic = sum(pages.total for pages in huge_pages if pages.size >= GIB)
    return f"{gigantic} gigantic pages, which cannot move" if gigantic else ""


def read_access(sys: SysTree, node: int) -> Access:
    """For the nearest CPUs; zeroes where the firmware tells nothing."""
    home = f"devices/system/node/node{node}/access1/initiators"

    def number(name: str) -> int:
        text = sys.text(f"{home}/{name}") or ""
        return int(text) if text.isdigit() else 0

    return Access(bandwidth=number("read_bandwidth"), latency=number("read_latency"))
