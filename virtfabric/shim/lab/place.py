"""Where a lab lives while it runs: one directory for a name, with its record, sockets and console.

Owns finding labs and telling which are alive. Nothing of a lab is kept anywhere else: its disks are
QEMU snapshots without a name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from virtfabric.model.errors import InvalidValueError, VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_LOOK_S: Final = 0.02
_PATIENCE_S: Final = 0.2
"""Much longer than `is_locked` has the lock."""


class LabError(VirtfabricError):
    """A lab, or something asked of it, failed.

    Attributes:
        log: the last lines of its console and of QEMU, where they tell why.
    """

    def __init__(self, message: str, *, log: Sequence[str] = (), advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.log = tuple(log)


def labs_root() -> Path:
    """$VIRTFABRIC_LABS, or /run/virtfabric-labs. Short, for it holds UNIX sockets (108 bytes)."""
    return Path(os.environ.get("VIRTFABRIC_LABS", "/run/virtfabric-labs"))


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down before a lab starts.

    Attributes:
        port: on 127.0.0.1, forwarded to the lab's sshd.
        started: seconds since the epoch.
        qemu: what carries it, for people.
    """

    name: str
    topology: str
    port: int
    started: float
    qemu: str
    accel: str


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one lab and what is in it."""

    directory: Path

    @property
    def name(self) -> str:
        """The lab's name."""
        return self.directory.name

    @property
    def console_log(self) -> Path:
        """Everything the lab's serial console ever said."""
        return self.directory / "console.log"

    @property
    def console_socket(self) -> Path:
        """The serial console itself."""
        return self.directory / "console"

    @property
    def monitor_socket(self) -> Path:
        """QMP."""
        return self.directory / "qmp"

    def card_monitor(self, card: str) -> Path:
        """QMP once more, for a card alone: QEMU serves one client on each socket at a time."""
        return self.directory / f"qmp.{card}"

    @property
    def cards(self) -> Path:
        """All that belongs to the lab's offload cards, if it has any."""
        return self.directory / "cards"

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself says."""
        return self.directory / "qemu.log"

    @property
    def cpu_log(self) -> Path:
        """What QEMU says of processors that are reset: a triple fault is told nowhere else."""
        return self.directory / "cpu.log"

    @property
    def pid_file(self) -> Path:
        """Written by QEMU."""
        return self.directory / "pid"

    @property
    def topology(self) -> Path:
        """What the lab looks like, as it was when it started."""
        return self.directory / "topology.json"

    @property
    def payload(self) -> Path:
        """The disk with this checkout and the lab's keys."""
        return self.directory / "payload.ext4"

    @property
    def ssh_control(self) -> Path:
        """The multiplexed ssh connection: later commands need no new handshake."""
        return self.directory / "ssh"

    def write_record(self, record: Record) -> None:
        """Write down how the lab was started."""
        (self.directory / "lab.json").write_text(json.dumps(asdict(record)) + "\n")

    def read_record(self) -> Record | None:
        """None while `up` has not come that far, or was cut off before."""
        try:
            return Record(**json.loads((self.directory / "lab.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def read_pid(self) -> int | None:
        """The lab's QEMU; None when it does not run (a reused number is told by its arguments)."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if has_words(pid, self.qemu_words) else None

    @property
    def qemu_words(self) -> tuple[str, str]:
        """What the lab's QEMU is known by; found also before it has written its file."""
        return "-pidfile", str(self.pid_file)

    @property
    def lock(self) -> Path:
        """Locked by the command that is at work on the lab; it goes with the lab."""
        return self.directory.parent / f".{self.name}.lock"

    @contextlib.contextmanager
    def locked(self, patience_s: float = _PATIENCE_S) -> Iterator[None]:
        """One command that changes this lab at a time.

        Args:
            patience_s: how long to wait for another one.

        Raises:
            LabError: another one is at it.
        """
        self.lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        until = time.monotonic() + patience_s
        while (lock := self._try_lock()) is None:
            if time.monotonic() > until:
                text = f"lab {self.name}: another command (up, down, card) is at work on it"
                raise LabError(text)
            time.sleep(_LOOK_S)
        with lock:
            try:
                yield
            finally:
                if not self.directory.exists():
                    self.lock.unlink(missing_ok=True)

    def _try_lock(self) -> IO[str] | None:
        """None when another has it, or had it and took the file away, so that this is no lock."""
        lock = self.lock.open("w")
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), self.lock.stat()):
                return lock
        lock.close()
        return None

    def is_locked(self) -> bool:
        """Whether a command is at work on it."""
        try:
            with self.lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is none, or it is another user's
            return False
        return False

    def remove(self) -> None:
        """Take away all that is left of it, but for the lock, which the caller holds."""
        shutil.rmtree(self.directory, ignore_errors=True)


def find_processes(words: tuple[str, str]) -> list[int]:
    """Those that have these two side by side among their arguments.

    One alone would be too little: an editor or `tail -f` has a path as well.
    """
    found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in found if has_words(pid, words)]


def has_words(pid: int, words: tuple[str, str]) -> bool:
    """Whether a process has these two side by side among its arguments; False where it is gone."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    first, second = (word.encode() for word in words)
    return (first, second) in pairwise(arguments)


def place_of(name: str) -> Place:
    """The place of a lab, whether it exists or not.

    Raises:
        InvalidValueError: it cannot be a lab's name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidValueError("name", name, "small letters, digits and dashes, at most 31")
    return Place(labs_root() / name)


def find_places() -> list[Place]:
    """All labs there are, by name; also those whose QEMU has died."""
    root = labs_root()
    return [
        Place(path)
        for path in sorted(root.glob("*"))
        if _NAME.fullmatch(path.name) and path.is_dir()
    ]
