"""What `doctor` looks at for PCIe functions: IOMMU, vfio-pci, pools, quarantine, free ports."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtfabric.cli.findings import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.device import DevicePool

    Json = dict[str, Any]


def check_iommu(*, wanted: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """Without an IOMMU no function can be given to a guest; `wanted` when a pool is configured."""
    groups = root / "sys/kernel/iommu_groups"
    count = sum(1 for _ in groups.iterdir()) if groups.is_dir() else 0
    if count:
        yield Finding("iommu", Verdict.OK, f"{count} groups")
    elif wanted:
        mend = "switch VT-d or AMD-Vi on in the firmware; intel_iommu=on on Intel; then reboot"
        yield Finding("iommu", Verdict.FAIL, "off: no function has an IOMMU group", mend)
    else:
        yield Finding("iommu", Verdict.OK, "off, and not needed: there is no [[device]]")


def check_vfio(*, wanted: bool, root: Path = Path("/"), release: str = "") -> Iterator[Finding]:
    """vfio-pci loaded, built in, or there to be loaded."""
    if (root / "sys/bus/pci/drivers/vfio-pci").is_dir():
        yield Finding("vfio-pci", Verdict.OK, "loaded")
        return
    modules = root / "lib/modules" / (release or platform.release())
    listed = [modules / "modules.dep", modules / "modules.builtin"]
    if any("/vfio-pci.ko" in path.read_text() for path in listed if path.is_file()):
        yield Finding("vfio-pci", Verdict.OK, "not loaded yet; the agent loads it")
    elif wanted:
        mend = "install the kernel's package with all modules (Debian: linux-image-amd64)"
        yield Finding("vfio-pci", Verdict.FAIL, "this kernel has no module vfio-pci", mend)
    else:
        detail = "this kernel has none; not needed: there is no [[device]]"
        yield Finding("vfio-pci", Verdict.OK, detail)


def check_pools(pools: tuple[DevicePool, ...], functions: list[Json]) -> Iterator[Finding]:
    """Every capability has members that can be given away."""
    for capability in dict.fromkeys(pool.capability for pool in pools):
        members = [f for f in functions if f["capability"] == capability]
        free = [f for f in members if not (f["holder"] or f["quarantine"] or f["obstacles"])]
        held = sum(f["holder"] is not None for f in members)
        name = f"device {capability}"
        detail = f"{len(members)} functions: {held} held, {len(free)} free"
        if not members:
            mend = "compare its `match` with virtfabric devices; does the PF have VFs?"
            yield Finding(name, Verdict.WARN, "no function of this host matches", mend)
        elif not held and not free:
            why = next((f["obstacles"][0] for f in members if f["obstacles"]), "")
            yield Finding(name, Verdict.WARN, f"{detail}; {why}", "see virtfabric devices")
        else:
            yield Finding(name, Verdict.OK, detail)


def check_quarantine(functions: list[Json]) -> Iterator[Finding]:
    """Each function that nobody may have, with its way out."""
    for function in functions:
        entry = function["quarantine"]
        if entry:
            yield Finding(
                f"quarantine {function['address']}", Verdict.WARN, entry["why"], entry["remedy"]
            )


def check_ports(guests: list[Json]) -> Iterator[Finding]:
    """Root ports cannot be added to a guest that runs: one that may want them should have some."""
    for guest in guests:
        if guest["managed"] and guest["state"] != "shutoff" and guest.get("free_ports") == 0:
            detail = f"{guest['name']} has no free PCIe port: no function can be attached to it"
            mend = f"virtfabric ports add {guest['name']} --count 4, for its next start"
            yield Finding(f"ports of {guest['name']}", Verdict.WARN, detail, mend)
