"""Runs in the lab: times a command until it returns and until the guest has a NIC more.

    inside_attach.py allocate GUEST ROUNDS          `virtfabric allocate GUEST --device net.vf`
    inside_attach.py raw GUEST ROUNDS ADDRESS       `virsh attach-device`, managed='yes'

The way back is not measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from inside_clock import PATIENCE_S, await_said, count_said, measure, run

_UP = "VFDEV net"
_GONE = "VFDEV gone net"
_HOSTDEV = """\
<hostdev mode='subsystem' type='pci' managed='yes'><source>
  <address domain='0x{0}' bus='0x{1}' slot='0x{2}' function='0x{3}'/>
</source></hostdev>
"""


def _allocate(guest: str) -> dict[str, float]:
    gone = count_said(guest, _GONE)
    words = ["virtfabric", "--json", "allocate", guest, "--device", "net.vf", "--deadline", "300"]
    returned, nic, said = measure(guest, words, _UP)
    result = json.loads(said)["result"]
    run("virtfabric", "release", result["grant"])
    await_said(guest, _GONE, gone + 1)
    return {"returned": returned, "nic": nic, "agent": result["agent_s"]}


def _attach(guest: str, address: str) -> dict[str, float]:
    function = Path("/sys/bus/pci/devices") / address
    xml = Path("/tmp/hostdev.xml")
    xml.write_text(_HOSTDEV.format(*address.replace(".", ":").split(":")))
    gone = count_said(guest, _GONE)
    words = ["virsh", "-q", "attach-device", guest, str(xml), "--live"]
    returned, nic, _ = measure(guest, words, _UP)
    run("virsh", "-q", "detach-device", guest, str(xml), "--live")
    await_said(guest, _GONE, gone + 1)
    deadline = time.monotonic() + PATIENCE_S
    while "<hostdev" in run("virsh", "-q", "dumpxml", guest):
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} did not let go of {address}")
    # libvirt leaves a function on vfio-pci that had no driver; the next round begins with none
    if (function / "driver").exists():
        (function / "driver" / "unbind").write_text(address)
    (function / "driver_override").write_text("\n")
    return {"returned": returned, "nic": nic}


def main() -> None:
    """Print one object for each round as JSON."""
    kind, guest, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == "allocate":
        took = [_allocate(guest) for _ in range(rounds)]
    else:
        took = [_attach(guest, sys.argv[4]) for _ in range(rounds)]
    print(json.dumps(took))


if __name__ == "__main__":
    main()
