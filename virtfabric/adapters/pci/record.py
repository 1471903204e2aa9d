"""Recorded machines: what the inventory reads of a host, as two files that any machine can hold.

The reader itself says what is needed: while it reads, each file, link and name that it looks at is
noted, so a record holds exactly that. `README.md` is for people, `tree.json` is laid out again
by `lay_out`.

Taken: ids, classes, drivers, links, IOMMU groups, NUMA nodes, names of interfaces and block
devices, who is mounted where, swap, consoles. Of the configuration space: the header, and ACS.
Not taken: serial numbers, MAC addresses, vital product data, host name, mounts without a device.
"""

from __future__ import annotations

import json
import os
import platform
import posixpath
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from virtfabric import __version__
from virtfabric.adapters.pci.configspace import choose_recorded
from virtfabric.adapters.pci.inventory import read_functions
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.errors import InstallationError, InvalidValueError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator, Mapping

    Trim = Callable[[str, str], str]

T = TypeVar("T")
TREE: Final = "tree.json"
_VERSION: Final = 1


@dataclass(slots=True)
class RecordedTree:
    """One root. Paths are relative to it.

    Attributes:
        files: text by path.
        links: targets by path, relative to the root.
        pieces: of binary files: hexadecimal by decimal offset; zeros lie between.
        names: listed entries of which nothing else was read.
    """

    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, dict[str, str]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Sorted, so that two records of a machine compare."""
        told = self.files.keys() | self.links.keys() | self.pieces.keys()
        implied = told | {parent for path in told for parent in _parents(path)}
        return {
            "files": dict(sorted(self.files.items())),
            "links": dict(sorted(self.links.items())),
            "pieces": dict(sorted(self.pieces.items())),
            "names": sorted(self.names - implied),
        }


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


class _NotingTree(SysTree):
    """Reads as ever, and notes what was there."""

    def __init__(self, root: Path, trim: Trim) -> None:
        super().__init__(root)
        self.noted = RecordedTree()
        self._trim = trim

    def data(self, path: str, limit: int) -> bytes | None:
        found = super().data(path, limit)
        if found is not None:
            pieces = choose_recorded(found).items()
            self.noted.pieces[path] = {str(offset): piece.hex() for offset, piece in pieces}
        return found

    def text(self, path: str) -> str | None:
        found = super().text(path)
        if found is not None:
            self.noted.files[path] = self._trim(path, found)
        return found

    def link(self, path: str) -> str | None:
        found = super().link(path)
        if found is not None:
            self.noted.links[path] = found
        return found

    def names(self, path: str, pattern: re.Pattern[str]) -> list[str]:
        found = super().names(path, pattern)
        self.noted.names.update(f"{path}/{name}" for name in found)
        return found


def _without_foreign_mounts(path: str, text: str) -> str:
    """Of mountinfo: mounts of devices only, without their options."""
    if path != "self/mountinfo":
        return text
    kept = []
    for line in text.splitlines():
        front, _, back = line.partition(" - ")
        fields, (kind, source, *_) = front.split(), [*back.split(), "", ""]
        if source.startswith("/dev/") or not fields[2].startswith("0:"):
            kept.append(f"0 0 {fields[2]} / {fields[4]} rw - {kind} {source} rw")
    return "\n".join(kept)


def record_machine(directory: Path, *, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> int:
    """Record a host into a directory that is new or empty.

    Returns:
        How many functions it has.

    Raises:
        InvalidValueError: the directory is not empty, or the host has a file that is malformed.
        InstallationError: the directory cannot be written, or what was written reads differently.
    """
    functions = record_tree(
        directory, (sys, proc), read_functions, lambda found: _describe(len(found)),
        trim=_without_foreign_mounts,
    )  # fmt: skip
    return len(functions)


def record_tree(
    directory: Path,
    roots: tuple[Path, Path],
    read: Callable[[SysTree, SysTree], T],
    describe: Callable[[T], str],
    *,
    trim: Trim,
) -> T:
    """Record everything that `read` looks at below the roots of sysfs and procfs.

    Args:
        directory: new or empty.
        roots: of sysfs and procfs.
        read: what has to read the same of the record as of the host.
        describe: the text of `README.md`.
        trim: path and text of a file -> what is recorded of it.

    Returns:
        What was read.

    Raises:
        InvalidValueError, InstallationError: as `record_machine`.
    """
    _check_empty(directory)
    trees = _NotingTree(roots[0], trim), _NotingTree(roots[1], trim)
    found = read(*trees)
    tree = {"version": _VERSION, "sys": trees[0].noted.to_json(), "proc": trees[1].noted.to_json()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TREE).write_text(json.dumps(tree, indent=1) + "\n")
        (directory / "README.md").write_text(describe(found))
    except OSError as error:
        raise InstallationError(f"{directory}: {error.strerror}") from error
    with tempfile.TemporaryDirectory() as laid_out:
        if read(*map(SysTree, lay_out(directory, Path(laid_out)))) != found:
            raise InstallationError(
                f"{directory}: reads differently from this host",
                advice="devices have changed meanwhile: remove it and record again",
            )
    return found


def _check_empty(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InvalidValueError("DIR", str(directory), "is not a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise InvalidValueError(
            "DIR", str(directory), "is not empty", advice="name a directory that is not there yet"
        )


def _describe(count: int) -> str:
    whole = "" if os.geteuid() == 0 else " Not recorded as root: nothing tells of ACS."
    return (
        f"A machine with {count} PCIe functions, Linux {platform.release()}, as `virtfabric "
        f"devices record` of {__version__} saw it.{whole}\n\nSerial numbers, MAC addresses, vital "
        "product data and mounts without a device were left out; mount points, names of logical "
        f"volumes and of interfaces are in `{TREE}`: look through it before you pass it on.\n"
    )


def lay_out(directory: Path, into: Path) -> tuple[Path, Path]:
    """Make sysfs and procfs of a recorded machine below `into`.

    Returns:
        Their roots.

    Raises:
        InvalidValueError: not a record, or of a later version.
    """
    path = directory / TREE
    try:
        tree = json.loads(path.read_text())
        if tree["version"] != _VERSION:
            raise InvalidValueError(f"{path}: version", tree["version"], "is not known here")
        trees = {name: _checked(tree[name]) for name in ("sys", "proc")}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(str(path), str(error), "is not a recorded machine") from error
    roots = into / "sys", into / "proc"
    for root in roots:
        _lay_out_tree(root, trees[root.name])
    return roots


def _checked(tree: Any) -> Mapping[str, Any]:
    """One root of a record; raises what its misuse raises."""
    for part in ("files", "links", "pieces"):
        tree[part].items()
    return {**tree, "names": list(tree["names"])}


def _lay_out_tree(root: Path, tree: Mapping[str, Any]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in tree["names"]:
        _place(root, name).mkdir(parents=True, exist_ok=True)
    for name, text in tree["files"].items():
        _place(root, name).write_text(text + "\n")
    for name, pieces in tree["pieces"].items():
        content = bytearray(max((int(at) + len(p) // 2 for at, p in pieces.items()), default=0))
        for at, piece in pieces.items():
            content[int(at) : int(at) + len(piece) // 2] = bytes.fromhex(piece)
        _place(root, name).write_bytes(content)
    for name, target in tree["links"].items():
        _place(root, name).symlink_to(posixpath.relpath(target, posixpath.dirname(name)))


def _place(root: Path, name: str) -> Path:
    """Where a recorded path goes; a record from elsewhere must not write outside of the root.

    Raises:
        InvalidValueError: it would.
    """
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise InvalidValueError("path", name, "is outside of the recorded tree")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
