"""What a topology asks of the outer QEMU, for a probe elsewhere to compare with what there is.

Such a probe should ask for each device alone (`device-list-properties`; an error means that there
is no such device). `qom-list-types` makes QEMU load all its modules, and one that was unpacked
beside the system's then takes those of the system and aborts (seen with 10.0.13 beside 7.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """A device type that QEMU must know.

    Attributes:
        properties: what QEMU must have of it.
        at_start: False if the machine starts without it and only a later hot-plug needs it.
    """

    driver: str
    properties: frozenset[str] = frozenset()
    at_start: bool = True


def device_needs(topology: Topology) -> tuple[DeviceNeed, ...]:
    """One entry for each device type of the topology that some QEMU lacks, in whole or in part.

    igb came with QEMU 8.0, volatile CXL memory with 8.1, NVMe VFs with 7.1, vfio-user with 10.1.
    """
    needs: list[DeviceNeed] = []
    if topology.igb:
        needs.append(DeviceNeed("igb"))
    if topology.nvme:
        vfs = ("sriov_max_vfs", "sriov_vq_flexible", "sriov_vi_flexible")
        wanted = vfs if any(one.vfs for one in topology.nvme) else ()
        needs.append(DeviceNeed("nvme", frozenset(wanted)))
    if topology.edu:
        needs.append(DeviceNeed("edu"))
    if topology.cxl:
        needs.append(DeviceNeed("pxb-cxl"))
        if topology.cxl.switches:
            needs.append(DeviceNeed("cxl-upstream"))
        # also for the spare ports: what is plugged there later is volatile
        needs.append(DeviceNeed("cxl-type3", frozenset({"sn", "volatile-memdev"})))
    if topology.cards:
        needs.append(DeviceNeed("vfio-user-pci", frozenset({"socket"}), at_start=False))
    return tuple(needs)


def needs_tcg(topology: Topology) -> bool:
    """Whether KVM cannot carry the host: it aborts when a guest runs from CXL memory."""
    return topology.cxl is not None
