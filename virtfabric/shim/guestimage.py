"""The smallest Linux guest that takes hot-plug: Debian's kernel, busybox and one init script.

Owns fetching, building and caching `vmlinux` and `initrd`. It starts no guest. The image is built
once for a recipe (init, modules, kernel package) and published by a rename, so that
several builders at once end with one image.

What the guest prints on its serial console, one line each:

    VFREADY
    VFSTAT up=12.3 online=0-1 present=0-1 memtotal_kib=501234 memavail_kib=401234
    VFDEV net eth0 52:54:00:00:00:01
    VFDEV block nvme0n1 written=b6d81b36...  read=b6d81b36...
    VFDEV gone net eth0
    VFDEV memory touched=528482304

VFREADY comes once, when hot-plug is served; VFSTAT then about every second. VFDEV comes with a
NIC that was plugged in (before or after VFREADY), which is up then and answers at the link-local
IPv6 address of its MAC address; with an NVMe disk, whose first 256 KiB were written and read past
every cache (MD5); and when either goes. With `vftouch=MIB` on its command line, memory that is
plugged in is written to, and VFDEV comes when so much has been: bytes written.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfabric.shim.cache import BuildError, cache_root, ensure_built
from virtfabric.shim.cpio import FILE, PROGRAM, format_cpio, format_directories
from virtfabric.shim.kernel import (
    PACKAGE,
    fetch_kernel,
    find_kernel,
    read_busybox,
    read_modules,
    unpack_kernel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from virtfabric.shim.cpio import Member

_VERSION = 1
"""Count it up when code that builds the image changes: here, kernel.py, cpio.py."""
# Resolved with modules.dep; what the kernel has built in is skipped.
MODULES = (
    "virtio_pci", "virtio_mem", "virtio_balloon", "virtio_console", "virtio_net",
    "igbvf", "nvme",
)  # fmt: skip
# online_movable: memory that virtio-mem plugs can be given back (without it 4 MiB stick).
# swiotlb: a guest with memory above 4 GiB, as virtio-mem puts it, sets 64 MiB aside for nothing.
# no_timer_check: under TCG on a busy host the kernel's own test of the timer misses its ticks, and
# the guest panics with "IO-APIC + timer doesn't work" (seen once in some 20 boots at load 5).
# iommu=noaperture: on QEMU's AMD processor (family 15) the kernel looks for an AGP bridge in 8192
# places, which is half of the boot of a KVM guest in an emulated host (0.5 ms each, measured).
# nopvspin: a vCPU that waits for a lock that nobody gives back is then seen to spin; asleep in
# kvm_wait it looks idle. It does not end the hangs in an emulated host (docs/lab.md).
# unknown_nmi_panic: a fault to inject, `virsh inject-nmi`.
CMDLINE = (
    "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable swiotlb=noforce "
    "no_timer_check iommu=noaperture nopvspin unknown_nmi_panic"
)
READY_LINE = "VFREADY"
STAT_PREFIX = "VFSTAT "

# It waits with `read`, as a `sleep` is a process: half of what an idle guest took (under TCG 24 ms
# of the host's time a line, 13 without), and in an emulated host idle guests are most of the work.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
# CPUs that come are brought online by the event, never by a loop: a loop would also bring back the
# one that is just being taken away.
uevent /uevent > /dev/null 2>&1 &
# What was plugged in before anybody listened, once more. Netlink's 15 is uevents; 0 the kernel.
until awk '$2 == 15 && $3 > 0 {found = 1} END {exit !found}' /proc/net/netlink; do
  sleep 0.1
done
for event in /sys/class/net/*/uevent /sys/block/nvme*/uevent; do
  [ ! -e "$event" ] || echo add > "$event"
done
read -r words < /proc/cmdline
for word in $words; do
  case $word in
    vftouch=*)
      mkdir /touched
      mount -t tmpfs -o size=8g touched /touched
      echo "${word#*=}" > /touch ;;
  esac
done
read -r up rest < /proc/uptime
echo VFREADY
mkfifo /never
exec 3<> /never
while :; do
  read -r up rest < /proc/uptime
  read -r online < /sys/devices/system/cpu/online
  read -r present < /sys/devices/system/cpu/present
  while read -r key value rest; do
    case $key in
      MemTotal:) total=$value ;;
      MemAvailable:) available=$value; break ;;
    esac
  done < /proc/meminfo
  echo "VFSTAT up=$up online=$online present=$present memtotal_kib=$total memavail_kib=$available"
  read -rt 1 <&3
done
"""
UEVENT = """\
#!/bin/busybox sh
tell() { echo "VFDEV $*" > /dev/console; }
try_disk() {
  dd if=/dev/urandom of=/pattern bs=64k count=4 2> /dev/null
  dd if=/pattern of="/dev/$DEVNAME" bs=64k oflag=direct 2> /dev/null
  dd if="/dev/$DEVNAME" of=/found bs=64k count=4 iflag=direct 2> /dev/null
  written=$(md5sum < /pattern) read=$(md5sum < /found)
  tell block "$DEVNAME" "written=${written%% *} read=${read%% *}"
}
# New memory is in ZONE_MOVABLE, where the kernel looks first for pages of files in memory. 2 MiB of
# a block stay free for the kernel's watermarks.
touch_block() {
  dd if=/dev/zero bs=1M count=126 >> /touched/pages 2> /dev/null
  read -r wanted < /touch
  size=$(stat -c %s /touched/pages)
  [ "$size" -ge $(( (wanted << 20) / 128 * 126 )) ] || return
  tell memory "touched=$size"
  rm /touched/pages
}
case $ACTION:$SUBSYSTEM:$DEVPATH in
  online:memory:*) [ ! -e /touch ] || touch_block ;;
  add:cpu:*) echo 1 > "/sys$DEVPATH/online" ;;
  add:net:*/virtio*|add:net:/devices/virtual/*) ;;
  add:net:*) ip link set "$INTERFACE" up; tell net "$INTERFACE" "$(cat "/sys$DEVPATH/address")" ;;
  add:block:*/nvme*n[0-9]) try_disk ;;
  remove:net:*) tell gone net "$INTERFACE" ;;
  remove:block:*/nvme*n[0-9]) tell gone block "$DEVNAME" ;;
esac
exit 0
"""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A kernel and an initrd to boot it with; `cmdline` is what the image needs."""

    kernel: Path
    initrd: Path
    cmdline: str = CMDLINE


def guest_cache() -> Path:
    """Where guest images are kept."""
    return cache_root() / "guest"


def format_recipe_key() -> str:
    """Names the image: changes whenever what goes into it does."""
    parts = (str(_VERSION), "vmlinux", PACKAGE, *MODULES, INIT, UEVENT)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def ensure_guest_image(
    cache: Path | None = None,
    *,
    kernel_tree: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> GuestImage:
    """The image, built first if the cache does not hold it. Safe to call from many processes.

    Args:
        cache: where images are kept; None for the default.
        kernel_tree: an unpacked kernel package (boot/, lib/modules/) to use instead of a download.
        report: receives one line for each step of a build; nothing when the image is there.

    Raises:
        BuildError: a tool is missing or the kernel package cannot be had.
    """
    final = ensure_built(
        (cache or guest_cache()) / format_recipe_key(),
        lambda scratch: _build(scratch, kernel_tree, report),
    )
    return GuestImage(final / "vmlinux", final / "initrd")


def _build(scratch: Path, kernel_tree: Path | None, report: Callable[[str], None]) -> Path:
    tree = kernel_tree or fetch_kernel(scratch, lambda line: report(f"guest image: {line}"))
    release, kernel = find_kernel(tree)
    report(f"guest image: packing Linux {release}, busybox and {', '.join(MODULES)}")
    image = scratch / "image"
    image.mkdir()
    (image / "vmlinux").write_bytes(unpack_kernel(kernel.read_bytes()))
    modules = read_modules(tree, release, MODULES)
    archive = format_cpio(_choose_files(read_busybox(), modules))
    (image / "initrd").write_bytes(gzip.compress(archive, 6, mtime=0))
    (image / "manifest.json").write_text(
        json.dumps({"kernel": release, "modules": list(modules)}, indent=1) + "\n"
    )
    return image


def _choose_files(busybox: bytes, modules: Mapping[str, bytes]) -> Iterator[Member]:
    yield from format_directories("bin", "dev", "proc", "sys", "modules")
    yield "bin/busybox", PROGRAM, busybox
    yield "init", PROGRAM, INIT.encode()
    yield "uevent", PROGRAM, UEVENT.encode()
    yield "modules/order", FILE, "".join(f"{name}\n" for name in modules).encode()
    for name, content in modules.items():
        yield f"modules/{name}", FILE, content


def main() -> None:
    """Builds the image if need be and prints the paths of kernel and initrd."""

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        image = ensure_guest_image(report=report)
    except BuildError as error:
        sys.exit(f"guest image: {error}")
    sys.stdout.write(f"{image.kernel}\n{image.initrd}\n")


if __name__ == "__main__":
    main()
