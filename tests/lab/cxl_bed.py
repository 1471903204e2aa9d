"""`CxlBed`: the agent in the cxl lab, a guest of two tiers, regions and what became of them.

What the agent says is not believed: `cxl list`, sysfs, numa_maps and virsh are asked.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from device_bed import DeviceBed

from demo.labhost import format_tiered

MARKS = "/run/virtfabric/regions"
NODE = "/sys/devices/system/node"
WINDOW, SERIAL = "decoder0.0", "0x100"
"""The first window is over the bridge that memdev 0x100 is behind, and becomes node 1."""


@dataclass(frozen=True)
class Ground:
    """What is there of CXL: regions by their members, the nodes online, the agent's marks."""

    regions: tuple[tuple[str, ...], ...]
    nodes: str
    movable: tuple[bool, ...]
    marks: tuple[str, ...]


class CxlBed(DeviceBed):
    """One lab with the agent in it."""

    def prepare(self) -> None:
        """The hook; libvirtd once more, so that it sees it."""
        self.lab.run(
            "cd /opt/virtfabric/checkout && virtfabric-python -m compileall -q virtfabric; "
            "virtfabric install > /dev/null 2>&1; kill -HUP $(cat /run/dbus/pid)"
        )
        self.restart_libvirtd()

    def restart_libvirtd(self) -> None:
        """Guests run on; it learns of nodes only at its start."""
        self.lab.run(
            "old=$(pidof libvirtd); kill $old; "
            "while [ -d /proc/$old ]; do read -rt 0.2 <> <(:); done; libvirtd -d"
        )
        self.lab.wait("virsh -q capabilities > /dev/null 2>&1", timeout_s=120)

    def kill_agent(self) -> None:
        """SIGKILL, wherever it is."""
        self.lab.fault("agent-kill")
        self.await_agents_end()

    # -- regions ------------------------------------------------------------------------------

    def ground(self) -> Ground:
        """See `Ground`."""
        serials = {m["memdev"]: hex(m["serial"]) for m in self.lab.json("cxl list -M")}
        regions = self.listed("cxl list -R -T")
        return Ground(
            regions=tuple(
                tuple(
                    serials.get(part["memdev"], "?")
                    for part in sorted(region.get("mappings", []), key=lambda p: p["position"])
                )
                for region in regions
            ),
            nodes=self.lab.run(f"cat {NODE}/online"),
            movable=tuple(bool(dax.get("movable")) for dax in self.listed("daxctl list")),
            marks=tuple(self.lab.run(f"ls -A {MARKS} 2> /dev/null", code=None).split()),
        )

    def listed(self, command: str) -> list[dict[str, Any]]:
        """What a tool of ndctl prints: a list, one object, or nothing."""
        found = self.lab.json(f"{command} | grep . || echo '[]'")
        return found if isinstance(found, list) else [found]

    def take_out(self, serial: str) -> None:
        """The host's kernel loses a memdev, whoever uses it.

        By sysfs: the fault `removal` ends QEMU 11.1.2 itself where a region has the memdev.
        """
        self.lab.run(
            f"for m in /sys/bus/cxl/devices/mem*; do [ $(cat $m/serial) != {serial} ] || "
            'echo 1 > "$(realpath $m/../remove)"; done'
        )

    def region_name(self) -> str:
        """The kernel's of the one that there is; it counts on after each that ended."""
        (found,) = self.ask("memory")["regions"]
        return str(found["name"])

    def create_words(self) -> str:
        """The command that makes the region."""
        return f"memory region create --window {WINDOW} --memdev {SERIAL}"

    def make_region(self) -> None:
        """The region, and a libvirt that knows its node."""
        self.ask(self.create_words())
        if self.ask("status")["host"]["withheld"]:
            self.restart_libvirtd()
        self.await_agent("not document['host']['withheld']")

    def end_regions(self) -> None:
        """Without the agent, which does not run: all of them, and what it noted of them."""
        self.lab.run(
            "for g in $(virsh -q list --name); do virsh -q destroy $g; done; "
            "if cxl list -R | grep -q region; then daxctl offline-memory all; "
            f"cxl disable-region all; cxl destroy-region all; fi; rm -rf {MARKS}/*",
            code=None,
        )

    def await_agent(self, condition: str, *, words: str = "status", timeout_s: float = 300) -> None:
        """Until a Python expression about the `document` that `virtfabric WORDS` prints holds."""
        check = shlex.quote(
            "import json, sys; document = json.load(sys.stdin); "
            f"sys.exit(0 if ({condition}) else 1)"
        )
        self.lab.wait(
            f"virtfabric {words} --json 2> /dev/null | python3 -c {check}", timeout_s=timeout_s
        )

    # -- guests -------------------------------------------------------------------------------

    def define_tiered(
        self, name: str, priority: int, *, growth: str = "virtio-mem", touches_mib: int = 0
    ) -> None:
        """A guest that may have memory of both tiers, and writes to so much that is plugged in."""
        policy = (
            "<metadata><v:policy xmlns:v='urn:virtfabric:policy:1' version='1' "
            f"priority='{priority}'><v:cpu reservation='500m' limit='1'/>"
            f"<v:memory reservation='192MiB' tiers='dram,cxl' growth='{growth}'/>"
            "</v:policy></metadata>"
        )
        xml = format_tiered(self.lab.run("cat /opt/virtfabric/lab/guest.xml"))
        xml = xml.replace("<name>guest</name>", f"<name>{name}</name>{policy}")
        xml = xml.replace("guest-console", f"{name}-console")
        if touches_mib:
            xml = xml.replace("</cmdline>", f" vftouch={touches_mib}</cmdline>")
        self.lab.run(f"virsh -q undefine {name} 2> /dev/null", code=None)
        self.lab.run(f"cat > /tmp/{name}.xml <<'X'\n{xml}\nX\nvirsh -q define /tmp/{name}.xml")

    def far_bytes(self, name: str) -> int:
        """What is plugged of node 1, by the live XML."""
        root = ET.fromstring(self.lab.run(f"virsh -q dumpxml {name}"))
        units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
        found = 0
        for device in root.iterfind("./devices/memory"):
            current = device.find("target/current")
            if device.findtext("source/nodemask") == "1" and current is not None:
                found += int(current.text or "0") * units[current.get("unit", "KiB")]
        return found

    def pages_on_node(self, name: str, node: int) -> int:
        """Pages of the guest's QEMU that lie there, by numa_maps."""
        text = self.lab.run(f"cat /proc/$(cat /run/libvirt/qemu/{name}.pid)/numa_maps")
        return sum(int(pages) for pages in re.findall(rf"N{node}=(\d+)", text))

    def free_mib(self, node: int) -> int:
        """MemFree of a node, without what the page cache would give."""
        kib = self.lab.run(
            "sync; echo 3 > /proc/sys/vm/drop_caches; "
            f"awk '/MemFree/ {{print $4}}' {NODE}/node{node}/meminfo"
        )
        return int(kib) >> 10
