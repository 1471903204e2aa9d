"""Whether there is room for a lab, told before anything is built for it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

import psutil

from virtfabric.model.units import MIB, Bytes
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

_WRITTEN: Final = Bytes(100 * MIB)
"""While a payload is made: 72 MiB that it is made from, 40 of itself (measured on 2026-11-22)."""


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


def check_memory(topology: Topology, name: str, available: int) -> None:
    """Refuse a host whose memory is more than this machine has to give.

    What is in files (persistent memory, namespaces) does not count: they are sparse.

    Args:
        topology: of the lab.
        name: of the lab.
        available: bytes (MemAvailable; it does not count what labs that run have yet to touch).

    Raises:
        LabError: both amounts.
    """
    devices = topology.cxl.devices if topology.cxl else ()
    needed = Bytes(topology.total_memory + sum(device.volatile or 0 for device in devices))
    if needed > available:
        raise LabError(
            f"lab {name} has {needed} of memory, and of this machine's {_format(available)} are "
            "available",
            advice="end other labs (virtfabric lab list) or guests, or take a topology with less",
        )


def check_disk(place: Place, free: int | None) -> None:
    """Refuse where not even the payload fits; what else a lab writes is not known before.

    Args:
        place: of the lab.
        free: bytes for it in the file system; None for no bound.

    Raises:
        LabError: both amounts.
    """
    if free is not None and free < _WRITTEN:
        raise LabError(
            f"lab {place.name} writes {_WRITTEN} to {place.directory.parent}, and {_format(free)} "
            "are free there",
            advice="end other labs (virtfabric lab list), or set $VIRTFABRIC_LABS to a directory "
            "with more",
        )


def read_available() -> int:
    """Bytes of memory that this machine can give without swapping."""
    return int(psutil.virtual_memory().available)


def read_free(directory: Path) -> int | None:
    """Bytes that fit into its file system; None for a tmpfs without a bound."""
    usage = shutil.disk_usage(directory)
    return usage.free if usage.total else None


def _format(size: int) -> str:
    return str(Bytes(size // MIB * MIB))
