"""Debian's kernel, made ready for a quick boot: unpacked, with just the modules that are wanted.

Owns reading a kernel package's tree (boot/, lib/modules/). A kernel is published unpacked: QEMU
boots that through its PVH entry, and the guest need not decompress it. Measured under TCG for
Linux 6.1: 3.3 s to the first program, against 8.5 s from Debian's vmlinuz.
"""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.shim.cache import BuildError, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PACKAGE = "linux-image-amd64"
_PACKINGS = {b"\xfd7zXZ": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def fetch_kernel(scratch: Path, report: Callable[[str], None]) -> Path:
    """The unpacked package that Debian's meta-package depends on; installs nothing.

    Raises:
        BuildError: apt does not know it, or cannot fetch it.
    """
    depends = run_tool(["apt-cache", "depends", PACKAGE], scratch)
    found = re.search(r"Depends: (linux-image-\d\S+)", depends)
    if found is None:
        raise BuildError(f"apt knows no kernel behind {PACKAGE}; run `apt-get update`")
    report(f"downloading {found[1]} (about 70 MB)")
    # The scratch directory belongs to root alone, so apt's own download user cannot write there.
    run_tool(["apt-get", "-o", "APT::Sandbox::User=root", "download", found[1]], scratch)
    package = next(scratch.glob("*.deb"))
    report(f"unpacking {package.name}")
    run_tool(["dpkg-deb", "-x", package.name, "kernel"], scratch)
    return scratch / "kernel"


def find_kernel(tree: Path) -> tuple[str, Path]:
    """The newest kernel in a tree: its release, and its image.

    Raises:
        BuildError: there is none.
    """
    kernels = sorted((tree / "boot").glob("vmlinuz-*"), key=_version)
    if not kernels:
        raise BuildError(f"no boot/vmlinuz-* in {tree}")
    return kernels[-1].name.removeprefix("vmlinuz-"), kernels[-1]


def _version(kernel: Path) -> list[str | int]:
    """Its name with numbers as such, for 6.12.9 comes before 6.12.38."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", kernel.name)]


def unpack_kernel(kernel: bytes) -> bytes:
    """The ELF kernel out of a bzImage; the bzImage itself when its packing is not known here.

    Offsets: Linux, Documentation/arch/x86/boot.rst, "payload_offset" and "payload_length".

    Raises:
        BuildError: zstd(1) is needed and missing.
    """
    start, length = struct.unpack_from("<II", kernel, 0x248)
    start += ((kernel[0x1F1] or 4) + 1) * 512
    packed = kernel[start : start + length]
    packing = next((name for magic, name in _PACKINGS.items() if packed.startswith(magic)), None)
    if packing == "xz":
        return lzma.LZMADecompressor().decompress(packed)  # four bytes of length follow the stream
    if packing == "gzip":
        return zlib.decompressobj(wbits=31).decompress(packed)
    if packing == "zstd":
        return _unpack_zstd(packed[:-4])  # the same four bytes, which zstd(1) takes for an error
    return kernel


def _unpack_zstd(packed: bytes) -> bytes:
    if shutil.which("zstd") is None:
        raise BuildError("zstd is not installed; `apt-get install zstd`")
    return subprocess.run(["zstd", "-qdc"], input=packed, check=True, capture_output=True).stdout


def read_modules(tree: Path, release: str, wanted: Sequence[str]) -> Mapping[str, bytes]:
    """File name -> uncompressed module, dependencies before their users; builtins are skipped.

    Args:
        tree: holds lib/modules/RELEASE as the package ships it (modules.dep is made here).
        release: of the kernel.
        wanted: module names, with underscores.

    Raises:
        BuildError: the kernel has no such module.
    """
    modules = tree.resolve() / "lib" / "modules" / release
    run_tool(["depmod", "-b", str(tree.resolve()), release], tree)
    needs = _parse_modules_dep((modules / "modules.dep").read_text())
    builtin = {_name(line) for line in (modules / "modules.builtin").read_text().split()}
    ordered: dict[str, bytes] = {}
    for name in wanted:
        path = next((path for path in needs if _name(path) == name), None)
        if path is None:
            if name in builtin:
                continue
            raise BuildError(f"kernel {release} has no module {name}")
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


def read_busybox() -> bytes:
    """The static busybox of this machine: an initrd's every program.

    Raises:
        BuildError: it is not installed, or not static.
    """
    found = shutil.which("busybox")
    if found is None:
        raise BuildError("busybox is not installed; `apt-get install busybox-static`")
    program = Path(found).read_bytes()
    if not _is_static(program):
        raise BuildError(f"{found} is not static; `apt-get install busybox-static`")
    return program


def _is_static(program: bytes) -> bool:
    """Whether a 64-bit ELF program names no interpreter (elf(5): PT_INTERP is 3)."""
    (start,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    kinds = (struct.unpack_from("<I", program, start + size * i)[0] for i in range(count))
    return 3 not in kinds
