"""A person at a lab's serial console: the terminal in raw mode, until Ctrl-]."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import termios
import tty
from typing import TYPE_CHECKING, Final

from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.shim.lab.place import Place

LEAVE: Final = b"\x1d"
"""Ctrl-], as in telnet and `virsh console`."""


def attach_console(place: Place) -> None:
    """Relay between this terminal and the lab until Ctrl-], end of input, or the lab's end.

    Raises:
        LabError: the lab does not run.
    """
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(place.console_socket))
        except OSError as error:
            raise LabError(f"lab {place.name} has no console: is it up?") from error
        with _raw_terminal():
            _relay(line)


def _relay(line: socket.socket) -> None:
    keys = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([line, keys], [], [])
        if line in ready:
            said = line.recv(4096)
            if not said:
                return
            os.write(sys.stdout.fileno(), said)
        if keys in ready:
            typed = os.read(keys, 4096)
            before, left, _ = typed.partition(LEAVE)
            line.sendall(before)
            if left or not typed:
                return


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    keys = sys.stdin.fileno()
    kept = termios.tcgetattr(keys)
    try:
        tty.setraw(keys)
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, kept)
