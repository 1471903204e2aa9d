"""What goes into the lab's image: suite, packages, modules. Pure data; its key names the image.

How a lab boots and what is configured in it is not in the image but in the payload, which is made
anew for each lab.

The same root serves the quick boot (an own initrd and PID 1, no systemd) and the Vagrant box, which
boots it with systemd.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from virtfabric.shim.lab.debian import format_debian_argv

_VERSION: Final = 1
"""Count it up when code that builds the image changes: image.py, debian.py, kernel.py, cpio.py."""
SUITE: Final = "trixie"
"""Debian 13: Linux 6.12, libvirt 11.3, QEMU 10.0, cxl-cli 81; the floor is tested outside."""
PACKAGES: Final = (
    *("systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "openssh-server", "sudo"),
    *("linux-image-amd64", "busybox-static", "ca-certificates", "xz-utils", "zstd"),
    *("libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients"),
    *("qemu-system-x86", "qemu-utils", "cxl", "ndctl", "daxctl", "pciutils", "numactl"),
    *("python3-libvirt", "python3-pyudev", "python3-psutil", "python3-dbus-next"),
    *("python3-cryptography", "python3-jeepney", "python3-jinja2", "python3-lxml", "python3-rich"),
    *("python3-pytest", "python3-pytest-timeout", "python3-hypothesis", "python3-zstandard"),
)
EXCLUDED: Final = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
)
INITRD_MODULES: Final = (
    *("virtio_pci", "virtio_blk", "crc32c_generic", "ext4"),
    *("virtio_net", "virtio_rng", "kvm_amd", "kvm_intel", "vfio_pci", "igb", "nvme"),
    *("cxl_acpi", "cxl_pci", "cxl_mem", "cxl_port", "cxl_pmem", "dax_cxl", "kmem", "device_dax"),
)
"""Loaded by the initrd, unpacked: under TCG modprobe spends its time in xz (10 s for three).

Of the kvm_* the one for the lab's processor (`load-modules`).
"""
INITRD_FILES: Final = ("load-modules",)
"""In any initrd, beside its PID 1."""
DISK_SIZE: Final = "4G"
CMDLINE: Final = (
    "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet audit=0 mitigations=off no_timer_check "
    "intel_iommu=on iommu=pt memhp_default_state=online_movable tsc=reliable"
)
"""online_movable: CXL memory can be given back (else it lands in ZONE_NORMAL for good).

tsc=reliable: Linux marks the TSC of several emulated AMD sockets "unsynchronized" and reads the
HPET instead, each time through QEMU's one lock (ten processes took 4.7 s instead of 1.4). TCG's is
the host's own, on all vCPUs.
"""


def read_file(name: str) -> str:
    """A file of the recipe."""
    return (files(__package__) / "files" / name).read_text()


def format_recipe_key() -> str:
    """Names the image: changes whenever what goes into it does."""
    texts = (read_file(name) for name in ("initrd-init", *INITRD_FILES))
    debian = format_debian_argv(SUITE, PACKAGES, excluded=EXCLUDED)
    parts = (str(_VERSION), *debian, *INITRD_MODULES, DISK_SIZE, *texts)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
