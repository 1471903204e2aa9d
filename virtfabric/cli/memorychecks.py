"""What `doctor` looks at for CXL memory: tools, where new memory goes, nodes that are withheld."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.adapters.sysfs import Sysfs
from virtfabric.cli.findings import Finding, Verdict
from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtfabric.config import CapacityConfig

    Json = dict[str, Any]

_TOOLS: Final = ("cxl", "daxctl")
_NO_CXL: Final = "not needed: this host has no CXL"


def has_cxl(root: Path = Path("/")) -> bool:
    """Whether the kernel shows any CXL device."""
    devices = root / "sys/bus/cxl/devices"
    return devices.is_dir() and any(devices.iterdir())


def check_tools(
    root: Path = Path("/"), which: Callable[[str], str | None] = shutil.which
) -> Iterator[Finding]:
    """`cxl` and `daxctl`: regions are made and memory is taken offline by them."""
    missing = [tool for tool in _TOOLS if which(tool) is None]
    if not missing:
        yield Finding("cxl tools", Verdict.OK, "cxl and daxctl are there")
    elif has_cxl(root):
        detail = f"{' and '.join(missing)} not found: regions cannot be made or taken down"
        mend = "apt-get install cxl daxctl (ndctl's tools; Debian 12: cxl, daxctl)"
        yield Finding("cxl tools", Verdict.WARN, detail, mend)
    else:
        yield Finding("cxl tools", Verdict.OK, _NO_CXL)


def check_new_memory(root: Path = Path("/")) -> Iterator[Finding]:
    """What the kernel does with memory that comes: only in ZONE_MOVABLE can it go again."""
    name = "new memory"
    switch = root / "sys/devices/system/memory/auto_online_blocks"
    try:
        state = switch.read_text().strip()
    except OSError:
        verdict = Verdict.WARN if has_cxl(root) else Verdict.OK
        yield Finding(name, verdict, "this kernel takes no hot-plugged memory")
        return
    if not has_cxl(root):
        yield Finding(name, Verdict.OK, _NO_CXL)
    elif state in ("online_movable", "offline"):
        yield Finding(name, Verdict.OK, f"memhp_default_state is {state}")
    else:
        detail = (
            f"memhp_default_state is {state}: the kernel puts its own data on CXL memory that "
            "comes, and it can never be taken back"
        )
        mend = (
            f"kernel command line: memhp_default_state=online_movable; until then "
            f"echo online_movable > /{switch.relative_to(root)}"
        )
        yield Finding(name, Verdict.WARN, detail, mend)


def check_known_nodes(capabilities: str, root: Path = Path("/")) -> Iterator[Finding]:
    """Whether libvirt knows each NUMA node with memory: of a later one it learns at a restart."""
    name = "libvirt nodes"
    try:
        cells = parse_xml(capabilities, what="capabilities").findall("host/topology/cells/cell")
        nodes = Sysfs(root / "sys", root / "proc").read_nodes().items()
    except (OSError, VirtfabricError) as error:
        yield Finding(name, Verdict.WARN, f"NUMA nodes cannot be read: {error}")
        return
    known = CpuSet(int(cell.get("id", "0")) for cell in cells)
    unknown = CpuSet({n for n, node in nodes if node.memory_total and not node.cpus} - known)
    if unknown:
        detail = f"libvirt does not know node {unknown}, and refuses a guest that names it"
        mend = "systemctl restart libvirtd (or virtqemud); guests run on"
        yield Finding(name, Verdict.WARN, detail, mend)
    else:
        yield Finding(name, Verdict.OK, f"libvirt knows node {known}")


def check_nodes(host: Json, capacity: CapacityConfig) -> Iterator[Finding]:
    """Each NUMA node of which nothing is granted, as the agent sees it, and why."""
    for number, why in host["withheld"].items():
        yield Finding(f"node {number}", Verdict.WARN, f"nothing of it is granted: {why}")
    cxl = [str(node["node"]) for node in host["memory"] if node["tier"] == "cxl"]
    if cxl and capacity.memory is not None:
        detail = (
            f"[capacity] memory = {capacity.memory} is of DRAM: nothing is granted of CXL node "
            f"{', '.join(cxl)}"
        )
        mend = f"name nodes instead: [capacity.memory] with node0 = ..., node{cxl[0]} = ..."
        yield Finding("cxl capacity", Verdict.WARN, detail, mend)
