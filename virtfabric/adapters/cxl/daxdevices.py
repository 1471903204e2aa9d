"""The memory that CXL regions became: dax devices, their blocks of memory, their NUMA nodes.

Source: Documentation/ABI/testing/sysfs-bus-dax, Documentation/admin-guide/mm/memory-hotplug.rst.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final

from virtfabric.model.cxl import DaxDevice, MemoryState
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from virtfabric.adapters.pci.tree import SysTree

DEVICES: Final = "bus/dax/devices"
MEMORY: Final = "devices/system/memory"
_DAX: Final = re.compile(r"dax\d+\.\d+")
_CXL: Final = re.compile(r"/region\d+/dax_region\d+/")
_KERNELS_OWN: Final = "kmem"
"""The driver that makes a dax device memory of the kernel."""


def read_dax_devices(sys: SysTree) -> dict[str, DaxDevice]:
    """All of CXL regions, by home directory. One that goes away meanwhile is left out."""
    found = {}
    for name in sys.names(DEVICES, _DAX):
        home = sys.link(f"{DEVICES}/{name}")
        if home is None or not _CXL.search(home):
            continue
        device = _read_device(sys, name, home)
        if device is not None:
            found[home] = device
    return found


def _read_device(sys: SysTree, name: str, home: str) -> DaxDevice | None:
    size, base, node = (
        _number(sys.text(f"{home}/{word}")) for word in ("size", "resource", "target_node")
    )
    if size is None or base is None:
        return None
    driver = posixpath.basename(sys.link(f"{home}/driver") or "")
    state, movable = MemoryState.DEVICE, False
    if driver == _KERNELS_OWN:
        state, movable = _read_blocks(sys, base, size)
    known = node if node is not None and node >= 0 else None
    return DaxDevice(name, Bytes(size), known, state, movable)


def _read_blocks(sys: SysTree, base: int, size: int) -> tuple[MemoryState, bool]:
    """Whether the blocks of a range are online, and whether those are all movable."""
    block = _number(sys.text(f"{MEMORY}/block_size_bytes"), 16)
    if not block:
        return MemoryState.OFFLINE, False
    # Only whole blocks become memory; the range of a device need not begin with one.
    numbers = range(-(-base // block), (base + size) // block)
    states = [sys.text(f"{MEMORY}/memory{number}/state") for number in numbers]
    online = [n for n, state in zip(numbers, states, strict=True) if state == "online"]
    zones = {sys.text(f"{MEMORY}/memory{number}/valid_zones") for number in online}
    if not online:
        return MemoryState.OFFLINE, False
    whole = len(online) == len(numbers)
    return MemoryState.ONLINE if whole else MemoryState.PARTLY, zones == {"Movable"}


def _number(text: str | None, base: int = 0) -> int | None:
    try:
        return int(text, base) if text else None
    except ValueError:
        return None
