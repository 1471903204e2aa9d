"""A VF for a running KVM guest, in the nested lab `passthrough`: `allocate` against raw virsh."""

from __future__ import annotations

import json
import os
import statistics
from typing import Any

from benchmarks.in_lab import measure_in_lab
from demo.labhost import CHECKOUT, LabError, LabGuest, LabHost

ROUNDS = int(os.environ.get("VIRTFABRIC_ROUNDS", "5"))
PF = "0000:01:00.0"
VF = "0000:01:10.0"
CONFIG = f"""\
[[device]]
capability = "net.vf"
match = {{ pf = "{PF}" }}
vf_count = 1
"""
LAB = os.environ.get("VIRTFABRIC_LAB", "passthrough")


def measure() -> list[dict[str, Any]]:
    """Ratios of medians, in one run: until the guest's NIC is up, and until the command returned.

    Both begin with a function that has no driver and end with a NIC that is up in the guest: virsh
    by `managed='yes'`, and `allocate` decides, journals and verifies as well. Nothing of the agent
    runs while virsh is timed.
    """
    ours, raw = measure_in_lab(LabHost(LAB, "passthrough"), _measure_in)
    return [
        _row("until the guest's NIC is up", ours, raw, "nic"),
        _row("until the command returned", ours, raw, "returned"),
    ]


def _measure_in(lab: LabHost) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    guest = LabGuest(name="grower", priority=90)
    lab.do(f"ip link set $(ls /sys/bus/pci/devices/{PF}/net) up")
    lab.install(CONFIG)
    lab.start_agent()
    if (done := lab.start_guest(guest)).returncode:
        raise LabError(f"the guest does not start: {done.stderr}")
    lab.wait_ready(guest)
    ours = _inside(lab, "allocate", guest.name)
    lab.stop_agent()
    raw = _inside(lab, "raw", guest.name, VF)
    lab.end_guests()
    lab.clean()
    return ours, raw


def _inside(lab: LabHost, kind: str, guest: str, *more: str) -> list[dict[str, float]]:
    words = " ".join((kind, guest, str(ROUNDS), *more))
    said = lab.do(f"python3 -I {CHECKOUT}/benchmarks/inside_attach.py {words}", timeout_s=3600)
    return list(json.loads(said))


def _row(
    what: str, ours: list[dict[str, float]], raw: list[dict[str, float]], key: str
) -> dict[str, Any]:
    seconds = [statistics.median(took[key] for took in side) for side in (ours, raw)]
    ratio = seconds[0] / seconds[1]
    return {
        "what": f"allocate --device, {what}, against virsh attach-device",
        "value": round(ratio, 3), "unit": "x", "target": 2.0, "met": ratio <= 2.0,
        "seconds": [round(s, 2) for s in seconds], "rounds": ROUNDS,
    }  # fmt: skip
