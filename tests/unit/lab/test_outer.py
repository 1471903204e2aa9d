"""QEMU's unpacked trees: named by what they are made of, kept while somebody needs them."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.cache import BuildError
from virtfabric.shim.lab import debian, outer
from virtfabric.shim.lab.outer import OuterQemu, choose_outer

if TYPE_CHECKING:
    from pathlib import Path

QEMU = "usr/bin/qemu-system-x86_64"


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trees are kept, on a host whose only QEMU comes from its mmdebstrap."""
    programs = tmp_path / "programs"
    programs.mkdir()
    made = tmp_path / "made"
    mmdebstrap = programs / "mmdebstrap"
    mmdebstrap.write_text(
        f'#!/bin/sh\necho "$@" >> {made}\nfor word; do target=$last; last=$word; done\n'
        f'mkdir -p "$target/usr/bin"\necho > "$target/{QEMU}"\n'
    )
    # a tree's QEMU is asked through this; the stand-in answers by itself and mounts nothing
    unshare = programs / "unshare"
    unshare.write_text("#!/bin/sh\necho version 11.1.2\n")
    setpriv = programs / "setpriv"
    setpriv.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    for program in (mmdebstrap, unshare, setpriv):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin")
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(outer, "_NAME", "no-such-qemu-of-the-system")
    return tmp_path / "cache" / "lab" / "qemu"


def suites(trees: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in trees.iterdir() if path.is_dir())


def unpacked(trees: Path) -> int:
    return len((trees.parents[2] / "made").read_text().splitlines())


def test_a_tree_is_unpacked_anew_when_its_recipe_changes(
    trees: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_outer((), [].append).argv
    assert choose_outer((), [].append).argv == first
    assert unpacked(trees) == 1
    for module, name, value in (
        (outer, "_PACKAGES", ("qemu-system-x86", "cowsay")),
        (outer, "_VARIANT", "minbase"),
        (outer, "_VERSION", 2),
        (debian, "MIRROR", "http://mirror.example/debian"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert choose_outer((), [].append).argv != first, name
    assert unpacked(trees) == 5
    assert choose_outer((), [].append).argv == first


def test_a_tree_is_unpacked_again_when_asked_and_stays_when_that_fails(trees: Path) -> None:
    first = choose_outer((), [].append).argv
    assert choose_outer((), [].append, again=True).argv == first
    assert unpacked(trees) == 2
    (trees.parents[2] / "programs" / "mmdebstrap").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BuildError, match="can carry"):
        choose_outer((), [].append, again=True)
    assert choose_outer((), [].append).read_version() == "11.1.2"


@pytest.fixture
def old(trees: Path) -> Path:
    """A tree of an earlier recipe that nobody asked for in a day."""
    tree = trees / "forky-earlier"
    tree.mkdir(parents=True)
    os.utime(tree, (time.time() - 2 * 86400,) * 2)
    return tree


def test_a_tree_that_nobody_needs_goes(trees: Path, old: Path) -> None:
    choose_outer((), [].append)
    assert suites(trees) == ["forky"]
    assert not old.exists()


def test_a_tree_stays_while_a_process_runs_from_it(trees: Path, old: Path) -> None:
    argv = ["sh", "-c", "echo; read -r _", f"{old}/{QEMU}", "-display", "none"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        choose_outer((), [].append)
        assert old.exists()
        process.communicate(b"\n")


def test_a_tree_stays_while_a_machines_emulator_names_it(trees: Path, old: Path) -> None:
    OuterQemu(("unshare", "--", f"{old}/{QEMU}"), "an earlier one").ensure_emulator()
    choose_outer((), [].append)
    assert old.exists()


def test_a_tree_that_carries_a_lab_is_not_unpacked_again(trees: Path) -> None:
    tree = choose_outer((), [].append).argv
    told: list[str] = []
    argv = ["sh", "-c", "echo; read -r _", *tree[-6:]]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        choose_outer((), told.append, again=True)
        process.communicate(b"\n")
    assert unpacked(trees) == 1
    assert "not unpacked again" in "\n".join(told)


@pytest.mark.parametrize("suite", outer.UNPACKED_SUITES)
def test_a_suites_present_tree_stays(trees: Path, suite: str) -> None:
    present = trees / outer._format_tree_key(suite)
    present.mkdir(parents=True)
    os.utime(present, (time.time() - 2 * 86400,) * 2)
    choose_outer((), [].append)
    assert present.exists()
