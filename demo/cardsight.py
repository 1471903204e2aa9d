"""What kernel, libvirt, QEMU and the guests themselves show of cards' functions, as JSON.

Runs on the host that is looked at (in the lab), with the standard library and `devicesight` alone:
nothing of virtfabric can hide here. It changes nothing.

    python3 cardsight.py '{"guests": ["database"]}'
"""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import devicesight as sight

VENDOR, SLICE, MANAGEMENT = "0xf0ca", "0x0c02", "0x0c01"
_DVSEC = 0x23
_TEXTS = (0x1C, 0x5C)


def read_names(address: str) -> tuple[str, str]:
    """Card and slice, as the function says in its configuration space (docs/card-protocol.md)."""
    config = (sight.DEVICES / address / "config").read_bytes()
    at = 0x100
    while 0x100 <= at <= len(config) - 4:
        (header,) = struct.unpack_from("<I", config, at)
        if header & 0xFFFF == _DVSEC:
            card, name = (config[at + x : at + x + 64].rstrip(b"\0").decode() for x in _TEXTS)
            return card, name
        at = header >> 20
    return "", ""


def look_at_functions() -> dict[str, Any]:
    """All functions of slices, by address."""
    found = {}
    for there in sorted(sight.DEVICES.iterdir()):
        ids = tuple((there / name).read_text().strip() for name in ("vendor", "device"))
        if ids == (VENDOR, SLICE):
            seen = sight.look_at_function(there.name) or {}
            card, name = read_names(there.name)
            found[there.name] = {
                "card": card, "slice": name, "driver": seen["driver"], "group": seen["group"],
                "width": int((there / "current_link_width").read_text()),
            }  # fmt: skip
    return found


def look_at_console(guest: str) -> tuple[bool, dict[str, Any]]:
    """Whether the guest is up, and what its program told of each function that is in it now."""
    path = sight.CONSOLES / f"{guest}-console.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    inside: dict[str, Any] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        if found := re.search(r"VFDEV (gone )?card (\S+)", line):
            inside.pop(found[2], None)
            if not found[1]:
                inside[found[2]] = {"state": -1, "good": 0, "bad": [], "attacks": []}
        elif (found := re.search(r"VFAES (\S+) (.*)", line)) and found[1] in inside:
            note(inside[found[1]], found[2].strip())
    return "VFREADY" in text, inside


def note(function: dict[str, Any], told: str) -> None:
    """One line of the program."""
    if state := re.fullmatch(r"state=(\d+)", told):
        function["state"] = int(state[1])
    elif re.fullmatch(r"round=\d+ good", told):
        function["good"] += 1
    elif told.startswith("attack"):
        function["attacks"].append(told)
    else:
        function["bad"].append(told)


def look_at_guest(guest: str) -> dict[str, Any]:
    """One guest by all that can be asked but the agent."""
    pid = sight.find_qemu(guest)
    ready, inside = look_at_console(guest)
    return {
        "pid": pid,
        "ready": ready,
        "hostdevs": sight.look_at_hostdevs(guest) if pid else [],
        "groups": sight.look_at_open_groups(pid) if pid else [],
        "inside": inside,
    }


def main() -> None:
    """Print what is seen."""
    asked = json.loads(sys.argv[1])
    guests = {name: look_at_guest(name) for name in asked["guests"]}
    print(json.dumps({"functions": look_at_functions(), "guests": guests}))


if __name__ == "__main__":
    main()
