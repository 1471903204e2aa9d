"""Which regions this agent made: a file for each, in a directory that a reboot empties.

A volatile region ends with the boot, and so does its mark. The mark is written before the region is
made, so that after a crash in between it is not taken for one that somebody made by hand.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from virtfabric.model.errors import CxlError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from virtfabric.model.cxl import Serial


class RegionMarks:
    """The marks of one boot; repeating anything is safe."""

    def __init__(self, directory: Path) -> None:
        """Nothing is touched before a call."""
        self._directory = directory

    def has(self, base: int, members: Sequence[Serial | None]) -> bool:
        """Whether the region of these members in the window at `base` is ours."""
        return self._path(base, members).exists()

    def put(self, base: int, members: Sequence[Serial | None], others: Iterable[str] = ()) -> None:
        """It is ours from now on; `others` are the kernel's names of regions that are not.

        Raises:
            CxlError: the mark cannot be written.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path(base, members), os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            raise CxlError(f"{self._directory}: {error.strerror}") from error
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, " ".join(sorted(others)).encode())
        finally:
            os.close(descriptor)

    def others(self, base: int, members: Sequence[Serial | None]) -> frozenset[str] | None:
        """Regions that there were before this one was begun, by name; None without a mark."""
        try:
            return frozenset(self._path(base, members).read_text().split())
        except OSError:
            return None

    def remove(self, base: int, members: Sequence[Serial | None]) -> None:
        """There is no such region any more."""
        self._path(base, members).unlink(missing_ok=True)

    def _path(self, base: int, members: Sequence[Serial | None]) -> Path:
        return self._directory / "-".join((f"{base:#x}", *map(str, members)))
