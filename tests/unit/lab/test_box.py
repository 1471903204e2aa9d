"""The Vagrant box in a cache that checkouts share; the tools that pack it are stand-ins."""

from __future__ import annotations

import os
import tempfile
import time
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.guestimage import format_recipe_key, guest_cache
from virtfabric.shim.lab import box

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where boxes are kept, in a cache that has all else; and tools that make nothing."""
    tools, temporary = tmp_path / "tools", tmp_path / "tmp"
    tools.mkdir()
    temporary.mkdir()
    for name in ("tar", "chroot", "mke2fs", "qemu-img"):
        does = 'for last; do :; done; : > "$last"' if name == "qemu-img" else ":"
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    guest = guest_cache() / format_recipe_key()
    guest.mkdir(parents=True)
    for part in ("vmlinux", "initrd"):
        (guest / part).write_text("")
    cache = tmp_path / "cache" / "lab" / "box"
    (cache / "debian" / box._format_base_key()).mkdir(parents=True)
    (cache / "boxes").mkdir()
    return cache / "boxes"


def test_a_box_leaves_those_of_other_checkouts(boxes: Path) -> None:
    for name in ("fresh", "unused"):
        (boxes / name).mkdir()
        (boxes / name / "virtfabric-lab.box").write_text("")
    os.utime(boxes / "unused", (time.time() - 2 * 86400,) * 2)
    made = box.ensure_box([].append)
    kept = sorted(path.name for path in boxes.iterdir() if path.is_dir())
    assert kept == sorted(["fresh", made.package.parent.name])


def test_what_goes_into_a_box_is_gathered_in_the_cache(boxes: Path, tmp_path: Path) -> None:
    killed = boxes.parent / "payloads" / "build-killed"
    killed.mkdir(parents=True)
    seen: list[list[str]] = []

    def look(line: str) -> None:
        seen.append([path.name for path in killed.parent.iterdir() if path.is_dir()])

    box.ensure_box(look)
    assert all(len(names) == 1 and names[0].startswith("build-") for names in seen)
    assert not killed.exists()
    assert seen
    assert not [*killed.parent.glob("build-*")]
    assert not [*(tmp_path / "tmp").iterdir()]
