"""Labs for tests: brought up by the real command, one for a module, taken down at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from running_lab import RunningLab, bring_up

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def small() -> Iterator[RunningLab]:
    yield from bring_up("small")


@pytest.fixture(scope="module")
def cxl() -> Iterator[RunningLab]:
    yield from bring_up("cxl")


@pytest.fixture(scope="module")
def passthrough() -> Iterator[RunningLab]:
    yield from bring_up("passthrough")
