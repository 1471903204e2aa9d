"""`tests/lab/resume.py`: what a second run of the same checkout leaves out, and when nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

LABS = Path(__file__).parents[2] / "lab"
CONFTEST = f"""
import sys
sys.path.insert(0, {str(LABS)!r})
from resume import Resume

def pytest_configure(config):
    config.pluginmanager.register(Resume(config))
"""
TESTS = """
import os
from pathlib import Path
import pytest

def visit(name):
    with Path(os.environ["VISITS"]).open("a") as visits:
        visits.write(name + " ")
    if name in os.environ["BREAKS"].split():
        raise RuntimeError(name)
    if name in os.environ["KILLS"].split():
        os.kill(os.getpid(), 9)

@pytest.fixture
def frail():
    visit("setup")
    yield
    visit("teardown")

def test_a(): visit("a")
def test_b(frail): visit("b")
def test_c(): visit("c")
"""


class Checkout:
    """A repository of three tests, and what runs of pytest in it visited."""

    def __init__(self, pytester: pytest.Pytester, visits: Path) -> None:
        self.root = pytester.path
        self._pytester = pytester
        self._visits = visits
        (self.root / "conftest.py").write_text(CONFTEST)
        (self.root / "test_it.py").write_text(TESTS)
        (self.root / ".gitignore").write_text(IGNORED)
        self.said = ""

    def run(self, *, breaks: str = "", kills: str = "") -> tuple[int, list[str]]:
        """Exit code, and what was visited."""
        self._visits.write_text("")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VISITS", str(self._visits))
            environment.setenv("BREAKS", breaks)
            environment.setenv("KILLS", kills)
            method = self._pytester.runpytest_subprocess if kills else self._pytester.runpytest
            done = method("-q", "test_it.py")
        self.said = done.stdout.str()
        return done.ret, self._visits.read_text().split()


IGNORED = ".pytest_cache\n__pycache__\nstdout\nstderr\n"  # the last two are pytester's
ALL = ["a", "setup", "b", "teardown", "c"]


@pytest.fixture
def checkout(pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    subprocess.run(("git", "init", "-q", str(pytester.path)), check=True)
    return Checkout(pytester, tmp_path_factory.mktemp("visits") / "visits")


def test_a_run_that_was_killed_goes_on(checkout: Checkout) -> None:
    assert checkout.run(kills="c") == (-9, ALL)
    assert checkout.run() == (0, ["c"])
    left_out = re.findall(r"not run again: test_it.py::(\w+)", checkout.said)
    assert left_out == ["test_a", "test_b"]
    assert checkout.run() == (0, ALL), "after all passed, a run begins anew"


@pytest.mark.parametrize("part", ["setup", "b", "teardown"])
def test_what_failed_in_any_part_is_run_again(checkout: Checkout, part: str) -> None:
    assert checkout.run(breaks=part)[0] == 1
    assert checkout.run() == (0, ["setup", "b", "teardown"])
    assert checkout.run() == (0, ALL)


def test_an_interrupt_at_the_very_end_leaves_nothing_to_run(checkout: Checkout) -> None:
    assert checkout.run(breaks="c")[0] == 1
    cache = checkout.root / ".pytest_cache" / "v" / "virtfabric" / "passed"
    noted = cache.read_text().replace(
        '"test_it.py::test_b"', '"test_it.py::test_b", "test_it.py::test_c"'
    )
    cache.write_text(noted)
    assert checkout.run() == (0, [])
    assert checkout.run() == (0, ALL)


@pytest.mark.parametrize("name", ["test_it.py", "new.json"])
def test_another_checkout_begins_anew(checkout: Checkout, name: str) -> None:
    checkout.run(breaks="c")
    with (checkout.root / name).open("a") as changed:
        changed.write("\n")
    assert checkout.run() == (0, ALL)


def test_texts_are_not_tested(checkout: Checkout) -> None:
    checkout.run(breaks="c")
    (checkout.root / "README.md").write_text("new\n")
    assert checkout.run() == (0, ["c"])


def test_without_git_all_is_run(checkout: Checkout) -> None:
    (checkout.root / ".git").rename(checkout.root / "no-git")
    checkout.run(breaks="c")
    assert checkout.run() == (0, ALL)
    assert "no git that lists this checkout" in checkout.said
