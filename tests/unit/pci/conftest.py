"""A machine for each test, and a context that takes notes."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel import Machine


class Context:
    """A `StepContext` that remembers."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.notes: list[str] = []

    def progress(self, fraction: float, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def context() -> Context:
    return Context()
