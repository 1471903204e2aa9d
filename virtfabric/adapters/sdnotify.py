"""Tells the service manager how the agent is (sd_notify(3)); a no-op where none listens."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)


class ServiceNotifier:
    """Sends state to `$NOTIFY_SOCKET`; never raises, since the agent works without it too.

    Args:
        address: a path, or `@name` for an abstract socket; empty sends nothing.
        watchdog_s: seconds within which systemd wants to hear `watchdog`, None for never.
    """

    def __init__(self, address: str = "", *, watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """As systemd set it up for this process: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID."""
        pid = environ.get("WATCHDOG_PID", "")
        usec = environ.get("WATCHDOG_USEC", "")
        mine = not pid or pid == str(os.getpid())
        watchdog_s = int(usec) / 1e6 if mine and usec.isdecimal() and int(usec) else None
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s=watchdog_s)

    def ready(self, status: str = "") -> None:
        """Started, or reloaded."""
        self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def reloading(self) -> None:
        """Reloading the configuration; `ready` follows."""
        # Type=notify-reload wants the time of it, systemd.service(5).
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Shutting down."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line that `systemctl status` shows."""
        self._send(f"STATUS={_line(text)}")

    def watchdog(self) -> None:
        """Alive."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1)
                sender.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            _log.debug("sd_notify: %s", error)


def _line(text: str) -> str:
    return " ".join(text.split())
