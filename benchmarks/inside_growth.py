"""Runs in the lab: times growth by virtio-mem until the guest has touched it, on the right node.

    inside_growth.py allocate GUEST ROUNDS MIB NODE TIER   `virtfabric allocate GUEST --memory ...`
    inside_growth.py raw GUEST ROUNDS MIB NODE             `virsh update-memory-device`

Each round ends with memory that the guest wrote to and whose pages numa_maps has on the node; one
round before is not counted: its device may have to be attached. The way back is not measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

sys.path.insert(0, str(Path(__file__).parent))

from inside_clock import PATIENCE_S, measure, run

_TOUCHED = "VFDEV memory touched"
_DEVICE = """\
<memory model='virtio-mem'><alias name='ua-raw'/><source><nodemask>{node}</nodemask></source>
<target><size unit='MiB'>{mib}</size><node>0</node><block unit='MiB'>2</block>
<requested>0</requested></target><address type='pci' bus='{bus:#04x}'/></memory>
"""
_THERE = 0.95
"""Of what was plugged: the guest leaves some of each block to its kernel."""


def _mib_on(guest: str, node: str) -> int:
    """Of the guest's QEMU."""
    pid = Path(f"/run/libvirt/qemu/{guest}.pid").read_text()
    pages = re.findall(rf" N{node}=(\d+)", Path(f"/proc/{pid.strip()}/numa_maps").read_text())
    return sum(map(int, pages)) * 4096 >> 20


def _find(guest: str, node: str) -> ET.Element | None:
    """The virtio-mem device on that node."""
    root = ET.fromstring(run("virsh", "-q", "dumpxml", guest))
    for device in root.iterfind("devices/memory"):
        if device.findtext("source/nodemask") == node:
            return device
    return None


def _device(guest: str, node: str) -> ET.Element:
    device = _find(guest, node)
    if device is None:
        raise SystemExit(f"{guest} has no memory device on node {node}")
    return device


def _attach(guest: str, node: str, mib: int) -> None:
    """An empty one, behind the first port that is free."""
    root = ET.fromstring(run("virsh", "-q", "dumpxml", guest))
    ports = {
        int(controller.attrib["index"])
        for controller in root.iterfind("devices/controller[@model='pcie-root-port']")
    }
    used = {int(place.get("bus", "0"), 16) for place in root.iterfind("devices/*/address")}
    place = Path("/tmp/device.xml")
    place.write_text(_DEVICE.format(node=node, mib=mib, bus=min(ports - used)))
    run("virsh", "-q", "attach-device", guest, str(place), "--live")


def _resize(guest: str, node: str, mib: int) -> list[str]:
    alias = _device(guest, node).find("alias")
    assert alias is not None
    words = ["--alias", alias.attrib["name"], "--requested-size", f"{mib}MiB", "--live"]
    return ["virsh", "-q", "update-memory-device", guest, *words]


def _await_empty(guest: str, node: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while int(_device(guest, node).findtext("target/current") or 0):
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} does not give back what it has of node {node}")


def _round(guest: str, mib: int, node: str, tier: str | None) -> dict[str, float]:
    """By the agent if there is a tier, else by virsh."""
    before = _mib_on(guest, node)
    if tier:
        words = ["--memory", f"+{mib}M", "--tier", tier, "--deadline", "600"]
        argv = ["virtfabric", "--json", "allocate", guest, *words]
    else:
        argv = _resize(guest, node, mib)
    returned, touched, said = measure(guest, argv, _TOUCHED)
    if (there := _mib_on(guest, node) - before) < mib * _THERE:
        raise SystemExit(f"of {mib} MiB on node {node}, {there} MiB are there")
    if tier:
        run("virtfabric", "release", json.loads(said)["result"]["grant"])
    else:
        run(*_resize(guest, node, 0))
    _await_empty(guest, node)
    return {"returned": returned, "touched": touched}


def main() -> None:
    """Print one object for each round as JSON."""
    guest, rounds, mib, node = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    tier = sys.argv[6] if sys.argv[1] == "allocate" else None
    if tier is None and _find(guest, node) is None:
        _attach(guest, node, mib)
    took = [_round(guest, mib, node, tier) for _ in range(rounds + 1)]
    print(json.dumps(took[1:]))


if __name__ == "__main__":
    main()
