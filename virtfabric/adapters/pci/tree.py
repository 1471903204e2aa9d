"""`SysTree`: reading below one root of sysfs or procfs, where anything may vanish at any time.

It turns every way in which a file can be missing into None and knows nothing of what it reads.
Paths are relative to the root, in strings, as the kernel's own links are.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import re
    from pathlib import Path

_MISSING: Final = (OSError, ValueError)
"""ValueError: a path with a NUL, made of what a garbled file said."""


class SysTree:
    """Files, links and names below a root."""

    def __init__(self, root: Path) -> None:
        """Nothing is touched before a call."""
        self.root = root

    def data(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a file; None where it cannot be read.

        A device that is going away answers ENODEV or EIO where its file was a moment ago.
        """
        try:
            with (self.root / path).open("rb", buffering=0) as file:
                return file.read(limit)
        except _MISSING:
            return None

    def text(self, path: str) -> str | None:
        """A file's text without the blanks around it; None where it cannot be read."""
        try:
            return (self.root / path).read_bytes().decode(errors="replace").strip()
        except _MISSING:
            return None

    def link(self, path: str) -> str | None:
        """Where a link leads, below the root; None where there is no link.

        `path` must have no links on its way, as the kernel's targets are relative.
        """
        try:
            target = (self.root / path).readlink()
        except _MISSING:
            return None
        return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))

    def names(self, path: str, pattern: re.Pattern[str]) -> list[str]:
        """Names in a directory that match as a whole, sorted; none where it cannot be read."""
        try:
            entries = [entry.name for entry in (self.root / path).iterdir()]
        except _MISSING:
            return []
        return sorted(name for name in entries if pattern.fullmatch(name))
