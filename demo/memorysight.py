"""What kernel, `cxl`, `daxctl`, libvirt, QEMU and the guests show of memory, as JSON.

Runs on the host that is looked at (in the lab), with the standard library alone: nothing of
virtfabric can hide here. It changes nothing.

    python3 memorysight.py '{"guests": ["database"]}'
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

NODES = Path("/sys/devices/system/node")
CONSOLES = Path("/var/log/libvirt/qemu")
UNITS = {"b": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_BOUND = re.compile(r"bind(?:=\w+)*:([\d,-]+)")


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    return done.stdout


def _listed(*command: str) -> list[dict[str, Any]]:
    """What a tool of ndctl prints: a list, one object, or nothing."""
    found = json.loads(_run(*command) or "[]")
    return found if isinstance(found, list) else [found]


def parse_list(text: str) -> list[int]:
    """`0,2-3` -> 0, 2, 3."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def look_at_nodes() -> dict[str, dict[str, int]]:
    """Bytes of each node that is online."""
    found = {}
    for node in parse_list((NODES / "online").read_text()):
        text = (NODES / f"node{node}" / "meminfo").read_text()
        kib = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", text))
        found[str(node)] = {
            "total": int(kib["MemTotal"]) << 10, "free": int(kib["MemFree"]) << 10,
        }  # fmt: skip
    return found


def read_regions(
    regions: list[dict[str, Any]], memdevs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Regions as `cxl list -R -T` has them, their members by serial."""
    serials = {memdev["memdev"]: memdev["serial"] for memdev in memdevs}
    return [
        {
            "name": region["region"],
            "size": region["size"],
            "committed": region.get("decode_state") == "commit",
            "serials": [
                hex(serials.get(part["memdev"], 0))
                for part in sorted(region.get("mappings", []), key=lambda part: part["position"])
            ],
        }
        for region in regions
    ]


def parse_numa_maps(text: str) -> dict[str, dict[str, int]]:
    """Bytes by node where they lie, by the nodes that they are bound to (`-` for none)."""
    found: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        policy = line.split()[1]
        match = _BOUND.match(policy)
        there = found.setdefault(match[1] if match else "-", {})
        size = re.search(r"kernelpagesize_kB=(\d+)", line)
        unit = int(size[1]) << 10 if size else 4096
        for node, pages in re.findall(r"N(\d+)=(\d+)", line):
            there[node] = there.get(node, 0) + int(pages) * unit
    return found


def parse_devices(xml: str) -> tuple[list[dict[str, Any]], int]:
    """Memory devices of the live XML with their host node, and how many functions there are."""
    root = ET.fromstring(xml)
    found = []
    for device in root.iterfind("./devices/memory"):
        alias = device.find("alias")
        found.append(
            {
                "alias": alias.get("name", "") if alias is not None else "",
                "nodes": device.findtext("source/nodemask", ""),
                "requested": _bytes(device.find("target/requested")),
                "current": _bytes(device.find("target/current")),
            }
        )
    return found, len(root.findall("./devices/hostdev"))


def _bytes(element: ET.Element | None) -> int:
    if element is None:
        return 0
    return int(element.text or "0") * UNITS[element.get("unit", "KiB")]


def parse_console(text: str) -> tuple[bool, int]:
    """Whether the guest is up, and the MemTotal that it told last, in bytes."""
    told = re.findall(r"VFSTAT .*memtotal_kib=(\d+)", text[: text.rfind("\n") + 1])
    return "VFREADY" in text, int(told[-1]) << 10 if told else 0


def find_qemu(guest: str) -> int | None:
    """Process id of the guest's QEMU."""
    wanted = f"guest={guest},".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.startswith(wanted) for word in words):
                    return int(entry.name)
    return None


def look_at_guest(guest: str) -> dict[str, Any]:
    """One guest by all that can be asked but the agent."""
    pid = find_qemu(guest)
    devices: list[dict[str, Any]] = []
    functions, pages = 0, {}
    if pid is not None:
        xml = _run("virsh", "-q", "-c", "qemu:///system", "dumpxml", guest)
        devices, functions = parse_devices(xml) if xml else ([], 0)
        with contextlib.suppress(OSError):
            pages = parse_numa_maps(Path(f"/proc/{pid}/numa_maps").read_text())
    console = CONSOLES / f"{guest}-console.log"
    text = console.read_text(errors="replace") if console.exists() else ""
    ready, inside = parse_console(text)
    return {
        "pid": pid, "ready": ready, "inside": inside, "devices": devices,
        "functions": functions, "pages": pages,
    }  # fmt: skip


def main() -> None:
    """Print what is seen."""
    asked = json.loads(sys.argv[1])
    memdevs = _listed("cxl", "list", "-M")
    seen = {
        "nodes": look_at_nodes(),
        "memdevs": sorted(hex(memdev["serial"]) for memdev in memdevs),
        "regions": read_regions(_listed("cxl", "list", "-R", "-T"), memdevs),
        "movable": [bool(dax.get("movable")) for dax in _listed("daxctl", "list")],
        "guests": {name: look_at_guest(name) for name in asked["guests"]},
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
