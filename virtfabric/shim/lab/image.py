"""The lab's image: a root disk, a kernel and an initrd, built once and kept in the cache.

Owns making them from the recipe. No loop device and no mount is used: mke2fs fills the file system
from a directory.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfabric.shim.cache import cache_root, ensure_built, run_tool
from virtfabric.shim.cpio import FILE, PROGRAM, format_cpio, format_directories
from virtfabric.shim.kernel import find_kernel, read_busybox, read_modules, unpack_kernel
from virtfabric.shim.lab import recipe
from virtfabric.shim.lab.debian import unpack_debian

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from virtfabric.shim.cpio import Member


@dataclass(frozen=True, slots=True)
class LabImage:
    """What a lab boots from; `disk` is never written to (labs use snapshots)."""

    kernel: Path
    initrd: Path
    disk: Path


def ensure_lab_image(report: Callable[[str], None], *, again: bool = False) -> LabImage:
    """The image, built first if the cache does not hold it: a minute or two, 600 MB.

    Args:
        report: receives one line for each step of a build; nothing when the image is there.
        again: build it though it is there. Labs that run keep the files they have open.

    Raises:
        BuildError: a tool is missing, or Debian's registry cannot be reached; an image that was
            there is there still.
    """
    final = cache_root() / "lab" / "images" / recipe.format_recipe_key()
    image = LabImage(final / "vmlinux", final / "initrd", final / "root.ext4")
    parts = [path.name for path in (image.kernel, image.initrd, image.disk)]
    ensure_built(final, lambda scratch: _build(scratch, report), parts=parts, again=again)
    return image


def _build(scratch: Path, report: Callable[[str], None]) -> Path:
    root, image = scratch / "root", scratch / "image"
    image.mkdir()
    unpack_debian(
        recipe.SUITE, recipe.PACKAGES, root, report=report, excluded=recipe.EXCLUDED
    )  # fmt: skip
    release = write_boot_files(root, image, recipe.read_file("initrd-init"), report)
    finish_root(root)
    report("writing the root disk")
    run_tool(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image / "root.ext4"), recipe.DISK_SIZE],
        scratch,
    )
    manifest = {"suite": recipe.SUITE, "kernel": release, "packages": list(recipe.PACKAGES)}
    (image / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return image


def write_boot_files(root: Path, target: Path, init: str, report: Callable[[str], None]) -> str:
    """Write `vmlinux` and `initrd` for the system in `root`; `init` is the initrd's PID 1.

    Returns:
        The kernel's release.
    """
    release, kernel = find_kernel(root)
    report(f"packing Linux {release} and an initrd of {len(recipe.INITRD_MODULES)} modules")
    (target / "vmlinux").write_bytes(unpack_kernel(kernel.read_bytes()))
    modules = read_modules(root, release, recipe.INITRD_MODULES)
    archive = format_cpio(_initrd_members(init, read_busybox(), modules))
    (target / "initrd").write_bytes(gzip.compress(archive, 1, mtime=0))
    return release


def finish_root(root: Path) -> None:
    """Make room for this checkout, and remove what no lab uses."""
    (root / "opt" / "virtfabric").mkdir()
    for useless in (*root.glob("boot/initrd.img-*"), *root.glob("etc/ssh/ssh_host_*")):
        useless.unlink()


def _initrd_members(init: str, busybox: bytes, modules: Mapping[str, bytes]) -> Iterator[Member]:
    yield from format_directories("bin", "dev", "proc", "sys", "modules", "new")
    yield "bin/busybox", PROGRAM, busybox
    yield "init", PROGRAM, init.encode()
    for name in recipe.INITRD_FILES:
        yield name, FILE, recipe.read_file(name).encode()
    yield "modules/order", FILE, "".join(f"{name}\n" for name in modules).encode()
    for name, content in modules.items():
        yield f"modules/{name}", FILE, content
