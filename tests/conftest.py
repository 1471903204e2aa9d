"""For all tests."""

from __future__ import annotations

import gc
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# importlib mode puts no test directory on the path
sys.path.insert(0, str(Path(__file__).parent))

import examples as _shares  # noqa: F401 (the profile of property tests)

pytest_plugins = ["pytester"]

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that:
# the tests that interrupt a command would wait for an interrupt that never comes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of every later look for garbage.

    4,000 tests took 134 s of processor time without this, 123 s with it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for UNIX sockets, whose paths have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as directory:
        yield Path(directory)
