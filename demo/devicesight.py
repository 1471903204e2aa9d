"""What kernel, libvirt, QEMU and the guests themselves show of PCIe functions, as JSON.

Runs on the host that is looked at (in the lab), with the standard library alone: nothing of
virtfabric can hide here. It changes nothing but that it sends each guest's NIC a ping.

    python3 devicesight.py '{"functions": ["0000:01:10.0"], "guests": [], "uplink": "0000:51:00.0"}'
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

DEVICES = Path("/sys/bus/pci/devices")
CONSOLES = Path("/var/log/libvirt/qemu")


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.readlink().name
    return ""


def look_at_function(address: str) -> dict[str, Any] | None:
    """Driver link, override and IOMMU group; None for a function that is not there."""
    there = DEVICES / address
    if not there.exists():
        return None
    override = _read(there / "driver_override")
    return {
        "driver": _link(there / "driver"),
        "override": "" if override == "(null)" else override,
        "group": _link(there / "iommu_group"),
        "node": int(_read(there / "numa_node") or -1),
    }


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


def look_at_open_groups(pid: int) -> list[str]:
    """The IOMMU groups that a process has open: /proc/PID/fd -> /dev/vfio/GROUP."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("/dev/vfio/") and target != "/dev/vfio/vfio":
                found.add(target.rsplit("/", 1)[1])
    return sorted(found)


def look_at_hostdevs(guest: str) -> list[str]:
    """Addresses of the `<hostdev>` in the live XML."""
    command = ["virsh", "-q", "-c", "qemu:///system", "dumpxml", guest]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return []
    found = []
    for source in ET.fromstring(done.stdout).iterfind("./devices/hostdev/source/address"):
        domain, bus, slot, function = (
            int(source.get(key, "0"), 16) for key in ("domain", "bus", "slot", "function")
        )
        found.append(f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")
    return sorted(found)


def look_at_console(guest: str) -> tuple[bool, dict[str, str], dict[str, bool]]:
    """Whether the guest is up, its plugged NICs (name -> MAC), its disks (name -> reads back)."""
    text = _read(CONSOLES / f"{guest}-console.log")
    nics: dict[str, str] = {}
    disks: dict[str, bool] = {}
    for gone, kind, name, rest in re.findall(
        r"VFDEV (gone )?(net|block) (\w+) ?([^\r\n]*)", text[: text.rfind("\n") + 1]
    ):
        if gone:
            (nics if kind == "net" else disks).pop(name, None)
        elif kind == "net":
            nics[name] = rest.strip()
        else:
            words = dict(word.split("=", 1) for word in rest.split())
            disks[name] = words.get("written") == words.get("read") != ""
    return "VFREADY" in text, nics, disks


def format_link_local(mac: str) -> str:
    """The IPv6 address that an interface gives itself (RFC 4291, appendix A)."""
    octets = [int(part, 16) for part in mac.split(":")]
    octets[0] ^= 2
    octets[3:3] = [0xFF, 0xFE]
    return "fe80::" + ":".join(f"{octets[i] << 8 | octets[i + 1]:x}" for i in range(0, 8, 2))


def answers(uplink: str, mac: str) -> bool:
    """Whether the guest's NIC answers a ping that leaves the host by its uplink."""
    for interface in (DEVICES / uplink / "net").iterdir():
        command = ["busybox", "ping6", "-c", "2", "-W", "3", "-I", interface.name]
        done = subprocess.run(
            [*command, format_link_local(mac)], check=False, capture_output=True, timeout=60
        )
        return done.returncode == 0
    return False


def look_at_guest(guest: str, uplink: str) -> dict[str, Any]:
    """One guest by all that can be asked but the agent."""
    pid = find_qemu(guest)
    ready, nics, disks = look_at_console(guest)
    return {
        "pid": pid,
        "ready": ready,
        "hostdevs": look_at_hostdevs(guest) if pid else [],
        "groups": look_at_open_groups(pid) if pid else [],
        "nics": [
            {"name": name, "mac": mac, "answers": bool(pid) and answers(uplink, mac)}
            for name, mac in sorted(nics.items())
        ],
        "disks": [{"name": name, "reads_back": good} for name, good in sorted(disks.items())],
    }


def main() -> None:
    """Print what is seen."""
    asked = json.loads(sys.argv[1])
    functions = {address: look_at_function(address) for address in asked["functions"]}
    guests = {name: look_at_guest(name, asked["uplink"]) for name in asked["guests"]}
    print(json.dumps({"functions": functions, "guests": guests}))


if __name__ == "__main__":
    main()
