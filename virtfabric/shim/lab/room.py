"""Whether there is room for a lab, told before anything is built for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from virtfabric.shim.lab.cards import cards_of
from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from virtfabric.shim.lab.place import Place
    from virtfabric.shim.topology.model import Topology

_MAX_SOCKET: Final = 107
"""Bytes in a UNIX socket's path (unix(7): 108 with the zero at its end)."""
_SSH_ADDS: Final = ".0123456789abcdef"
"""ssh(1) makes its control socket under another name first: 16 characters more, and a dot."""


def check_sockets(topology: Topology, place: Place) -> None:
    """Refuse names that make a path too long for a UNIX socket.

    Raises:
        LabError: such a path, and what of it can be shorter.
    """
    for path, card in _sockets(topology, place):
        if (length := len(os.fsencode(path))) > _MAX_SOCKET:
            other = f", the id of card {card}" if card else ""
            raise LabError(
                f"lab {place.name}: {path} is {length} bytes long, and the path of a socket has "
                f"{_MAX_SOCKET} at most",
                advice=f"a shorter name of the lab (--name){other}, or a shorter $VIRTFABRIC_LABS",
            )


def _sockets(topology: Topology, place: Place) -> Iterator[tuple[Path, str]]:
    """Each with the card that it is for, or ""."""
    yield place.console_socket, ""
    yield place.monitor_socket, ""
    yield place.ssh_control.with_name(f"{place.ssh_control.name}{_SSH_ADDS}"), ""
    for card in cards_of(topology, place):
        yield place.card_monitor(card.serial), card.serial
        for socket in card.sockets:
            yield socket, card.serial
