"""Memory for a running KVM guest, in a nested lab with CXL: `allocate` against raw virsh."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.in_lab import measure_in_lab
from demo.labhost import CHECKOUT, ROOT, LabError, LabGuest, LabHost

ROUNDS = int(os.environ.get("VIRTFABRIC_ROUNDS", "3"))
GROWTH_MIB = 512
NODES = {"dram": "0", "cxl": "1"}
SERIAL = "0x100"
MEMDEV_SIZE = "1GiB"
"""The lab's own memdevs are smaller than the growth."""
LAB = os.environ.get("VIRTFABRIC_LAB", "growth")


def measure() -> list[dict[str, Any]]:
    """Ratios of medians, in one run: until the guest has touched what it got, on the right node.

    Both sides resize a virtio-mem device that is there; `allocate` decides, journals and verifies
    as well. Nothing of the agent runs while virsh is timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        topology = Path(folder) / "growth.json"
        topology.write_text(_enlarge((ROOT / "vagrant/topologies/cxl.json").read_text()))
        ours, raw = measure_in_lab(LabHost(LAB, str(topology)), _measure_in)
    return [_row(tier, ours[tier], raw[tier]) for tier in NODES]


def _enlarge(topology: str) -> str:
    shape = json.loads(topology)
    (memdev,) = (d for d in shape["cxl"]["devices"] if d["serial"] == SERIAL)
    memdev["volatile"] = MEMDEV_SIZE
    del shape["$schema"]
    return json.dumps(shape)


def _measure_in(lab: LabHost) -> tuple[dict[str, Any], dict[str, Any]]:
    guest = LabGuest(
        name="grower", priority=90, tiered=True, virtio_mem_mib=GROWTH_MIB, touched_mib=GROWTH_MIB
    )
    lab.install("")
    lab.start_agent()
    lab.do(f"virtfabric memory region create --window decoder0.0 --memdev {SERIAL}")
    lab.restart_libvirtd()  # it learns of nodes only at its start
    held = "virtfabric status --json | grep -q '\"withheld\": {}'"
    lab.wait(held, "the region's node is granted from")
    if (done := lab.start_guest(guest)).returncode:
        raise LabError(f"the guest does not start: {done.stderr}")
    lab.wait_ready(guest)
    ours = {tier: _inside(lab, f"allocate {guest.name}", tier) for tier in NODES}
    lab.stop_agent()
    raw = {tier: _inside(lab, f"raw {guest.name}", tier) for tier in NODES}
    lab.end_guests()
    lab.clean()
    return ours, raw


def _inside(lab: LabHost, words: str, tier: str) -> list[dict[str, float]]:
    words = f"{words} {ROUNDS} {GROWTH_MIB} {NODES[tier]} {tier}"
    said = lab.do(f"python3 -I {CHECKOUT}/benchmarks/inside_growth.py {words}", timeout_s=3600)
    return list(json.loads(said))


def _row(tier: str, ours: list[dict[str, float]], raw: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [statistics.median(took["touched"] for took in side) for side in (ours, raw)]
    ratio = seconds[0] / seconds[1]
    return {
        "what": f"allocate --memory +{GROWTH_MIB}M --tier {tier}, until touched, against virsh",
        "value": round(ratio, 3), "unit": "x", "target": 1.3, "met": ratio <= 1.3,
        "seconds": [round(s, 2) for s in seconds], "rounds": ROUNDS,
    }  # fmt: skip
