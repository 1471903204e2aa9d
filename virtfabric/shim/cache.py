"""What is built once and kept: one directory for a recipe, published by a rename.

Owns where the cache is, and that several builders at once end with one result. A build that is cut
off leaves nothing that counts: its scratch directory goes with the next build.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SCRATCH = "build-"


class BuildError(VirtfabricError):
    """Something cannot be built here; the message says what is missing.

    Attributes:
        log: the last lines of the tool that failed; empty when no tool did.
    """

    def __init__(self, message: str, *, log: Sequence[str] = (), advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.log = tuple(log)


def cache_root() -> Path:
    """$VIRTFABRIC_CACHE, or ~/.cache/virtfabric."""
    base = os.environ.get("VIRTFABRIC_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "virtfabric"


def ensure_built(final: Path, build: Callable[[Path], Path]) -> Path:
    """`final`, built first if it is not there. Safe to call from many processes at once.

    Args:
        final: the directory to end with; its name is the key of the recipe.
        build: is given an empty scratch directory beside `final` and returns the directory in it
            that becomes `final`.

    Raises:
        BuildError: whatever `build` raises; nothing was published.
    """
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final.parent / "lock"):
        for stale in final.parent.glob(f"{_SCRATCH}*"):
            shutil.rmtree(stale)
        if not final.is_dir():
            with tempfile.TemporaryDirectory(dir=final.parent, prefix=_SCRATCH) as scratch:
                build(Path(scratch)).rename(final)
    return final


def run_tool(argv: Sequence[str], cwd: Path) -> str:
    """Run a tool that a build needs and return what it printed.

    Raises:
        BuildError: it is not installed, or failed; `log` has its last lines.
    """
    try:
        done = subprocess.run(argv, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"{argv[0]} is not installed") from error
    if done.returncode:
        tail = (done.stdout + done.stderr).splitlines()[-5:]
        raise BuildError(f"`{' '.join(argv)}` ended with {done.returncode}", log=tail)
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
