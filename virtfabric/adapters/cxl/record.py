"""Recorded machines with CXL memory: what the memory inventory reads of a host, as two files.

Taken: NUMA nodes with their memory and huge pages, zones, CXL devices, ports, decoders, regions,
and the state of the memory that they became. Serial numbers of memdevs are in it: they say which is
which. Health and poison are not: they are asked of the devices.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric import __version__
from virtfabric.adapters.cxl.daxdevices import MEMORY
from virtfabric.adapters.cxl.inventory import read_inventory
from virtfabric.adapters.cxl.nodes import read_access, read_tiers, read_zones
from virtfabric.adapters.hugepages.pools import GLOBAL
from virtfabric.adapters.pci.record import TREE, record_tree

if TYPE_CHECKING:
    from virtfabric.adapters.pci.tree import SysTree
    from virtfabric.model.amounts import Tier
    from virtfabric.model.cxl import CxlInventory
    from virtfabric.model.units import Bytes

    Reading = tuple[CxlInventory, dict[int, Tier], dict[int, dict[str, Bytes]]]

_NODES: Final = "devices/system/node"
_MEMINFO: Final = re.compile(r"^(?:Node \d+ )?Mem(?:Total|Free):.*$", re.MULTILINE)
_ZONES: Final = re.compile(r"^(?:Node \d+, zone.*| +present +\d+)$", re.MULTILINE)


def record_memory(
    directory: Path, *, sys: Path = Path("/sys"), proc: Path = Path("/proc")
) -> CxlInventory:
    """Record a host into a directory that is new or empty.

    Raises:
        InvalidValueError: the directory is not empty, or the host has a file that is malformed.
        InstallationError: the directory cannot be written, or what was written reads differently.
    """
    return record_tree(directory, (sys, proc), _read, lambda it: _describe(it[0]), trim=_trim)[0]


def _read(sys: SysTree, proc: SysTree) -> Reading:
    """What must read the same again; what changes by the minute is looked at and left aside."""
    proc.text("meminfo")
    sys.text("devices/system/cpu/online")
    sys.text(f"{_NODES}/online")
    sys.text(f"{MEMORY}/block_size_bytes")
    for node in sys.names(_NODES, re.compile(r"node\d+")):
        home = f"{_NODES}/{node}"
        for name in ("cpulist", "distance", "meminfo"):
            sys.text(f"{home}/{name}")
        for size in sys.names(f"{home}/hugepages", re.compile(r"hugepages-\d+kB")):
            for count in ("nr_hugepages", "free_hugepages", "surplus_hugepages"):
                sys.text(f"{home}/hugepages/{size}/{count}")
            sys.text(f"{GLOBAL}/{size}/resv_hugepages")
        read_access(sys, int(node.removeprefix("node")))
    return read_inventory(sys), read_tiers(sys), read_zones(proc)


def _trim(path: str, text: str) -> str:
    """Without the counters that nobody reads."""
    match path.rpartition("/")[2]:
        case "meminfo":
            return "\n".join(_MEMINFO.findall(text))
        case "zoneinfo":
            return "\n".join(_ZONES.findall(text))
        case _:
            return text


def _describe(found: CxlInventory) -> str:
    return (
        f"A machine with {len(found.memdevs)} CXL memdevs and {len(found.regions)} regions, Linux "
        f"{platform.release()}, as `virtfabric memory record` of {__version__} saw it.\n\n"
        f"Serial numbers of the memdevs are in `{TREE}`: look through it before you pass it on.\n"
    )
