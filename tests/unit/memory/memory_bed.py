"""What a watch tells of emulated CXL hot-plug: one run under `umockdev-wrapper`, told as JSON."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devices"))

from hotplug_bed import DEADLINE_S, Bed

from virtfabric.adapters.cxl.memory import SysfsMemory
from virtfabric.adapters.pci.watch import QUIET_S

FUNCTION = "/devices/pci0000:40/0000:40:00.0/0000:41:00.0"
MEMDEV = f"{FUNCTION}/mem0"
BLOCK = "/devices/system/memory/memory42"
REGION = "/devices/platform/ACPI0017:00/root0/decoder0.0/region0"
DAX = f"{REGION}/dax_region0/dax0.0"


def on_cxl_bus(bed: Bed, path: str) -> None:
    """List it as the kernel does; umockdev takes it for a class."""
    link = bed.sys / "bus/cxl/devices" / Path(path).name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"../../..{path}")


def main() -> None:
    bed = Bed()
    bed.add(FUNCTION, "pci", vendor="0x8086", device="0x0d93", **{"class": "0x050210"})
    memory, told = SysfsMemory(), threading.Event()
    calls: list[str] = []

    def changed() -> None:
        calls.append(threading.current_thread().name)
        told.set()

    def heard(path: str, action: str) -> list[object]:
        told.clear()
        bed.tell(path, action)
        assert told.wait(DEADLINE_S), (path, action)
        found = memory.read_cxl()
        states = [dax.state.value for region in found.regions for dax in region.dax]
        return [[m.label for m in found.memdevs], [r.name for r in found.regions], states]

    memory.watch(changed)
    seen = {}
    bed.add(MEMDEV, "cxl", serial="0x100", numa_node="0")
    on_cxl_bus(bed, MEMDEV)
    for name, size in (("ram", "0x10000000"), ("pmem", "0x0")):
        file = bed.sys / MEMDEV.removeprefix("/") / name / "size"
        file.parent.mkdir()
        file.write_text(f"{size}\n")
    seen["memdev"] = heard(MEMDEV, "add")
    bed.add(REGION, "cxl", size="0x10000000", resource="0x150000000", commit="1", mode="ram")
    on_cxl_bus(bed, REGION)
    seen["region"] = heard(REGION, "add")
    bed.add(DAX, "dax", size="268435456", resource="0x150000000", target_node="1")
    (bed.sys / DAX.removeprefix("/") / "driver").symlink_to("../../../../bus/dax/drivers/kmem")
    bed.add("/devices/system/memory", "memory", block_size_bytes="8000000")
    for number in (42, 43):
        path = BLOCK.replace("42", str(number))
        bed.add(path, "memory", state="online", valid_zones="Movable")
    seen["dax"] = heard(DAX, "add")
    (bed.sys / BLOCK.removeprefix("/") / "state").write_text("offline\n")
    seen["block"] = heard(BLOCK, "offline")
    (bed.sys / "bus/cxl/devices/mem0").unlink()
    seen["removed"] = heard(MEMDEV, "remove")
    told.clear()
    bed.tell(FUNCTION, "change")  # a PCIe function's: of no subsystem of memory
    of_others = told.wait(10 * QUIET_S)
    memory.close()
    count = len(calls)
    bed.tell(REGION, "change")
    print(json.dumps({"seen": seen, "threads": sorted(set(calls)),
                      "of_others": of_others, "after_close": len(calls) - count}))  # fmt: skip


if __name__ == "__main__":
    main()
