"""The lab's second disk: this checkout, the commands that run it, a guest image and the keys.

Owns what a lab finds in /opt/virtfabric. It is made anew for each `lab up` (about a second), so the
agent that runs in the lab is this one.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import virtfabric
from virtfabric.shim.cache import run_tool
from virtfabric.shim.guestimage import CMDLINE, format_recipe_key
from virtfabric.shim.guestxml import GuestSpec, format_guest_xml
from virtfabric.shim.lab.recipe import read_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.shim.guestimage import GuestImage
    from virtfabric.shim.lab.remote import Keys

_SIZE: Final = "512M"
_CHECKOUT: Final = (
    *("hooks", "xml_templates", "vagrant", "tests", "demo", "benchmarks", "pyproject.toml"),
)
"""What lies beside the package in a checkout; an installed package carries what it needs itself."""
_HOME: Final = Path("/opt/virtfabric")
_GUEST_IMAGE: Final = Path("cache", "guest", format_recipe_key())
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")


def write_payload(
    disk: Path, guest: GuestImage, keys: Keys, cards: Path | None = None
) -> None:  # fmt: skip
    """Write the disk; `cards`: a directory that the lab finds as lab/cards.

    What it is made from lies beside it meanwhile, and so goes with the lab if this is cut off.

    Raises:
        BuildError: mke2fs is missing or failed.
    """
    with tempfile.TemporaryDirectory(dir=disk.parent, prefix="payload-") as scratch:
        tree = Path(scratch)
        write_payload_tree(tree, guest)
        shutil.copy(keys.host, tree / "lab" / "host_key")
        shutil.copy(keys.client.with_suffix(".pub"), tree / "lab" / "authorized_keys")
        if cards is not None:
            shutil.copytree(cards, tree / "lab" / "cards")
        tree.chmod(0o755)
        argv = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", "virtfabric"]
        run_tool([*argv, "-d", str(tree), str(disk), _SIZE], tree)


def write_payload_tree(tree: Path, guest: GuestImage) -> None:
    """Fill a directory with what a lab finds in /opt/virtfabric, but for keys."""
    _copy_checkout(tree / "checkout")
    _copy_guest(tree / _GUEST_IMAGE, guest)
    _write_files(tree)


def _copy_checkout(target: Path) -> None:
    package = Path(virtfabric.__file__).parent
    shutil.copytree(package, target / "virtfabric", ignore=_LEFT_OUT)
    if not (package.parent / "pyproject.toml").is_file():
        return
    for name in _CHECKOUT:
        source = package.parent / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_LEFT_OUT)
        elif source.is_file():
            shutil.copy(source, target / name)


def _copy_guest(target: Path, guest: GuestImage) -> None:
    target.mkdir(parents=True)
    for part in (guest.kernel, guest.initrd):
        shutil.copy(part, target / part.name)


def choose_files() -> Iterator[tuple[str, str, int]]:
    """Where each file of the recipe goes, its text, its mode."""
    for name in ("virtfabric", "virtfabricd", "virtfabric-python"):
        yield f"bin/{name}", read_file("run-module"), 0o755
    for name in ("init", "press-memory"):
        yield f"lab/{name}", read_file(name), 0o755
    for name in ("qemu.conf", "libvirtd.conf", "sshd_config"):
        yield f"lab/{name}", read_file(name), 0o644
    yield "lab/guest.xml", format_sample_guest(), 0o644


def format_sample_guest(
    name: str = "guest",
    *,
    metadata_xml: str = "",
    virtio_mem_mib: int = 256,
    touched_mib: int | None = None,
) -> str:
    """The domain of `lab/guest.xml`: a KVM guest with virtio-mem and ports for hot-plug.

    Args:
        name: its libvirt name.
        metadata_xml: see `GuestSpec`.
        virtio_mem_mib: see `GuestSpec`.
        touched_mib: of memory that is plugged in, what it writes to and then tells of.
    """
    kernel, initrd = (_HOME / _GUEST_IMAGE / name for name in ("vmlinux", "initrd"))
    return format_guest_xml(
        GuestSpec(
            name=name, kernel=kernel, initrd=initrd, domain_type="kvm", max_vcpus=4,
            virtio_mem_mib=virtio_mem_mib, console_log=f"/var/log/libvirt/qemu/{name}-console.log",
            metadata_xml=metadata_xml,
            cmdline=CMDLINE if touched_mib is None else f"{CMDLINE} vftouch={touched_mib}",
        )
    )  # fmt: skip


def _write_files(tree: Path) -> None:
    for place, text, mode in choose_files():
        (tree / place).parent.mkdir(exist_ok=True)
        (tree / place).write_text(text)
        (tree / place).chmod(mode)
