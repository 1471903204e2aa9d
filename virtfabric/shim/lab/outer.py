"""The QEMU that carries a lab: the system's if it knows the devices, else a newer one, unpacked.

Owns choosing: by asking each QEMU what it has, and by its version only where several vCPUs hang. A
newer one is a Debian tree in the cache, run through its own loader: nothing on this machine is
replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cache import BuildError, cache_root, ensure_built
from virtfabric.shim.lab.debian import format_debian_argv, unpack_debian

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from virtfabric.shim.topology.needs import DeviceNeed

_NAME: Final = "qemu-system-x86_64"
_PROGRAM: Final = f"usr/bin/{_NAME}"
_EMULATOR: Final = "emulator-"
_LIBRARIES: Final = Path("usr/lib/x86_64-linux-gnu")
_FIRMWARE: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
# A QEMU looks in /usr for a module that its own tree lacks, and ends when the one that it finds is
# of another build ("Only modules from the same build can be loaded"): in a mount namespace of its
# own it sees its own tree's modules there.
_OWN_MODULES: Final = (
    '[ ! -d "$1" ] || mount --bind "$0" "$1" || exit; QEMU_MODULE_DIR=$0; export QEMU_MODULE_DIR; '
    'shift; exec "$@"'
)
_VERSION: Final = 1
"""Count it up when code that unpacks a tree changes: here, debian.py."""
_PACKAGES: Final = ("qemu-system-x86",)
_VARIANT: Final = "essential"
UNPACKED_SUITES: Final = ("forky", "trixie")
"""Asked in this order: 11.x has all, vfio-user too, and safe threads."""
_SAFE_THREADS: Final = 11
"""The first version whose vCPUs may have a thread each under TCG.

With 10.0 a host of 8 vCPUs then hangs in half of its boots: a timer's interrupt stays in service on
idle vCPUs and is never acknowledged.
"""


@dataclass(frozen=True, slots=True)
class OuterQemu:
    """How to run one QEMU: what comes before its own arguments."""

    argv: tuple[str, ...]
    origin: str

    def has_safe_threads(self) -> bool:
        """Whether TCG may give each vCPU a thread of its own."""
        version = self.read_version()
        return version[:1].isdigit() and int(version.split(".")[0]) >= _SAFE_THREADS

    def read_version(self) -> str:
        """Such as "10.0.13"."""
        found = re.search(r"version (\d+[\d.]*)", self._ask("--version"))
        return found[1] if found else "unknown"

    def read_lacks(self, needs: Iterable[DeviceNeed]) -> tuple[str, ...]:
        """Which device types ("igb") and properties ("cxl-type3.sn") it does not have."""
        devices = set(re.findall(r'^name "([^"]+)"', self._ask("-device", "help"), re.MULTILINE))
        lacks: list[str] = []
        for need in needs:
            if need.driver not in devices:
                lacks.append(need.driver)
            elif need.properties:
                listed = self._ask("-device", f"{need.driver},help")
                has = set(re.findall(r"^\s*([\w.-]+)=", listed, re.MULTILINE))
                lacks += [f"{need.driver}.{name}" for name in sorted(need.properties - has)]
        return tuple(lacks)

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run([*self.argv, *arguments], check=False, capture_output=True, text=True)
        return done.stdout

    def ensure_emulator(self) -> Path:
        """One program that runs it, for libvirt, which takes a path and no arguments.

        libvirt starts an emulator without capabilities, root's or not: the mount needs a user
        namespace.
        """
        if len(self.argv) == 1:
            return Path(self.argv[0])
        unshare, *rest = self.argv
        argv = shlex.join([unshare, "--user", "--map-root-user", *rest])
        script = f'#!/bin/sh\nexec {argv} "$@"\n'
        path = _cache() / f"{_EMULATOR}{sha256(script.encode()).hexdigest()[:16]}"
        if not path.exists():
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(script)
            fresh.chmod(0o755)
            fresh.rename(path)
        return path


def choose_outer(
    needs: Collection[DeviceNeed],
    report: Callable[[str], None],
    *,
    threads: bool = False,
    again: bool = False,
) -> OuterQemu:
    """The first QEMU that has what the topology needs; a tree is unpacked if it takes one.

    Args:
        needs: of the topology.
        report: receives a line for each step.
        threads: take only one with safe threads, where TCG cannot be told to use a single one.
        again: unpack a tree though it is there, unless a process runs from it.

    Raises:
        BuildError: none has it; `log` names what is missing where.
    """
    tried: list[str] = []
    for find in _finders(report, again=again):
        try:
            qemu = find()
        except BuildError as error:  # testing may be broken for a while; the next suite is not
            tried += [str(error), *error.log]
            continue
        lacks = [*qemu.read_lacks(needs)]
        if threads and not qemu.has_safe_threads():
            lacks.append("safe threads")
        if not lacks:
            return qemu
        tried.append(f"{qemu.origin}: QEMU {qemu.read_version()} has no {', '.join(lacks)}")
    raise BuildError("no QEMU here can carry this topology", log=tried)


def _finders(report: Callable[[str], None], *, again: bool) -> Iterator[Callable[[], OuterQemu]]:
    if system := shutil.which(_NAME):
        yield partial(OuterQemu, (system,), "the system's")
    for suite in UNPACKED_SUITES:
        yield partial(_unpacked, suite, report, again=again)


def _unpacked(suite: str, report: Callable[[str], None], *, again: bool) -> OuterQemu:
    def build(scratch: Path) -> Path:
        report(f"unpacking QEMU from Debian {suite} into the cache")
        tree = scratch / suite
        unpack_debian(suite, _PACKAGES, tree, report=report, variant=_VARIANT)
        return tree

    tree = _cache() / _format_tree_key(suite)
    if again and _runs_from(tree):
        report(f"a lab or a machine runs QEMU from Debian {suite}: it is not unpacked again")
        again = False
    ensure_built(tree, build, parts=[_PROGRAM], again=again, spares=_is_needed)
    libraries = tree / _LIBRARIES
    firmware = (part for path in _FIRMWARE for part in ("-L", str(tree / path)))
    return OuterQemu(
        (
            *("unshare", "--mount", "--", "sh", "-c", _OWN_MODULES),
            *(str(libraries / "qemu"), f"/{_LIBRARIES}/qemu"),
            *(str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)),
            *(str(tree / _PROGRAM), *firmware),
        ),
        f"Debian {suite}'s",
    )


def _cache() -> Path:
    return cache_root() / "lab" / "qemu"


def _format_tree_key(suite: str) -> str:
    """Names a tree: changes whenever what goes into it does."""
    parts = (str(_VERSION), *format_debian_argv(suite, _PACKAGES, variant=_VARIANT))
    return f"{suite}-{sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _is_needed(tree: Path) -> bool:
    """By this recipe, by who runs from it, or by a machine with its emulator, running or not."""
    if tree.name in map(_format_tree_key, UNPACKED_SUITES) or _runs_from(tree):
        return True
    for emulator in tree.parent.glob(f"{_EMULATOR}*"):
        with suppress(FileNotFoundError):
            if f"{tree}/" in emulator.read_text():
                return True
    return False


def _runs_from(tree: Path) -> bool:
    """QEMU loads modules and firmware of its tree as long as it runs."""
    wanted = os.fsencode(f"{tree}/")
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            if wanted in cmdline.read_bytes():
                return True
    return False
