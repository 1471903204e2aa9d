"""A "newc" cpio archive: what the kernel takes as an initrd. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DIRECTORY = 0o040755
PROGRAM = 0o100755
FILE = 0o100644

Member = tuple[str, int, bytes]
"""Path without a leading slash, mode, content; parents come before what is in them."""


def format_cpio(files: Iterable[Member]) -> bytes:
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


def format_directories(*paths: str) -> list[Member]:
    """Members for these directories."""
    return [(path, DIRECTORY, b"") for path in paths]
