"""Joins a card's firmware with its PCI functions: each slice that is granted has a socket.

The management mailbox is also there by ivshmem, for a QEMU that has no vfio-user.

It decides nothing. What it is told to do about a function in the machine around it goes through
`Slots`, on a thread of its own, as that may take seconds.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol

from virtfabric.model.adapter import LINK_WIDTHS
from virtfabric.model.errors import VirtfabricError
from virtfabric.policy import extents
from virtfabric.shim.cardpci.cardmemory import CardMemory
from virtfabric.shim.cardpci.errand import Errand
from virtfabric.shim.cardpci.management import ManagementFunction
from virtfabric.shim.cardpci.operations import SliceView
from virtfabric.shim.cardpci.slicefunction import SliceFunction
from virtfabric.shim.cardpci.switch import Switch
from virtfabric.shim.ivshmem.service import IvshmemService
from virtfabric.shim.vfiouser.server import FunctionServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.model.adapter import AdapterBooks, Extent, Slice, SliceId
    from virtfabric.policy.slicecheck import AccessFault
    from virtfabric.shim.firmware.desk import Desk
    from virtfabric.shim.firmware.firmware import Firmware

MANAGEMENT: Final = "management"
_IVSHMEM: Final = "ivshmem.sock"


class Slots(Protocol):
    """The slots of the machine around a card. Called in order, never two at once."""

    def plug(self, name: str, socket: Path) -> None:
        """A function is there, behind this vfio-user socket.

        Args:
            name: `MANAGEMENT`, or the slice's id.
            socket: listens already.

        Raises:
            VirtfabricError: it cannot be plugged; the function stays, unplugged.
        """

    def unplug(self, name: str) -> None:
        """It goes, and its socket when this returns.

        Raises:
            VirtfabricError: it could not be unplugged; it goes nevertheless.
        """


class NoSlots:
    """Somebody else plugs what is there."""

    def plug(self, name: str, socket: Path) -> None:
        """Implements `Slots`."""

    def unplug(self, name: str) -> None:
        """Implements `Slots`."""


@dataclass(slots=True)
class _Seated:
    """A slice with its function; `lanes` are fixed in its configuration space."""

    slice: Slice
    function: SliceFunction
    server: FunctionServer


class CardDevice:
    """The functions of one card."""

    def __init__(
        self, firmware: Firmware, desk: Desk, directory: Path, *, boot: str,
        post: Callable[[Callable[[], None]], None], slots: Slots | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Begin: the management function, and what is granted already.

        Args:
            firmware: which decides.
            desk: of it.
            directory: for sockets, of this card alone: `management.sock`, `SLICE.sock`,
                `ivshmem.sock`.
            boot: as the desk has it.
            post: runs a job on the firmware's thread, soon; from any thread.
            slots: where functions are plugged.
            report: hears what went wrong, from any thread.

        Raises:
            OSError: a socket cannot be made.
        """
        self._firmware = firmware
        self._directory = directory
        for stale in directory.glob("*.sock"):
            stale.unlink()
        self._closed = False
        self._slots = slots or NoSlots()
        self._report = report
        self._serial = firmware.books.adapter.serial
        self._boot = int.from_bytes(hashlib.sha256(boot.encode()).digest()[:4], "little")
        self._memory = CardMemory(firmware.books, self._note)
        self._faults: dict[str, tuple[AccessFault, int]] = {}
        self._fault_lock = Lock()
        self._tell_faults = Errand(post, self._note_faults)
        self._switch = Switch()
        self._seated: dict[SliceId, _Seated] = {}
        self._failed: set[SliceId] = set()
        self._plugging = ThreadPoolExecutor(1, f"slots {self._serial}")
        width = _link_width(firmware.books.adapter.lanes)
        self._management = ManagementFunction(
            desk, serial=self._serial, boot=self._boot, width=width,
            wake=Errand(post, self._pump).ask,
        )  # fmt: skip
        self._server = self._serve(MANAGEMENT, self._management)
        self._ivshmem = IvshmemService(
            desk, directory / _IVSHMEM, serial=self._serial, boot=self._boot, post=post,
            report=report,
        )  # fmt: skip
        self.refresh()

    @property
    def sockets(self) -> dict[str, Path]:
        """Of every function, by name: vfio-user."""
        slices = {str(name): one.server.path for name, one in self._seated.items()}
        return {MANAGEMENT: self._server.path, **slices}

    @property
    def ivshmem(self) -> Path:
        """The socket of its ivshmem server: the mailbox once more, for each host that connects."""
        return self._ivshmem.path

    def refresh(self) -> None:
        """Follow the firmware; on its thread, after whatever it has done."""
        if self._closed:
            return
        books = self._firmware.books
        for name in [n for n, one in self._seated.items() if not _stays(one.slice, books)]:
            self._take_out(name)
        self._failed &= books.slices.keys()
        self._memory.follow(
            books, [piece for one in books.slices.values() for piece in self._fresh(one)]
        )
        for one in books.slices.values():
            if one.id in self._failed:
                continue
            view = SliceView(one, self._firmware.phase(one.id), self._firmware.badge(one.id))
            seated = self._seated.get(one.id)
            if seated is None:
                self._put_in(view)
            else:
                seated.slice = one
                seated.function.update(view)
        for name, seated in self._seated.items():
            counts = seated.function.counts
            self._firmware.measure(
                name, {"dma_read": counts.read, "dma_written": counts.written,
                       "dma_refused": counts.refused},
            )  # fmt: skip
        self._management.pump()
        self._ivshmem.pump()

    def close(self) -> None:
        """Take all out; nothing of the card answers any more. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._ivshmem.close()
        for name in list(self._seated):
            self._take_out(name)
        self._plugging.submit(self._end, MANAGEMENT, self._server, self._management.close)
        self._plugging.shutdown()

    def _fresh(self, one: Slice) -> tuple[Extent, ...]:
        """Memory of a slice that is to be all zeros for it."""
        seated = self._seated.get(one.id)
        # of another holder: keys of the former one are in there
        if seated is None or one.holder != seated.slice.holder:
            return one.seat.memory
        return extents.subtract(one.seat.memory, seated.slice.seat.memory)

    def _put_in(self, view: SliceView) -> None:
        one = view.slice
        lanes = len(one.seat.lanes) or self._firmware.books.adapter.lanes
        function = SliceFunction(
            view, serial=self._serial, boot=self._boot, width=_link_width(lanes),
            memory=self._memory, joined=self._switch,
        )  # fmt: skip
        try:
            server = self._serve(one.id, function)
        except OSError as error:
            function.close()
            self._failed.add(one.id)
            self._report(f"{one.id} has no function: {error}")
            return
        self._seated[one.id] = _Seated(one, function, server)

    def _take_out(self, name: SliceId) -> None:
        gone = self._seated.pop(name)
        gone.function.update(None)
        self._plugging.submit(self._end, name, gone.server, gone.function.close)

    def _serve(self, name: str, function: ManagementFunction | SliceFunction) -> FunctionServer:
        path = self._directory / f"{name}.sock"
        # the socket of a slice that is seated anew stays until its function is unplugged
        number = 1
        while path.exists():
            number += 1
            path = self._directory / f"{name}-{number}.sock"
        server = FunctionServer(path, function, report=self._report)
        self._plugging.submit(self._plug, name, path)
        return server

    def _plug(self, name: str, path: Path) -> None:
        try:
            self._slots.plug(name, path)
        except VirtfabricError as error:
            self._report(f"{name} was not plugged: {error}")

    def _end(self, name: str, server: FunctionServer, close: Callable[[], None]) -> None:
        try:
            self._slots.unplug(name)
        except VirtfabricError as error:
            self._report(f"{name} was not unplugged: {error}")
        server.close()
        close()

    def _note(self, fault: AccessFault) -> None:
        with self._fault_lock:
            first, count = self._faults.get(fault.slice, (fault, 0))
            self._faults[fault.slice] = (first, count + 1)
        self._tell_faults.ask()

    def _note_faults(self) -> None:
        with self._fault_lock:
            noted, self._faults = self._faults, {}
        for fault, count in noted.values():
            self._firmware.note_fault(fault, count)

    def _pump(self) -> None:
        self._management.pump()


def _stays(one: Slice, books: AdapterBooks) -> bool:
    """Whether a slice goes on in the same function."""
    now = books.slices.get(one.id)
    return now is not None and (now.seat.lanes, now.seat.capability) == (
        one.seat.lanes, one.seat.capability,
    )  # fmt: skip


def _link_width(lanes: int) -> int:
    return max(width for width in LINK_WIDTHS if width <= max(lanes, 1))
