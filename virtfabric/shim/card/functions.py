"""A card's PCI functions in the process that serves its hosts: both on one event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.card.server import CardError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from virtfabric.shim.card.server import Card
    from virtfabric.shim.cardpci.card import CardDevice, Slots

log = logging.getLogger("virtfabric-card")


class CardFunctions:
    """The functions of a card that is served. All but `close` on the event loop's thread."""

    def __init__(self, card: Card, directory: Path, slots: Slots | None = None) -> None:
        """Begin: the management function, and slices that are granted already.

        Args:
            card: its firmware is asked on the running loop only.
            directory: for sockets, of this card alone; it is made.
            slots: where functions are plugged; None: somebody else does.

        Raises:
            CardError: what functions need is not installed, or the directory cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._device = self._open(card, directory, slots)

    def _open(self, card: Card, directory: Path, slots: Slots | None) -> CardDevice:
        try:
            from virtfabric.shim.cardpci.card import CardDevice

            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return CardDevice(
                card.firmware,
                card.desk,
                directory,
                boot=card.boot,
                post=self._post,
                slots=slots,
                report=lambda text: log.warning("%s", text),
            )
        except ImportError as error:
            raise _not_installed(error) from error
        except OSError as error:
            raise CardError(f"functions in {directory}: {error.strerror or error}") from error

    @property
    def sockets(self) -> dict[str, Path]:
        """Of every function, by name."""
        return self._device.sockets

    def refresh(self) -> None:
        """Follow the firmware, after whatever it has done."""
        if not self._is_closed:
            self._device.refresh()

    async def close(self) -> None:
        """Take all functions out of their slots; hosts are not served meanwhile."""
        self._is_closed = True
        await asyncio.to_thread(self._device.close)

    def _post(self, job: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        """The functions' own jobs; none while they are being taken out by another thread."""
        if self._is_closed:
            return
        try:
            job()
            self._device.refresh()
        except VirtfabricError as error:
            log.warning("%s", error)


def qmp_slots(monitor: Path, ports: Sequence[str]) -> Slots:
    """The prepared ports of a QEMU.

    Raises:
        CardError: what it needs is not installed.
    """
    try:
        from virtfabric.shim.cardpci.qmpslots import QmpSlots
    except ImportError as error:
        raise _not_installed(error) from error
    return QmpSlots(monitor, ports)


def _not_installed(error: ImportError) -> CardError:
    return CardError(
        f"PCI functions need a Python package that is not installed: {error.name}",
        advice="pip install virtfabric[lab], or Debian's python3-zstandard and python3-qemu",
    )
