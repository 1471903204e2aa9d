"""`lab build` where nothing can be built: what is there stays, and half an image is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.cli.main import main
from virtfabric.shim import guestimage
from virtfabric.shim.lab import recipe

if TYPE_CHECKING:
    from pathlib import Path

PARTS = ("vmlinux", "initrd", "root.ext4")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image's directory without any part, where there is no mmdebstrap."""
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    guest = guestimage.guest_cache() / guestimage.format_recipe_key()
    guest.mkdir(parents=True)
    for part in ("vmlinux", "initrd"):
        (guest / part).write_text("")
    image = tmp_path / "lab" / "images" / recipe.format_recipe_key()
    image.mkdir(parents=True)
    return image


def test_an_image_stays_when_it_cannot_be_built_again(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in PARTS:
        (image / part).write_text("")
    assert main(["lab", "build"]) == 0
    assert main(["lab", "build", "--again"]) != 0
    assert "mmdebstrap is not installed" in capsys.readouterr().err
    assert sorted(path.name for path in image.iterdir()) == sorted(PARTS)
    assert main(["lab", "build"]) == 0


@pytest.mark.parametrize("missing", PARTS)
def test_half_an_image_is_none(
    image: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in PARTS:
        if part != missing:
            (image / part).write_text("")
    assert main(["lab", "build"]) != 0
    assert "mmdebstrap is not installed" in capsys.readouterr().err
