"""The two small files beside the audit log: its key, and its head.

Owns how they are created and how their state is judged; knows nothing of records.
"""

from __future__ import annotations

import os
import secrets
import stat
from typing import TYPE_CHECKING, Final

from virtfabric.adapters.sqlite.audit_chain import Head
from virtfabric.model.errors import ConfigError, InvalidValueError, JournalError

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES: Final = 32
_HEAD_BYTES: Final = 20 + 1 + 64 + 1
"""Sequence padded to 20, a space, the MAC, a newline: one size, so a rewrite never tears."""


def create_key(path: Path) -> bytes:
    """A new random key, readable by its owner only; appears whole or not at all.

    Raises:
        ConfigError: it cannot be written, or is there already.
    """
    key = secrets.token_bytes(KEY_BYTES)
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, key)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.hardlink_to(new)  # unlike rename: fails where a key is
        new.unlink()
    except OSError as error:
        raise ConfigError(f"audit key {path}: cannot be created: {error.strerror}") from error
    return key


def read_key(path: Path) -> bytes:
    """The key.

    Raises:
        ConfigError: missing, of the wrong size, somebody else's, or readable by others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"audit key {path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        key = os.read(descriptor, KEY_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(descriptor)
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"audit key {path}: belongs to uid {status.st_uid}, not to uid {os.geteuid()}",
            advice="whoever can read it can forge the audit log; move it and the log away",
        )
    if mode := stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"audit key {path}: others may use it (mode has {mode:#05o})",
            advice=f"chmod 600 {path}; if somebody may have read it, move key and log away",
        )
    if len(key) != KEY_BYTES:
        raise ConfigError(f"audit key {path}: is not a file of {KEY_BYTES} bytes")
    return key


class HeadFile:
    """`audit.head`: the newest head, so that a cut tail shows without an exported one.

    It is rewritten in place, one block of constant size in one write: readers see the old or the
    new line. It is not fsynced (the record is): after a power failure it may be behind the log,
    which proves nothing bad, but never ahead of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def read(self) -> Head | None:
        """The head; None when there is no file.

        Raises:
            InvalidValueError: it is garbage.
        """
        try:
            text = self.path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(f"audit head {self.path}: {error.strerror}") from error
        parts = text.split()
        if len(parts) != 2:
            raise InvalidValueError(self.path.name, text[:100], "is not an audit head")
        return Head.parse(":".join(parts), field=self.path.name)

    def write(self, head: Head) -> None:
        """Replace the head.

        Raises:
            JournalError
        """
        line = f"{head.sequence:>20} {head.mac}\n".encode("ascii")
        try:
            if self._descriptor < 0:
                flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o600)
                os.ftruncate(self._descriptor, _HEAD_BYTES)
            os.pwrite(self._descriptor, line, 0)
        except OSError as error:
            raise JournalError(f"audit head {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the file; safe to repeat."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
