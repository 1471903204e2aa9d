"""The smallest Linux guest that takes hot-plug: Debian's kernel, busybox and one init script.

Owns fetching, building and caching `vmlinux` and `initrd`. It starts no guest. The image is built
once for a recipe (init, modules, kernel package) and published by a rename, so that
several builders at once end with one image.

The kernel is published unpacked: QEMU boots that through its PVH entry, and the guest need not
decompress it. Measured under TCG: 3.3 s to VFREADY, against 8.5 s from Debian's vmlinuz.

What the guest prints on its serial console, one line each:

    VFREADY
    VFSTAT up=12.3 online=0-1 present=0-1 memtotal_kib=501234 memavail_kib=401234

VFREADY comes once, when hot-plug is served; VFSTAT then about every second.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

KERNEL_PACKAGE = "linux-image-amd64"
# Resolved with modules.dep; what the kernel has built in is skipped.
MODULES = ("virtio_pci", "virtio_mem", "virtio_balloon", "virtio_console", "virtio_net")
# online_movable: memory that virtio-mem plugs can be given back (without it 4 MiB stick).
# swiotlb: a guest with memory above 4 GiB, as virtio-mem puts it, sets 64 MiB aside for nothing.
# no_timer_check: under TCG on a busy host the kernel's own test of the timer misses its ticks, and
# the guest panics with "IO-APIC + timer doesn't work" (seen once in some 20 boots at load 5).
CMDLINE = (
    "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable swiotlb=noforce no_timer_check"
)
READY_LINE = "VFREADY"
STAT_PREFIX = "VFSTAT "

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
read -r up rest < /proc/uptime
echo VFREADY
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
  sleep 1
done
"""
UEVENT = """\
#!/bin/busybox sh
[ "$ACTION" = add ] || exit 0
case $DEVPATH in
  /devices/system/cpu/cpu[0-9]*) echo 1 > "/sys$DEVPATH/online" ;;
esac
exit 0
"""


class GuestImageError(Exception):
    """The image cannot be built here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A kernel and an initrd to boot it with; `cmdline` is what the image needs."""

    kernel: Path
    initrd: Path
    cmdline: str = CMDLINE


def default_cache_dir() -> Path:
    """$VIRTFABRIC_CACHE/guest, or ~/.cache/virtfabric/guest."""
    base = os.environ.get("VIRTFABRIC_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "virtfabric") / "guest"


def format_recipe_key() -> str:
    """Names the image: changes whenever what goes into it does."""
    parts = ("vmlinux", KERNEL_PACKAGE, *MODULES, INIT, UEVENT)
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
        GuestImageError: a tool is missing or the kernel package cannot be had.
    """
    cache = cache or default_cache_dir()
    final = cache / format_recipe_key()
    image = GuestImage(final / "vmlinux", final / "initrd")
    if final.is_dir():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if not final.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
                _build(Path(scratch), kernel_tree, report)
                (Path(scratch) / "image").rename(final)
    return image


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(scratch: Path, kernel_tree: Path | None, report: Callable[[str], None]) -> None:
    tree = kernel_tree or _fetch_kernel(scratch, report)
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise GuestImageError(f"no boot/vmlinuz-* in {tree}")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    report(f"guest image: packing Linux {release}, busybox and {', '.join(MODULES)}")
    image = scratch / "image"
    image.mkdir()
    (image / "vmlinux").write_bytes(unpack_kernel(kernels[-1].read_bytes()))
    modules = read_modules(tree / "lib" / "modules" / release)
    archive = format_cpio(_choose_files(_read_busybox(), modules))
    (image / "initrd").write_bytes(gzip.compress(archive, 6, mtime=0))
    (image / "manifest.json").write_text(
        json.dumps({"kernel": release, "modules": list(modules)}, indent=1) + "\n"
    )


def _run(argv: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GuestImageError(f"{argv[0]} is not installed") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise GuestImageError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{tail}")
    return done.stdout


def _fetch_kernel(scratch: Path, report: Callable[[str], None]) -> Path:
    """Downloads the package that the meta-package depends on, installs nothing."""
    depends = _run(["apt-cache", "depends", KERNEL_PACKAGE], scratch)
    found = re.search(r"Depends: (linux-image-\d\S+)", depends)
    if found is None:
        raise GuestImageError(f"apt knows no kernel behind {KERNEL_PACKAGE}; run `apt-get update`")
    report(f"guest image: downloading {found[1]} (about 70 MB)")
    # The scratch directory belongs to root alone, so apt's own download user cannot write there.
    _run(["apt-get", "-o", "APT::Sandbox::User=root", "download", found[1]], scratch)
    package = next(scratch.glob("*.deb"))
    report(f"guest image: unpacking {package.name}")
    _run(["dpkg-deb", "-x", package.name, "kernel"], scratch)
    return scratch / "kernel"


def _read_busybox() -> bytes:
    found = shutil.which("busybox")
    if found is None:
        raise GuestImageError("busybox is not installed; `apt-get install busybox-static`")
    program = Path(found).read_bytes()
    if not _is_static(program):
        raise GuestImageError(f"{found} is not static; `apt-get install busybox-static`")
    return program


def _is_static(program: bytes) -> bool:
    """Whether a 64-bit ELF program names no interpreter (elf(5): PT_INTERP is 3)."""
    (start,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    kinds = (struct.unpack_from("<I", program, start + size * i)[0] for i in range(count))
    return 3 not in kinds


def unpack_kernel(kernel: bytes) -> bytes:
    """The ELF kernel out of a bzImage; the bzImage itself when its packing is not known here.

    Offsets: Linux, Documentation/x86/boot.rst, "payload_offset" and "payload_length".
    """
    start, length = struct.unpack_from("<II", kernel, 0x248)
    start += ((kernel[0x1F1] or 4) + 1) * 512
    packed = kernel[start : start + length]
    if packed.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(packed)  # four bytes of length follow the stream
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(packed)
    return kernel


def read_modules(modules: Path) -> Mapping[str, bytes]:
    """The uncompressed wanted modules of one kernel, dependencies before their users.

    Args:
        modules: lib/modules/RELEASE as the package ships it (without modules.dep).
    """
    base = modules.parents[2]
    _run(["depmod", "-b", str(base), modules.name], base)
    needs = _parse_modules_dep((modules / "modules.dep").read_text())
    builtin = {_name(line) for line in (modules / "modules.builtin").read_text().split()}
    ordered: dict[str, bytes] = {}
    for wanted in MODULES:
        path = next((path for path in needs if _name(path) == wanted), None)
        if path is None:
            if wanted in builtin:
                continue
            raise GuestImageError(f"kernel {modules.name} has no module {wanted}")
        for needed in (*reversed(needs[path]), path):
            ordered.setdefault(f"{_name(needed)}.ko", _read_module(modules / needed))
    return ordered


def _parse_modules_dep(text: str) -> dict[str, list[str]]:
    """Path -> the paths it needs, the deepest last, as modules.dep(5) lists them."""
    lines = (line.partition(":") for line in text.splitlines())
    return {path: needed.split() for path, _, needed in lines}


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _choose_files(busybox: bytes, modules: Mapping[str, bytes]) -> Iterator[tuple[str, int, bytes]]:
    """Path, mode and content of each member; parents come first."""
    for directory in ("bin", "dev", "proc", "sys", "modules"):
        yield directory, 0o040755, b""
    yield "bin/busybox", 0o100755, busybox
    yield "init", 0o100755, INIT.encode()
    yield "uevent", 0o100755, UEVENT.encode()
    yield "modules/order", 0o100644, "".join(f"{name}\n" for name in modules).encode()
    for name, content in modules.items():
        yield f"modules/{name}", 0o100644, content


def format_cpio(files: Iterator[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

    Written here rather than by cpio(1): the same bytes for the same recipe, whoever builds it.
    """
    archive = bytearray()
    members = [*files, ("TRAILER!!!", 0, b"")]
    for inode, (path, mode, content) in enumerate(members, start=1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += content + bytes(-len(content) % 4)
    return bytes(archive)


def main() -> None:
    """Builds the image if need be and prints the paths of kernel and initrd."""

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        image = ensure_guest_image(report=report)
    except GuestImageError as error:
        sys.exit(f"guest image: {error}")
    sys.stdout.write(f"{image.kernel}\n{image.initrd}\n")


if __name__ == "__main__":
    main()
