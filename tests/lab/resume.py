"""`Resume`: a run of hours goes on where an earlier one ended, as long as the checkout is the same.

What passed is noted test by test in pytest's cache, under a digest of the checkout; what failed or
was not reached is run. A run that leaves nothing to do forgets its tests: the next begins anew.
"""

from __future__ import annotations

import subprocess
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_NOTED: Final = "virtfabric/passed"


class Resume:
    """The plugin; one for a run."""

    def __init__(self, config: pytest.Config) -> None:
        cache = config.cache
        assert cache is not None, "-p no:cacheprovider leaves nowhere to note what passed"
        self._cache = cache
        self._checkout = digest_checkout(config.rootpath)
        noted = cache.get(_NOTED, {})
        self._passed: list[str] = noted.get("tests", []) if self._is_of_this(noted) else []
        self._left_out: list[str] = []
        self._unhappy: set[str] = set()

    def _is_of_this(self, noted: dict[str, object]) -> bool:
        return bool(self._checkout) and noted.get("checkout") == self._checkout

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what has passed."""
        known = set(self._passed)
        left_out = [item for item in items if item.nodeid in known]
        if left_out:
            items[:] = [item for item in items if item.nodeid not in known]
            config.hook.pytest_deselected(items=left_out)
        self._left_out = [item.nodeid for item in left_out]

    def pytest_report_collectionfinish(self) -> list[str]:
        """Nobody is to take the rest for the whole."""
        if not self._checkout:
            return [
                "no git that lists this checkout: all is run, and an interrupted run begins anew"
            ]
        return [
            f"passed in an earlier run of this checkout, not run again: {name}"
            for name in self._left_out
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that has passed in all its parts; that of a rerun counts anew."""
        if report.when == "setup":
            self._unhappy.discard(report.nodeid)
        if not report.passed:
            self._unhappy.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._unhappy and self._checkout:
            self._passed.append(report.nodeid)
            self._note()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Forget what this run was about, once all of it has passed."""
        nothing_left = session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._left_out
        if session.exitstatus == pytest.ExitCode.OK or nothing_left:
            session.exitstatus = pytest.ExitCode.OK
            done = {*self._left_out, *(item.nodeid for item in session.items)}
            self._passed = [name for name in self._passed if name not in done]
            self._note()

    def _note(self) -> None:
        self._cache.set(_NOTED, {"checkout": self._checkout, "tests": self._passed})


def digest_checkout(root: Path) -> str:
    """Names what a run depends on: every file that git has or could have, but for texts.

    Returns:
        "" where git cannot say.
    """
    words = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        listed = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    digest = blake2b(digest_size=16)
    for name in sorted(filter(None, listed.split("\0"))):
        path = root / name
        if path.suffix != ".md" and path.is_file():
            data = path.read_bytes()
            digest.update(f"\0{name}\0{path.stat().st_mode:o}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()
