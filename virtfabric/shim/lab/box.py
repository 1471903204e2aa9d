"""The Vagrant box: the lab's Debian with this checkout installed, booted by systemd.

Owns building it. What is slow, the Debian system, is kept by its recipe; a box is that and one
state of the checkout, and takes half a minute. No loop device and no mount is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cache import cache_root, ensure_built, run_tool, scratch_in
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.lab import recipe
from virtfabric.shim.lab.debian import unpack_debian
from virtfabric.shim.lab.image import finish_root, write_boot_files
from virtfabric.shim.lab.payload import write_payload_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME: Final = "virtfabric-lab"
_VERSION: Final = 1
"""Count it up when code that builds the box or its Debian changes: here."""
_INITRD_INIT: Final = "box/initrd-init"
_FILES: Final = (
    *("setup", "insecure.pub", "sshd.conf", "lab.network"),
    *("virtfabricd.conf", f"{NAME}-guests.service"),
)
_FORMAT: Final = ("-c", "-O", "qcow2", "-o", "compression_type=zstd")
_SIZE_GIB: Final = int(recipe.DISK_SIZE.removesuffix("G"))


@dataclass(frozen=True, slots=True)
class Box:
    """What vagrant adds and boots.

    Attributes:
        name: changes with what is in it; vagrant-libvirt keeps images by the box's name, and would
            take an old one for a new one of the same name.
        package: the .box file.
        kernel: booted directly, as `initrd` is.
    """

    name: str
    package: Path
    kernel: Path
    initrd: Path


def ensure_box(report: Callable[[str], None]) -> Box:
    """The box of this checkout, built first if the cache does not hold it.

    Boxes of other states of the checkout that were not used for a day leave the cache then;
    machines made from them go on, for vagrant and libvirt have copies.

    Args:
        report: receives one line for each step of a build; nothing when the box is there.

    Raises:
        BuildError: a tool is missing, or Debian's registry cannot be reached.
    """
    base = ensure_built(
        _cache() / "debian" / _format_base_key(), lambda scratch: _build_base(scratch, report)
    )
    with _payload(report) as payload:
        key = _format_box_key(payload)
        final = ensure_built(
            _cache() / "boxes" / key,
            lambda scratch: _build_box(scratch, base, payload, report),
            spares=lambda _: False,
        )
    return Box(f"{NAME}-{key}", final / f"{NAME}.box", base / "vmlinux", base / "initrd")


def _cache() -> Path:
    return cache_root() / "lab" / "box"


def _format_base_key() -> str:
    parts = (str(_VERSION), recipe.format_recipe_key(), recipe.read_file(_INITRD_INIT))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _format_box_key(payload: Path) -> str:
    """Names a box by the Debian below it and every file that is put in."""
    digest = hashlib.sha256(_format_base_key().encode())
    for path in sorted(payload.rglob("*")):
        if path.is_file():
            digest.update(f"\0{path.relative_to(payload)}\0{path.stat().st_mode:o}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _payload(report: Callable[[str], None]) -> Iterator[Path]:
    """What the box has in /opt/virtfabric, in a directory."""
    with scratch_in(_cache() / "payloads") as tree:
        write_payload_tree(tree, ensure_guest_image(report=report))
        (tree / "box").mkdir()
        for name in _FILES:
            (tree / "box" / name).write_text(recipe.read_file(f"box/{name}"))
        yield tree


def _build_base(scratch: Path, report: Callable[[str], None]) -> Path:
    root, base = scratch / "root", scratch / "base"
    base.mkdir()
    unpack_debian(
        recipe.SUITE, recipe.PACKAGES, root, report=report, excluded=recipe.EXCLUDED
    )  # fmt: skip
    write_boot_files(root, base, recipe.read_file(_INITRD_INIT), report)
    finish_root(root)
    report("packing the Debian system")
    run_tool(["tar", "--zstd", "--numeric-owner", "-cf", str(base / "root.tar.zst"), "."], root)
    return base


def _build_box(scratch: Path, base: Path, payload: Path, report: Callable[[str], None]) -> Path:
    root, box = scratch / "root", scratch / "box"
    root.mkdir()
    box.mkdir()
    report("unpacking the Debian system")
    run_tool(["tar", "--numeric-owner", "-xf", str(base / "root.tar.zst")], root)
    report("installing this checkout, the agent's unit and the guests")
    shutil.copytree(payload, root / "opt" / "virtfabric", dirs_exist_ok=True)
    (root / "opt" / "virtfabric").chmod(0o755)
    run_tool(["chroot", str(root), "/bin/sh", "/opt/virtfabric/box/setup"], scratch)
    report("writing the root disk")
    disk, image = scratch / "disk", box / "box.img"
    run_tool(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), recipe.DISK_SIZE], scratch)
    run_tool(["qemu-img", "convert", *_FORMAT, str(disk), str(image)], scratch)
    report("packing the box")
    metadata = {"provider": "libvirt", "format": "qcow2", "virtual_size": _SIZE_GIB}
    (box / "metadata.json").write_text(json.dumps(metadata) + "\n")
    # not compressed again: vagrant looks at the content, not at the name
    run_tool(["tar", "-cf", f"{NAME}.box", "metadata.json", "box.img"], box)
    for packed in ("metadata.json", "box.img"):
        (box / packed).unlink()
    return box
