"""What a watch tells of emulated hot-plug: one run under `umockdev-wrapper`, told as JSON.

umockdev gives this process alone a sysfs and a netlink socket of uevents. Its library is called
through ctypes: its Python bindings are for Debian's own Python only.
"""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.adapters.pci.inventory import SysfsDeviceTree

if TYPE_CHECKING:
    from virtfabric.model.device import DeviceNews

PORT = "/devices/pci0000:00/0000:00:10.0"
NIC = f"{PORT}/0000:01:00.0"
DEADLINE_S = 20


class Bed:
    """umockdev's test bed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libumockdev.so.0")
        self._library.umockdev_testbed_new.restype = ctypes.c_void_p
        self._library.umockdev_testbed_get_sys_dir.restype = ctypes.c_char_p
        self._bed = ctypes.c_void_p(self._library.umockdev_testbed_new())
        directory = self._library.umockdev_testbed_get_sys_dir(self._bed)
        self.sys = Path(directory.decode())

    def add(self, path: str, subsystem: str, **attributes: str) -> None:
        """A device; no event yet."""
        lines = [f"P: {path}", f"E: SUBSYSTEM={subsystem}"]
        lines += [f"A: {name}={value}\\n" for name, value in attributes.items()]
        text = ("\n".join(lines) + "\n\n").encode()
        assert self._library.umockdev_testbed_add_from_string(self._bed, text, None)

    def tell(self, path: str, action: str) -> None:
        self._library.umockdev_testbed_uevent(self._bed, f"/sys{path}".encode(), action.encode())


def main() -> None:
    bed = Bed()
    bed.add(PORT, "pci", vendor="0x1b36", device="0x000c", **{"class": "0x060400"})
    tree, told = SysfsDeviceTree(), threading.Event()
    calls: list[str] = []
    heard_of: list[list[str] | None] = []

    def changed(news: DeviceNews) -> None:
        calls.append(threading.current_thread().name)
        heard_of.append(None if news.functions is None else sorted(news.functions))
        told.set()

    def heard(path: str, action: str) -> dict[str, object]:
        told.clear()
        bed.tell(path, action)
        assert told.wait(DEADLINE_S), (path, action)
        return {
            address: [function.driver, function.driver_override, list(function.interfaces)]
            for address, function in tree.read_functions().items()
        }

    tree.watch(changed)
    seen = {}
    bed.add(NIC, "pci", vendor="0x8086", device="0x10c9", **{"class": "0x020000"})
    seen["add"] = heard(NIC, "add")
    bed.add(f"{NIC}/net/eth0", "net", flags="0x1002")
    seen["net"] = heard(f"{NIC}/net/eth0", "add")
    (bed.sys / NIC.removeprefix("/") / "driver").symlink_to("../../../../bus/pci/drivers/igb")
    seen["bind"] = heard(NIC, "bind")
    (bed.sys / NIC.removeprefix("/") / "driver").unlink()
    seen["unbind"] = heard(NIC, "unbind")
    # umockdev tells no event of what is not there: the bus loses it first, as in the kernel
    (bed.sys / "bus/pci/devices/0000:01:00.0").unlink()
    seen["remove"] = heard(NIC, "remove")
    about = dict(zip(seen, heard_of, strict=True))
    bed.add("/devices/virtual/net/vnet0", "net", flags="0x1002")
    heard("/devices/virtual/net/vnet0", "add")
    about["vnet"] = heard_of[-1]
    bed.add("/devices/virtual/block/dm-0", "block", dev="253:0")
    heard("/devices/virtual/block/dm-0", "add")
    about["dm"] = heard_of[-1]
    tree.close()
    count = len(calls)
    bed.tell(PORT, "change")
    alive = [thread.name for thread in threading.enumerate() if thread.name == "devices"]
    print(json.dumps({"seen": seen, "about": about, "threads": sorted(set(calls)), "alive": alive,
                      "after_close": len(calls) - count}))  # fmt: skip


if __name__ == "__main__":
    main()
