"""What is built once: published whole, kept while it is used, never taken from another process."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from virtfabric.shim.cache import BuildError, ensure_built, scratch_in

DAY = 24 * 3600.0


def build(scratch: Path, text: str = "new") -> Path:
    made = scratch / "made"
    made.mkdir()
    (made / "part").write_text(text)
    return made


def fail(scratch: Path) -> Path:
    raise BuildError("no network")


def old_directory(path: Path, *, days: float) -> Path:
    path.mkdir(parents=True)
    (path / "part").write_text("old")
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "lock")


def test_others_go_when_nobody_used_them_for_a_day(tmp_path: Path) -> None:
    old_directory(tmp_path / "unused", days=2)
    old_directory(tmp_path / "spared", days=2)
    old_directory(tmp_path / "recent", days=0.5)
    used = old_directory(tmp_path / "used", days=2)
    ensure_built(used, fail)
    ensure_built(tmp_path / "key", build, spares=lambda path: path.name == "spared")
    assert names(tmp_path) == ["key", "recent", "spared", "used"]
    ensure_built(tmp_path / "key2", build)
    assert "recent" in names(tmp_path), "without `spares` all stay"


def test_nothing_goes_when_nothing_was_built(tmp_path: Path) -> None:
    old_directory(tmp_path / "unused", days=2)
    with pytest.raises(BuildError, match="no network"):
        ensure_built(tmp_path / "key", fail, spares=lambda _: False)
    assert names(tmp_path) == ["unused"]


def test_what_lacks_a_part_is_built_anew(tmp_path: Path) -> None:
    half = tmp_path / "key"
    half.mkdir()
    (half / "other").write_text("")
    with pytest.raises(BuildError, match="no network"):
        ensure_built(half, fail, parts=["part"])
    assert names(half) == ["other"]
    assert names(ensure_built(half, build, parts=["part"])) == ["part"]


def test_a_new_one_takes_the_place_of_the_old_one_only_when_it_is_there(tmp_path: Path) -> None:
    final = ensure_built(tmp_path / "key", build)
    with pytest.raises(BuildError, match="no network"):
        ensure_built(final, fail, again=True)
    assert (final / "part").read_text() == "new"

    def newer(scratch: Path) -> Path:
        assert (final / "part").read_text() == "new", "it stays while another is built"
        return build(scratch, "newer")

    ensure_built(final, newer, again=True)
    assert (final / "part").read_text() == "newer"
    assert names(tmp_path) == ["key"]


def test_a_scratch_directory_is_private_and_goes_with_the_next(tmp_path: Path) -> None:
    with scratch_in(tmp_path / "things") as scratch:
        assert scratch.parent == tmp_path / "things"
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        killed = tmp_path / "things" / "build-killed"
        killed.mkdir()
    assert names(tmp_path / "things") == ["build-killed"]
    with scratch_in(tmp_path / "things") as scratch:
        assert names(tmp_path / "things") == [scratch.name]
    assert names(tmp_path / "things") == []


def test_one_process_at_a_time_has_a_scratch_directory(tmp_path: Path) -> None:
    other = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from virtfabric.shim.cache import scratch_in
        with scratch_in(Path(sys.argv[1])) as scratch:
            print(scratch, flush=True)
            sys.stdin.read()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        threading.Timer(0.2, process.stdin.close).start()
        with scratch_in(tmp_path) as ours:
            assert ours != theirs
            assert not theirs.exists(), "it waited for the other to end"
