"""A slice's PCI function: registers for its driver, and a worker that serves its rings."""

from __future__ import annotations

from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Final

from virtfabric.model.image import Phase
from virtfabric.shim.cardpci import maps, switch
from virtfabric.shim.cardpci.descriptors import Fault
from virtfabric.shim.cardpci.dma import Channel, CutOffError, Dma
from virtfabric.shim.cardpci.maps import SliceCause
from virtfabric.shim.cardpci.operations import Operations, SliceView, Trouble
from virtfabric.shim.cardpci.pace import Pace
from virtfabric.shim.cardpci.queue import Queue, is_possible
from virtfabric.shim.cardpci.registers import ONES, RegisterFile
from virtfabric.shim.cardpci.worker import IDLE, Worker
from virtfabric.shim.vfiouser import config as pci
from virtfabric.shim.vfiouser.function import Region
from virtfabric.shim.vfiouser.memory import DmaRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from virtfabric.shim.cardpci.cardmemory import CardMemory
    from virtfabric.shim.cardpci.dma import DmaCounts
    from virtfabric.shim.cardpci.switch import Switch
    from virtfabric.shim.vfiouser.function import Bus

_STATES: Final = {Phase.BLANK: 0, Phase.LOADING: 1, Phase.PROGRAMMING: 2, Phase.READY: 3}
_GONE: Final = 4
_STOPPED, _RUNS, _FAULTED = range(3)
_WIDE_ONES: Final = (1 << 64) - 1


class SliceFunction:
    """Implements `shim.vfiouser.function.PciFunction`."""

    def __init__(
        self, view: SliceView, *, serial: str, boot: int, width: int, memory: CardMemory,
        joined: Switch,
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            view: of the slice.
            serial: of its card.
            boot: see the register.
            width: of its link, lanes.
            memory: of the card.
            joined: the card's switch, for a slice with `net.vf`.
        """
        seat = view.slice.seat
        self.config = pci.ConfigSpace(
            maps.identify_slice(seat.capability),
            [pci.Bar(0, maps.BAR_SIZE)],
            [pci.power_management(), pci.message_interrupts(), pci.express_endpoint(width),
             pci.access_control(), *_show_badge(serial, view)],
        )  # fmt: skip
        self.regions: Mapping[int, Region] = {0: Region(maps.BAR_SIZE)}
        self._registers = RegisterFile(maps.SLICE)
        self._view: SliceView | None = view
        self._dma = Dma()
        self._pace = Pace()
        self._lock = RLock()
        self._queues: list[Queue | None] = [None] * maps.QUEUES
        self._worker = Worker(f"slice {view.slice.id}", self._step)
        self._switch = joined
        self._port = None
        if seat.capability == switch.CAPABILITY:
            mac = switch.derive_mac(serial, view.slice.id)
            self._port = joined.join(mac, self._worker.kick)
            self._registers.put("MAC", int.from_bytes(mac, "little"))
        self._operations = Operations(memory, self._port)
        self._registers.put("BOOT", boot)
        self._registers.put_text("SERIAL", serial)
        self._registers.put_text("SLICE", view.slice.id)
        self._show()

    @property
    def counts(self) -> DmaCounts:
        """What its DMA moved."""
        return self._dma.counts

    def update(self, view: SliceView | None) -> None:
        """The slice has changed; None: it is gone, and nothing works here any more."""
        with self._lock:
            if view == self._view:
                return
            self._view = view
            if view is None:
                self._stop_all()
            before = self._registers.get("STATE")
            self._show()
        if self._registers.get("STATE") != before:
            self._cause(SliceCause.CHANGED)

    def close(self) -> None:
        """End its worker; safe to repeat."""
        self.update(None)
        if self._port is not None:
            self._switch.leave(self._port)
        self._worker.close()

    # -- of the bus -------------------------------------------------------------------------

    def plug(self, bus: Bus) -> None:
        """Implements `PciFunction`: as after a power-on."""
        self.config.reset()
        self.reset()
        self._dma.attach(bus)

    def unplug(self) -> None:
        """Implements `PciFunction`."""
        self._dma.attach(None)
        self.reset()

    def reset(self) -> None:
        """Implements `PciFunction`. What the DMA counted stays: that is the slice's."""
        with self._lock:
            self._stop_all()
            self._registers.reset()
            self._show()
        if self._port is not None:
            self._port.clear()

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Implements `PciFunction`."""
        counts = self._dma.counts
        self._registers.put("DMA_READ", counts.read)
        self._registers.put("DMA_WRITTEN", counts.written)
        self._registers.put("DMA_REFUSED", counts.refused & ONES)
        if self._port is not None:
            self._registers.put("FRAMES_DROPPED", self._port.dropped & ONES)
        return self._registers.read(offset, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Implements `PciFunction`."""
        for name in self._registers.write(offset, data):
            self._written(name)

    # -- registers --------------------------------------------------------------------------

    def _written(self, name: str) -> None:
        match name.split("_", 1):
            case ["KEY" | "PIECE", "SELECT"]:
                with self._lock:
                    self._show()
            case ["IRQ", "MASK"]:
                if self._registers.get("IRQ_STATUS") & self._registers.get("IRQ_MASK"):
                    self._dma.interrupt()
            case ["Q0" | "Q1" as queue, "CONTROL"]:
                self._control(int(queue[1]))
            case ["Q0" | "Q1" as queue, "SUBMITTED"]:
                self._submitted(int(queue[1]))

    def _show(self) -> None:
        """Put what the slice is into its registers."""
        put, view = self._registers.put, self._view
        put("STATE", _GONE if view is None else _STATES[view.phase])
        seat = view.slice.seat if view else None
        keys, pieces = (seat.keys, seat.memory) if seat else ((), ())
        put("KEYS", len(keys))
        put("PIECES", len(pieces))
        put("CORES", len(seat.cores) if seat else 0)
        put("UNITS", len(seat.units) if seat else 0)
        put("BANDWIDTH", seat.bandwidth if seat else 0)
        self._registers.put_text("CAPABILITY", seat.capability if seat else "")
        key, piece = self._registers.get("KEY_SELECT"), self._registers.get("PIECE_SELECT")
        put("KEY", keys[key] if key < len(keys) else ONES)
        known = piece < len(pieces)
        put("PIECE_START", pieces[piece].start if known else _WIDE_ONES)
        put("PIECE_SIZE", pieces[piece].size if known else 0)

    def _note(self, trouble: Trouble, queue: Queue | None = None) -> None:
        """A fault; the first one stays until it is cleared.

        Args:
            trouble: what happened.
            queue: whose operation it was: after a reset nobody wants to hear of it any more.
        """
        with self._lock:
            if queue is not None and queue not in self._queues:
                return
            count = self._registers.get("FAULT_COUNT")
            self._registers.put("FAULT_COUNT", min(count + 1, ONES))
            if self._registers.get("FAULT") == Fault.NONE:
                self._registers.put("FAULT", trouble.fault)
                self._registers.put("FAULT_KEY", trouble.key)
                self._registers.put("FAULT_ADDRESS", trouble.address)
            self._cause(SliceCause.FAULT)

    def _cause(self, cause: SliceCause) -> None:
        fresh = self._registers.raise_bits("IRQ_STATUS", cause)
        if fresh & self._registers.get("IRQ_MASK"):
            self._dma.interrupt()

    # -- queues -----------------------------------------------------------------------------

    def _control(self, number: int) -> None:
        name = f"Q{number}_"
        get, put = self._registers.get, self._registers.put
        with self._lock:
            wanted = bool(get(name + "CONTROL") & 1)
            if wanted and self._queues[number] is not None:
                return
            self._stop(number)
            if not wanted:
                return
            ring, done_ring = get(name + "RING"), get(name + "DONE_RING")
            entries = get(name + "ENTRIES")
            possible = is_possible(ring, done_ring, entries) and self._view is not None
            if possible:
                self._queues[number] = Queue(ring, done_ring, entries, Channel(self._dma))
            put(name + "STATUS", _RUNS if possible else _FAULTED)
        if not possible:
            self._note(Trouble(Fault.BAD_RING, 0, ring))

    def _stop(self, number: int) -> None:
        name, queue = f"Q{number}_", self._queues[number]
        self._queues[number] = None
        if queue is not None:
            queue.channel.cut()
        for register in ("STATUS", "SUBMITTED", "COMPLETED"):
            self._registers.put(name + register, 0)

    def _stop_all(self) -> None:
        for number in range(maps.QUEUES):
            self._stop(number)
            self._registers.put(f"Q{number}_CONTROL", 0)

    def _submitted(self, number: int) -> None:
        with self._lock:
            queue = self._queues[number]
            if queue is None:
                self._registers.put(f"Q{number}_SUBMITTED", 0)
                return
            count = self._registers.get(f"Q{number}_SUBMITTED")
            good = queue.submit(count)
            if not good:
                self._fail(number)
        if not good:
            self._note(Trouble(Fault.BAD_DOORBELL, 0, count))
        self._worker.kick()

    def _fail(self, number: int) -> None:
        self._stop(number)
        self._registers.put(f"Q{number}_STATUS", _FAULTED)

    # -- the worker -------------------------------------------------------------------------

    def _step(self) -> float:
        busy, before = False, self._dma.counts.moved
        for number, queue in enumerate(tuple(self._queues)):
            view = self._view
            if queue is None or view is None:
                continue
            busy |= self._advance(number, queue, view)
        # also what an operation moved that failed, or was stopped
        moved = self._dma.counts.moved - before
        if not (busy or moved):
            return IDLE
        view = self._view
        return self._pace.charge(moved, view.slice.seat.bandwidth if view else 0, monotonic())

    def _advance(self, number: int, queue: Queue, view: SliceView) -> bool:
        """Do the next operation of a queue; False if there is none, or it waits."""
        try:
            step = queue.step(view, self._operations, lambda trouble: self._note(trouble, queue))
        except CutOffError:
            return False
        except DmaRefusedError as error:
            # the fault first: who sees that the queue stopped looks there for the reason
            with self._lock:
                self._note(Trouble(Fault.DMA_REFUSED, 0, error.address), queue)
                if self._queues[number] is queue:
                    self._fail(number)
            return False
        if step is None:
            return False
        with self._lock:
            if self._queues[number] is queue:
                self._registers.put(f"Q{number}_COMPLETED", queue.completed)
                if step.interrupt:
                    self._cause(SliceCause.QUEUE1 if number else SliceCause.QUEUE0)
        return True


def _show_badge(serial: str, view: SliceView) -> Iterator[pci.Capability]:
    if view.badge:
        texts = (text.encode().ljust(maps.BADGE_TEXT, b"\0") for text in (serial, view.slice.id))
        payload = bytes.fromhex(view.badge) + b"".join(texts)
        yield pci.designated(maps.VENDOR, maps.BADGE, payload)
