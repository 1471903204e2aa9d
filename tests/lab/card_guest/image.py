"""The guest that drives a card: Debian's kernel with vfio, busybox, and `vfcard`, built once."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from virtfabric.shim.cache import ensure_built, run_tool
from virtfabric.shim.cpio import FILE, PROGRAM, format_cpio, format_directories
from virtfabric.shim.guestimage import GuestImage, guest_cache
from virtfabric.shim.kernel import (
    fetch_kernel,
    find_kernel,
    read_busybox,
    read_modules,
    unpack_kernel,
)

HERE = Path(__file__).parent
MODULES = ("vfio_pci", "vfio_iommu_type1")
CMDLINE = "console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on"


def ensure_card_guest() -> GuestImage:
    parts = ((HERE / name).read_bytes() for name in ("vfcard.c", "init"))
    recipe = b"\0".join([*parts, " ".join(MODULES).encode()])
    final = ensure_built(guest_cache() / f"card-{hashlib.sha256(recipe).hexdigest()[:16]}", _build)
    return GuestImage(final / "vmlinux", final / "initrd", CMDLINE)


def _build(scratch: Path) -> Path:
    tree = fetch_kernel(scratch, print)
    release, kernel = find_kernel(tree)
    image = scratch / "image"
    image.mkdir()
    program = scratch / "vfcard"
    run_tool(
        ["gcc", "-static", "-O1", "-Wall", "-o", str(program), str(HERE / "vfcard.c")], scratch
    )
    modules = read_modules(tree, release, MODULES)
    members = [
        *format_directories("bin", "dev", "proc", "sys", "modules"),
        ("bin/busybox", PROGRAM, read_busybox()),
        ("bin/vfcard", PROGRAM, program.read_bytes()),
        ("init", PROGRAM, (HERE / "init").read_bytes()),
        ("modules/order", FILE, "".join(f"{name}\n" for name in modules).encode()),
        *((f"modules/{name}", FILE, content) for name, content in modules.items()),
    ]
    (image / "vmlinux").write_bytes(unpack_kernel(kernel.read_bytes()))
    (image / "initrd").write_bytes(gzip.compress(format_cpio(members), 6, mtime=0))
    return image
