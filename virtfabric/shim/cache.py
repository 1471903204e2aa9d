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
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SCRATCH = "build-"
_UNUSED_S: Final = 24 * 3600.0


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


def ensure_built(
    final: Path,
    build: Callable[[Path], Path],
    *,
    parts: Sequence[str] = (),
    again: bool = False,
    spares: Callable[[Path], bool] | None = None,
) -> Path:
    """`final`, built first if it is not there. Safe to call from many processes at once.

    Args:
        final: the directory to end with; its name is the key of the recipe.
        build: is given an empty scratch directory beside `final` and returns the directory in it
            that becomes `final`.
        parts: files that have to be in it; one that lacks any is built anew.
        again: build it though it is there; the old one stays until there is a new one.
        spares: what is beside `final` and was not used for a day goes when `final` is built, but
            for what this says to keep; None keeps all.

    Raises:
        BuildError: whatever `build` raises; nothing was published, and nothing taken away.
    """
    if again or not _is_built(final, parts):
        with scratch_in(final.parent) as scratch:
            if again or not _is_built(final, parts):
                built = build(scratch)
                if final.exists():
                    final.rename(scratch / "replaced")
                built.rename(final)
                if spares:
                    _discard_unused(final, scratch, spares)
    with contextlib.suppress(OSError):  # somebody else's cache
        os.utime(final)
    return final


def _is_built(final: Path, parts: Sequence[str]) -> bool:
    return final.is_dir() and all((final / part).is_file() for part in parts)


@contextlib.contextmanager
def scratch_in(directory: Path) -> Iterator[Path]:
    """A scratch directory in `directory`, for one process at a time; those of dead ones go."""
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock"):
        for stale in directory.glob(f"{_SCRATCH}*"):
            shutil.rmtree(stale, ignore_errors=True)  # what is left goes the next time
        with tempfile.TemporaryDirectory(
            dir=directory, prefix=_SCRATCH, ignore_cleanup_errors=True
        ) as scratch:
            yield Path(scratch)


def _discard_unused(final: Path, scratch: Path, spares: Callable[[Path], bool]) -> None:
    """Others are renamed into `scratch`, so that none is ever half there."""
    for other in final.parent.iterdir():
        if other in (final, scratch) or not other.is_dir() or other.name.startswith(_SCRATCH):
            continue
        if time.time() - other.stat().st_mtime > _UNUSED_S and not spares(other):
            other.rename(scratch / f"unused-{other.name}")


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
