"""The guests that a Vagrant box runs: batch, web and database, each with its policy.

Runs in the box, at each boot (virtfabric-lab-guests.service). Owns nothing but defining those that
are missing and starting those that are off.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.domxml.policy import format_policy
from virtfabric.model.policy import CpuPolicy, GuestPolicy, MemoryPolicy
from virtfabric.model.units import MIB, Bytes, MilliCpu
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.guestxml import GuestSpec, format_guest_xml
from virtfabric.shim.kvmprobe import choose_domain_type, probe_kvm

if TYPE_CHECKING:
    from virtfabric.shim.guestimage import GuestImage
    from virtfabric.shim.guestxml import DomainType

_BOOT_MIB: Final = 160
_CONSOLES: Final = "/var/log/libvirt/qemu"
_PROBE_S: Final = 300.0
"""An emulated processor on a busy machine took over 10 s to the first word of a KVM guest's kernel,
and over 90 s to its userland; a "no" makes the guests emulated in an emulated machine.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxGuest:
    """One of them.

    Attributes:
        cpu: reservation and limit, in milli-CPU.
        virtio_mem_mib: size of its virtio-mem device; of that, `plugged_mib` from the start.
    """

    name: str
    priority: int
    cpu: tuple[int, int]
    virtio_mem_mib: int
    plugged_mib: int


GUESTS: Final = (
    BoxGuest(name="batch", priority=10, cpu=(200, 900), virtio_mem_mib=384, plugged_mib=384),
    BoxGuest(name="web", priority=50, cpu=(200, 900), virtio_mem_mib=128, plugged_mib=0),
    BoxGuest(name="database", priority=90, cpu=(500, 2000), virtio_mem_mib=512, plugged_mib=128),
)
"""There is something to take from batch, and a reason to: database has the highest priority.

With a limit of 300 web had not booted after 7 minutes on an emulated processor.
"""


def format_box_guest(guest: BoxGuest, image: GuestImage, domain_type: DomainType) -> str:
    """Its domain XML."""
    reservation, limit = (MilliCpu(amount) for amount in guest.cpu)
    policy = GuestPolicy(
        priority=guest.priority,
        cpu=CpuPolicy(reservation=reservation, limit=limit),
        memory=MemoryPolicy(reservation=Bytes(_BOOT_MIB * MIB)),
    )
    return format_guest_xml(
        GuestSpec(
            name=guest.name,
            domain_type=domain_type,
            kernel=image.kernel,
            initrd=image.initrd,
            memory_mib=_BOOT_MIB,
            virtio_mem_mib=guest.virtio_mem_mib,
            virtio_mem_requested_mib=guest.plugged_mib,
            console_log=f"{_CONSOLES}/{guest.name}-console.log",
            metadata_xml=format_policy(policy),
        )
    )


def main() -> None:
    """Defines and starts the guests; ends with libvirt's words when one does not start."""
    image = ensure_guest_image()
    probe_kvm(image, first_s=_PROBE_S, timeout_s=_PROBE_S)
    domain_type = choose_domain_type(image)
    defined = set(_virsh("list", "--all", "--name").split())
    running = set(_virsh("list", "--name").split())
    for guest in GUESTS:
        if guest.name not in defined:
            _virsh("define", "/dev/stdin", stdin=format_box_guest(guest, image, domain_type))
        if guest.name not in running:
            _virsh("start", guest.name)


def _virsh(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["virsh", "--quiet", "--connect", "qemu:///system", *words],
        input=stdin, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"virsh {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
