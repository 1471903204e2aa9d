"""`SysTree`: reading below one root of sysfs or procfs, where anything may vanish at any time.

It turns every way in which a file can be missing into None and knows nothing of what it reads.
Paths are relative to the root, in strings, as the kernel's own links are. System calls on strings
rather than pathlib: a machine has thousands of these files, and pathlib is most of their price.
"""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import re
    from pathlib import Path

_MOST: Final = 1 << 16
_MISSING: Final = (OSError, ValueError)
"""ValueError: a path with a NUL, made of what a garbled file said."""


class SysTree:
    """Files, links and names below a root."""

    def __init__(self, root: Path) -> None:
        """Nothing is touched before a call."""
        self.root = root
        self._above = f"{root}/"

    def data(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a file; None where it cannot be read.

        A device that is going away answers ENODEV or EIO where its file was a moment ago.
        """
        return self.piece(path, 0, limit)

    def piece(self, path: str, offset: int, size: int) -> bytes | None:
        """`size` bytes of a file from `offset` on, fewer where it ends; None as for `data`."""
        try:
            descriptor = os.open(self._above + path, os.O_RDONLY)
        except _MISSING:
            return None
        try:
            return os.pread(descriptor, size, offset)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def text(self, path: str) -> str | None:
        """A file's text without the blanks around it; None where it cannot be read."""
        try:
            descriptor = os.open(self._above + path, os.O_RDONLY)
        except _MISSING:
            return None
        content = b""
        try:
            # procfs gives what fits into a page of its own, however much is asked for
            while part := os.read(descriptor, _MOST):
                content += part
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return content.decode(errors="replace").strip()

    def link(self, path: str) -> str | None:
        """Where a link leads, below the root; None where there is no link.

        `path` must have no links on its way, as the kernel's targets are relative.
        """
        try:
            target = os.readlink(self._above + path)  # noqa: PTH115
        except _MISSING:
            return None
        return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))

    def names(self, path: str, pattern: re.Pattern[str]) -> list[str]:
        """Names in a directory that match as a whole, sorted; none where it cannot be read."""
        return sorted(self.inodes(path, pattern))

    def inodes(self, path: str, pattern: re.Pattern[str]) -> dict[str, int]:
        """As `names`, in no order, with the inode number of each.

        sysfs gives each file, directory and link that it makes a number that it never uses again
        (fs/kernfs/dir.c, 64-bit `kernfs_node.id`).
        """
        try:
            with os.scandir(self._above + path) as entries:
                return {e.name: e.inode() for e in entries if pattern.fullmatch(e.name)}
        except _MISSING:
            return {}
