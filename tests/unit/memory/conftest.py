from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machine import Machine


@pytest.fixture
def idle(tmp_path: Path) -> Machine:
    """The lab without any region."""
    return Machine("lab-cxl", tmp_path)


@pytest.fixture
def busy(tmp_path: Path) -> Machine:
    """The lab with three regions: single, behind a switch, interleaved over both bridges."""
    return Machine("lab-cxl-regions", tmp_path)


@pytest.fixture
def mixed(tmp_path: Path) -> Machine:
    """The same, with one region's memory in ZONE_NORMAL and another's offline."""
    return Machine("lab-cxl-states", tmp_path)
