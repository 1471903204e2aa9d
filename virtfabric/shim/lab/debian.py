"""Unpacks a Debian system into a directory, with mmdebstrap; installs nothing here."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cache import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MIRROR: Final = "http://deb.debian.org/debian"
_TIED: Final = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--"),
)
"""mmdebstrap does not end with its parent, nor do its children with it: a killed build would go on
writing. With this all of them end, and their mounts with them.
"""
_STAGES = ("downloading", "extracting", "installing", "cleaning")


def format_debian_argv(
    suite: str,
    packages: Sequence[str],
    target: str = "",
    *,
    variant: str = "minbase",
    excluded: Sequence[str] = (),
) -> tuple[str, ...]:
    """mmdebstrap and its arguments; without a target they are what a key has to follow."""
    return (
        *("mmdebstrap", "--mode=root", f"--variant={variant}", f"--include={','.join(packages)}"),
        '--aptopt=Apt::Install-Recommends "false"',
        # testing's Release file is valid for a week only
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in excluded),
        *(suite, target, MIRROR),
    )


def unpack_debian(
    suite: str,
    packages: Sequence[str],
    target: Path,
    *,
    report: Callable[[str], None],
    variant: str = "minbase",
    excluded: Sequence[str] = (),
) -> None:
    """Fill `target` with `suite` and these packages, no recommended ones; takes a minute or two.

    Raises:
        BuildError: mmdebstrap is missing or failed; `log` has its last lines.
    """
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is not installed; `apt-get install mmdebstrap`")
    argv = format_debian_argv(suite, packages, str(target), variant=variant, excluded=excluded)
    lines: list[str] = []
    with subprocess.Popen(
        [*_TIED, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            for line in run.stderr or ():
                lines.append(line.rstrip())
                if any(stage in line for stage in _STAGES):
                    report(f"{suite}: {line.strip().removeprefix('I: ').removesuffix('...')}")
        except BaseException:
            run.kill()  # Ctrl-C does not wait for it
            raise
    if run.returncode:
        raise BuildError(f"mmdebstrap failed for Debian {suite}", log=lines[-8:])
