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

ROUNDS = int(os.environ.get("VIRTFABRIC_ROUNDS", "2"))
GROWTH_MIB = 512
NODES = {"dram": "0", "cxl": "1"}
SERIAL = "0x100"
MEMDEV_SIZE = "1GiB"
"""The lab's own memdevs are smaller than the growth."""
LAB = os.environ.get("VIRTFABRIC_LAB", "growth")
SCRIPT = f"{CHECKOUT}/benchmarks/inside_growth.py"
GUEST = LabGuest(
    name="grower", priority=90, tiered=True, virtio_mem_mib=GROWTH_MIB, touched_mib=GROWTH_MIB
)
GUESTS = 4


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
    lab.install("")
    lab.start_agent()
    lab.do(f"virtfabric memory region create --window decoder0.0 --memdev {SERIAL}")
    lab.restart_libvirtd()  # it learns of nodes only at its start
    held = "virtfabric status --json | grep -q '\"withheld\": {}'"
    lab.wait(held, "the region's node is granted from")
    ours = {tier: _measure_tier(lab, "allocate", tier) for tier in NODES}
    raw = {tier: _measure_tier(lab, "raw", tier) for tier in NODES}
    lab.stop_agent()
    lab.clean()
    return ours, raw


def _measure_tier(lab: LabHost, kind: str, tier: str) -> list[dict[str, float]]:
    """With a guest of its own, and another where that falls over, as emulated ones do."""
    for left in reversed(range(GUESTS)):
        try:
            return _measure_guest(lab, kind, tier)
        except LabError as error:
            gone = lab.run(f"[ ! -e /run/libvirt/qemu/{GUEST.name}.pid ]")
            if not left or gone.returncode:
                raise
            print(f"{kind} {tier}: {error}: once more, with a new guest")
        finally:
            lab.end_guests()
            lab.guests.clear()
    raise AssertionError("unreachable")


def _measure_guest(lab: LabHost, kind: str, tier: str) -> list[dict[str, float]]:
    """It starts with the agent, which does not run while virsh is timed."""
    if (done := lab.start_guest(GUEST)).returncode:
        raise LabError(f"the guest does not start: {done.stderr}")
    lab.wait_ready(GUEST)
    words = f"{kind} {GUEST.name} {ROUNDS} {GROWTH_MIB} {NODES[tier]} {tier}"
    if kind == "raw":
        lab.stop_agent()
    try:
        said = lab.do(f"python3 -I {SCRIPT} {words}", timeout_s=3600)
    finally:
        if kind == "raw":
            lab.start_agent()
    return list(json.loads(said))


def _row(tier: str, ours: list[dict[str, float]], raw: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [statistics.median(took["touched"] for took in side) for side in (ours, raw)]
    ratio = seconds[0] / seconds[1]
    return {
        "what": f"allocate --memory +{GROWTH_MIB}M --tier {tier}, until touched, against virsh",
        "value": round(ratio, 3), "unit": "x", "target": 1.3, "met": ratio <= 1.3,
        "seconds": [round(s, 2) for s in seconds], "rounds": ROUNDS,
    }  # fmt: skip
