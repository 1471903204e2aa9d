"""What stays of a function for as long as it is registered with the kernel, read once.

Not here, though they seldom change: `numa_node`, `reset_method`, `driver_override` (anybody may
write them, and no event tells), `sriov_totalvfs` (a PF's driver may lower it), and everything in
the configuration space that is a setting. Absent links are not here either: a VF is on the bus
before it has its `physfn`, and any function before it has its `iommu_group`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.pci import configspace

if TYPE_CHECKING:
    from virtfabric.adapters.pci.attributes import Attributes
    from virtfabric.model.badge import Badge
    from virtfabric.model.device import PciAddress

_OPTIONAL: Final = re.compile(
    "aer_dev_fatal|aer_rootport_total_err_fatal|boot_vga|current_link_speed|current_link_width|"
    "max_link_speed|max_link_width|reset_method|sriov_totalvfs"
)
_BRIDGE_CLASS: Final = 0x0604
_WIDTHS: Final = (1, 2, 4, 8, 12, 16, 32)


@dataclass(frozen=True, slots=True)
class Lasting:
    """Of one function.

    Attributes:
        inode: of its link on the bus: another one is another function, whatever its address.
        home: its directory below `devices`.
        present: which of the files that not every function has are there.
        group, pf: None where the link was not there yet.
        speed_max, width_max: 0 where they were not told yet.
        express, acs: where these capabilities are in the configuration space.
        badge: of a slice's function.
        certain: all of it was told by a device that answered; else it is read anew.
    """

    inode: int
    home: str
    present: frozenset[str]
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    class_code: int
    bridge: bool
    group: int | None = None
    pf: PciAddress | None = None
    speed_max: int = 0
    width_max: int = 0
    express: int | None = None
    acs: int | None = None
    badge: Badge | None = None
    certain: bool = False


def read_lasting(read: Attributes, inode: int) -> Lasting | None:
    """None for a function that is going away.

    Raises:
        InvalidValueError: a file does not have the form that the kernel documents.
    """
    vendor, device, class_code = (read.number(name, 16) for name in ("vendor", "device", "class"))
    if vendor is None or device is None or class_code is None:
        return None
    # Waits until a reset is over; it also wakes a function that sleeps.
    config = read.config(configspace.SIZE)
    bridge = configspace.parse_bridge(config)
    return complete(
        Lasting(
            inode=inode, home=read.home, present=read.among(_OPTIONAL),
            vendor=vendor, device=device, class_code=class_code,
            subsystem_vendor=read.number("subsystem_vendor", 16) or 0,
            subsystem_device=read.number("subsystem_device", 16) or 0,
            bridge=class_code >> 8 == _BRIDGE_CLASS if bridge is None else bridge,
            express=configspace.find_express(config), acs=configspace.find_acs(config),
            badge=configspace.parse_badge(config), certain=not configspace.is_silent(config),
        ),
        read,
    )  # fmt: skip


def complete(known: Lasting, read: Attributes) -> Lasting:
    """The same with what was not told before, as far as it is now.

    Raises:
        InvalidValueError: as for `read_lasting`.
    """
    if known.group is None and (group := read.group()) is not None:
        known = replace(known, group=group)
    if known.pf is None and not known.bridge and (pf := read.function("physfn")) is not None:
        known = replace(known, pf=pf)
    if known.width_max not in _WIDTHS and known.present & {"max_link_speed", "max_link_width"}:
        # asked last: the register of a device that does not answer is all ones, which is no width
        told = read.speed("max_link_speed"), read.width("max_link_width")
        if told != (known.speed_max, known.width_max):
            known = replace(known, speed_max=told[0], width_max=told[1])
    return known
