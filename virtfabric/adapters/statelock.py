"""One agent for one state directory and one libvirtd socket: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Self

from virtfabric.model.errors import AlreadyRunningError, JournalError

if TYPE_CHECKING:
    from pathlib import Path


class StateLock:
    """An flock'd file with the holder's process id in it.

    The file stays when the lock goes: removing it would let two holders in, each with a file of
    its own under the same name.
    """

    def __init__(self, path: Path, label: str) -> None:
        """Name the lock; `label` says what is locked ("state directory /var/lib/virtfabric")."""
        self._path = path
        self._label = label
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor >= 0

    def acquire(self) -> Self:
        """Take the lock at once; repeating is safe.

        Raises:
            AlreadyRunningError: somebody else has it; names his process id.
            JournalError: the file cannot be made.
        """
        if self.held:
            return self
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o644)
        except OSError as error:
            raise JournalError(f"lock file {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise AlreadyRunningError(
                f"{self._label} is in use by another agent, process {holder or 'unknown'} "
                f"(lock file {self._path})",
                advice="stop that agent, or give this one a state directory and socket of its own",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Let go; safe to repeat."""
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_exc: object) -> None:
        self.release()
