"""Slots of a machine that QEMU emulates: functions behind root ports that it was started with.

It owns the devices `card-PORT` of that QEMU, one behind each prepared port; nothing else is
touched. What a card's process of before left there is dead, and is taken out before the first
function is plugged. QEMU serves one QMP client at a time: each card wants a socket of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from pathlib import Path

UNPLUG_S: Final = 150.0
"""Until Linux has let go. Measured: 72 s for a function that vfio-pci has and that is dead."""
CONNECT_S: Final = 10.0
"""A QEMU that is being started listens soon."""
_AGAIN_S: Final = 0.1
_DELETED: Final = "DEVICE_DELETED"
_KEPT: Final = ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR")


class SlotError(VirtfabricError):
    """A function cannot be plugged or unplugged."""


class QmpSlots:
    """Implements `shim.cardpci.card.Slots`."""

    def __init__(
        self, monitor: Path, ports: Sequence[str], *, unplug_s: float = UNPLUG_S,
        connect_s: float = CONNECT_S,
    ) -> None:  # fmt: skip
        """Nothing is asked before the first function.

        Args:
            monitor: QMP socket.
            ports: ids of empty root ports, each for one function, in the order they are taken.
            unplug_s: how long the machine may take to let functions go.
            connect_s: how long QEMU may take until it answers.
        """
        self._monitor = monitor
        self._free = list(ports)
        self._unplug_s = unplug_s
        self._connect_s = connect_s
        self._seats: dict[str, str] = {}
        self._is_cleared = False

    def plug(self, name: str, socket: Path) -> None:
        """Behind the first free port.

        Raises:
            SlotError
        """
        asyncio.run(self._plug(name, socket))

    def unplug(self, name: str) -> None:
        """The port is free when this returns; of what was never plugged, nothing is done.

        Raises:
            SlotError: the machine does not let go; its port is taken last from now on.
        """
        port = self._seats.pop(name, None)
        if port is not None:
            self._free.append(port)
            asyncio.run(self._unplug(port))

    async def _plug(self, name: str, socket: Path) -> None:
        async with self._talk() as qemu:
            if not self._is_cleared:
                await self._take_out(qemu, self._free)
                self._is_cleared = True
            if not self._free:
                taken = ", ".join(self._seats.values())
                raise SlotError(f"no port is free; functions are behind {taken}")
            port = self._free[0]
            await self._take_out(qemu, [port])
            await _execute(
                qemu, "device_add", driver="vfio-user-pci", id=_device(port), bus=port,
                socket={"type": "unix", "path": str(socket)},
            )  # fmt: skip
            self._seats[name] = self._free.pop(0)

    async def _unplug(self, port: str) -> None:
        async with self._talk() as qemu:
            await self._take_out(qemu, [port])

    async def _take_out(self, qemu: QMPClient, ports: Collection[str]) -> None:
        """All that is behind these ports, at once; returns when it is gone."""
        listener = EventListener((_DELETED, *_KEPT))
        with qemu.listen(listener):
            there = {str(one["name"]) for one in await _execute(
                qemu, "qom-list", path="/machine/peripheral")}  # fmt: skip
            leaving = there & {_device(port) for port in ports}
            for device in sorted(leaving):
                await _execute(qemu, "device_del", id=device)
            try:
                async with asyncio.timeout(self._unplug_s):
                    while leaving:
                        event = await listener.get()
                        data = cast("dict[str, str]", event["data"])
                        about = data.get("device", "")
                        if about in leaving and event["event"] in _KEPT:
                            raise SlotError(f"the machine keeps {about}")
                        leaving.discard(about)
            except TimeoutError:
                kept = ", ".join(sorted(leaving))
                raise SlotError(
                    f"the machine does not let go of {kept} within {self._unplug_s:g} s"
                ) from None

    @contextlib.asynccontextmanager
    async def _talk(self) -> AsyncIterator[QMPClient]:
        qemu = await self._connect()
        try:
            yield qemu
        except ExecuteError as error:
            raise SlotError(f"QEMU at {self._monitor}: {error}") from error
        except QMPError as error:
            raise SlotError(f"QEMU at {self._monitor} does not answer: {error}") from error
        finally:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await qemu.disconnect()

    async def _connect(self) -> QMPClient:
        until = monotonic() + self._connect_s
        while True:
            client = QMPClient("virtfabric-card")
            try:
                async with asyncio.timeout(max(_AGAIN_S, until - monotonic())):
                    await client.connect(str(self._monitor))
            except (ConnectError, TimeoutError) as error:
                if monotonic() >= until:
                    raise SlotError(f"no QEMU answers on {self._monitor}") from error
                await asyncio.sleep(_AGAIN_S)
            else:
                return client


def _device(port: str) -> str:
    """The id of what is behind a port; other devices of that QEMU do not begin like this."""
    return f"card-{port}"


async def _execute(qemu: QMPClient, command: str, **arguments: Any) -> Any:
    return await qemu.execute(command, arguments)
