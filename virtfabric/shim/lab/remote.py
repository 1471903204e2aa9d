"""Commands and files in a lab, over ssh on a forwarded port of 127.0.0.1.

Owns the keys, made once for a cache, and the options that make ssh(1) quiet and quick: one
connection carries all commands (a handshake takes a second or two of an emulated processor).
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from virtfabric.shim.cache import cache_root, ensure_built, run_tool
from virtfabric.shim.lab.place import LabError, Place, Record

if TYPE_CHECKING:
    from collections.abc import Sequence

_IN_LAB = ":"
_UNREACHABLE = 255  # ssh(1): its own errors
_ANSWER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may come in, and who the lab is. Private to this user's cache."""

    directory: Path

    @property
    def client(self) -> Path:
        """The private key that opens labs."""
        return self.directory / "client"

    @property
    def host(self) -> Path:
        """The private key by which a lab is known."""
        return self.directory / "host"


def ensure_keys() -> Keys:
    """The keys of this cache, made at first use.

    Raises:
        BuildError: ssh-keygen is not installed.
    """

    def build(scratch: Path) -> Path:
        made = scratch / "keys"
        made.mkdir(mode=0o700)
        for name in ("client", "host"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"virtfabric-lab-{name}"]
            run_tool([*argv, "-f", str(made / name)], made)
        known = (made / "host.pub").read_text()
        (made / "known_hosts").write_text(f"virtfabric-lab {known}")
        return made

    return Keys(ensure_built(cache_root() / "lab" / "keys" / "ed25519", build))


class Remote:
    """One running lab, as ssh sees it."""

    def __init__(self, place: Place, record: Record, keys: Keys) -> None:
        self._place = place
        self._options = (
            *("-F", "none", "-o", f"IdentityFile={_quote(keys.client)}"),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={_quote(keys.directory / 'known_hosts')}"),
            *("-o", "HostKeyAlias=virtfabric-lab", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={_quote(place.ssh_control)}"),
            *("-o", "ControlPersist=600", "-o", "ConnectTimeout=30", "-o", "LogLevel=ERROR"),
            *("-o", f"Port={record.port}"),
        )

    def format_argv(self, command: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The ssh command line that runs `command` (words, quoted for the lab's shell)."""
        words = [" ".join(shlex.quote(word) for word in command)] if command else []
        return ["ssh", *self._options, *(["-t"] if terminal else []), "root@127.0.0.1", *words]

    def run(
        self, command: str, *, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command line in the lab and wait for it.

        Returns:
            What it printed, and its exit code.

        Raises:
            LabError: the lab does not answer, or not in time.
        """
        argv = self.format_argv(["/bin/bash", "-c", command])
        try:
            done = subprocess.run(
                argv, check=False, capture_output=True, text=True, timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            text = f"lab {self._place.name}: `{command}` did not end within {timeout_s:.0f} s"
            raise LabError(text) from error
        if done.returncode == _UNREACHABLE and not self._answers():
            raise LabError(f"lab {self._place.name} cannot be reached: {done.stderr.strip()}")
        return done

    def _answers(self) -> bool:
        argv = self.format_argv(["true"])
        try:
            done = subprocess.run(argv, check=False, capture_output=True, timeout=_ANSWER_S)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def format_copy(self, source: str, target: str) -> list[str]:
        """The scp command line; whichever of the two begins with ":" is in the lab."""
        paths = [
            f"root@127.0.0.1:{path[1:]}" if path.startswith(_IN_LAB) else str(Path(path).resolve())
            for path in (source, target)
        ]
        return ["scp", "-q", "-r", "-p", *self._options, *paths]

    def close(self) -> None:
        """End the shared connection, if there is one."""
        if self._place.ssh_control.exists():
            argv = ["ssh", *self._options, "-O", "exit", "root@127.0.0.1"]
            subprocess.run(argv, check=False, capture_output=True)


def _quote(path: Path) -> str:
    """A path as the value of an option (ssh_config(5)): it may have blanks, and "%" is no token."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
