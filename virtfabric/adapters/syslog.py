"""The system log, as a datagram socket. Must not block or fail its callers."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_AUTHPRIV: Final = 10
_MAX_BYTES: Final = 8192
"""What rsyslog and journald take without cutting."""
_MONTHS: Final = (
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
)  # fmt: skip
"""Not strftime's: those follow the locale."""

WARNING: Final = 4
NOTICE: Final = 5
INFO: Final = 6
"""Severities of RFC 3164, section 4.1.1."""


class SystemLog:
    """Sends lines to `/dev/log` with facility authpriv (only root reads those).

    The form is what syslog(3) sends: `<PRI>Mmm dd hh:mm:ss TAG[PID]: text`, without a host name.
    """

    def __init__(self, path: Path = Path("/dev/log"), *, tag: str = "virtfabricd") -> None:
        self._path = path
        self._tag = tag
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._failures = 0
        self._failing = False

    @property
    def available(self) -> bool:
        """Whether the last line went out; before the first, whether there is a socket."""
        with self._lock:
            return self._path.is_socket() and not self._failing

    @property
    def failures(self) -> int:
        """Lines lost since the start."""
        with self._lock:
            return self._failures

    def send(self, text: str, severity: int = INFO) -> None:
        """Send one line; a line that cannot be sent is counted and dropped."""
        message = self._format(text, severity)
        with self._lock:
            # Twice: a restarted syslog daemon has a new socket at the same path.
            self._failing = not (self._try(message) or self._try(message))
            self._failures += self._failing

    def close(self) -> None:
        """Close the socket; safe to repeat."""
        with self._lock:
            self._drop()

    def _format(self, text: str, severity: int) -> bytes:
        now = time.localtime()
        stamp = f"{_MONTHS[now.tm_mon - 1]} {now.tm_mday:2} {time.strftime('%H:%M:%S', now)}"
        line = " ".join(text.replace("\0", " ").split("\n"))
        priority = _AUTHPRIV * 8 + severity
        message = f"<{priority}>{stamp} {self._tag}[{os.getpid()}]: {line}"
        return message.encode("utf-8", "replace")[:_MAX_BYTES]

    def _try(self, message: bytes) -> bool:
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.settimeout(0)
                self._socket.connect(str(self._path))
            self._socket.send(message)
        except (OSError, ValueError):
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.close()
            self._socket = None
