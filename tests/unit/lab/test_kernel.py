"""Which kernel of a tree is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.kernel import find_kernel

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("6.12.9+deb13-amd64", "6.12.38+deb13-amd64"),
        ("6.1.0-9-amd64", "6.1.0-37-amd64"),
        ("6.12.38+deb13-amd64", "7.0-rc1"),
    ],
)
def test_the_newest_is_told_by_numbers(tmp_path: Path, older: str, newer: str) -> None:
    (tmp_path / "boot").mkdir()
    for release in (newer, older):
        (tmp_path / "boot" / f"vmlinuz-{release}").touch()
    assert find_kernel(tmp_path) == (newer, tmp_path / "boot" / f"vmlinuz-{newer}")
