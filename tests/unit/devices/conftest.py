from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakesys import FakeSys


@pytest.fixture
def fake(tmp_path: Path) -> FakeSys:
    """A host without any function."""
    return FakeSys(tmp_path)
