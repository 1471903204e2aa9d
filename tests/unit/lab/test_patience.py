"""One factor for every deadline: shim and checker read it alike, the product never does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtfabric.shim.lab.payload import choose_files

ROOT = Path(__file__).parents[3]
ASK = """
from demo import checker
from virtfabric.shim import patience
print(checker.PATIENCE, patience.PATIENCE, patience.allow(20))
"""


@pytest.mark.parametrize(
    ("set_to", "said"), [({}, "1.0 1.0 20.0"), ({"VIRTFABRIC_PATIENCE": "2.5"}, "2.5 2.5 50.0")]
)
def test_checker_and_shim_agree(set_to: dict[str, str], said: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "VIRTFABRIC_PATIENCE"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env | set_to, cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == said


@pytest.mark.parametrize("name", ["virtfabric", "virtfabricd", "virtfabric-python"])
def test_a_lab_is_given_more(name: str) -> None:
    files = {place: text for place, text, _ in choose_files()}
    assert "VIRTFABRIC_PATIENCE:-12" in files[f"bin/{name}"]


def test_the_product_does_not_ask() -> None:
    package = ROOT / "virtfabric"
    sources = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] != "shim"]
    asking = [p for p in sources if "patience" in p.read_text().lower()]
    assert len(sources) > 50
    assert asking == []
    assert "PATIENCE" not in (ROOT / "hooks" / "qemu").read_text()
