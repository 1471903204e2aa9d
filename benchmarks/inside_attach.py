"""Runs in the lab: times a command until it returns and until the guest has a NIC more.

    inside_attach.py allocate GUEST ROUNDS          `virtfabric allocate GUEST --device net.vf`
    inside_attach.py raw GUEST ROUNDS ADDRESS       `virsh attach-device`, managed='yes'

The way back is not measured. The standard library alone, as its start is not measured either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

_PATIENCE_S = 300.0
_HOSTDEV = """\
<hostdev mode='subsystem' type='pci' managed='yes'><source>
  <address domain='0x{0}' bus='0x{1}' slot='0x{2}' function='0x{3}'/>
</source></hostdev>
"""


def _said(guest: str, word: str) -> int:
    console = Path(f"/var/log/libvirt/qemu/{guest}-console.log")
    return console.read_text(errors="replace").count(word)


def _await(guest: str, word: str, count: int) -> None:
    tick, deadline = threading.Event(), time.monotonic() + _PATIENCE_S
    while _said(guest, word) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} did not say {word!r}")
        tick.wait(0.02)


def _run(*argv: str) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done.stdout


def _measure(guest: str, argv: list[str]) -> tuple[dict[str, float], str]:
    """Seconds until the command returned and until the NIC is up; what it printed."""
    before = _said(guest, "VFDEV net")
    up: list[float] = []

    def watch() -> None:
        _await(guest, "VFDEV net", before + 1)
        up.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    began = time.monotonic()
    watcher.start()
    said = _run(*argv)
    returned = time.monotonic() - began
    watcher.join()
    return {"returned": returned, "nic": up[0] - began}, said


def _allocate(guest: str) -> dict[str, float]:
    gone = _said(guest, "VFDEV gone net")
    words = ["virtfabric", "--json", "allocate", guest, "--device", "net.vf", "--deadline", "300"]
    took, said = _measure(guest, words)
    result = json.loads(said)["result"]
    _run("virtfabric", "release", result["grant"])
    _await(guest, "VFDEV gone net", gone + 1)
    return took | {"agent": result["agent_s"]}


def _attach(guest: str, address: str) -> dict[str, float]:
    function = Path("/sys/bus/pci/devices") / address
    xml = Path("/tmp/hostdev.xml")
    xml.write_text(_HOSTDEV.format(*address.replace(".", ":").split(":")))
    gone = _said(guest, "VFDEV gone net")
    took, _ = _measure(guest, ["virsh", "-q", "attach-device", guest, str(xml), "--live"])
    _run("virsh", "-q", "detach-device", guest, str(xml), "--live")
    _await(guest, "VFDEV gone net", gone + 1)
    deadline = time.monotonic() + _PATIENCE_S
    while "<hostdev" in _run("virsh", "-q", "dumpxml", guest):
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} did not let go of {address}")
    # libvirt leaves a function on vfio-pci that had no driver; the next round begins with none
    if (function / "driver").exists():
        (function / "driver" / "unbind").write_text(address)
    (function / "driver_override").write_text("\n")
    return took


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
