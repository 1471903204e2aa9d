"""What a descriptor does: bytes from the guest, through the card, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from virtfabric.model.image import Phase
from virtfabric.shim.cardpci import switch
from virtfabric.shim.cardpci.cardmemory import ProtectionError
from virtfabric.shim.cardpci.descriptors import Fault, Operation, Status
from virtfabric.shim.cardpci.engines import ENGINES, EngineError, Work
from virtfabric.shim.vfiouser.memory import DmaRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.model.adapter import Slice
    from virtfabric.shim.cardpci.cardmemory import CardMemory
    from virtfabric.shim.cardpci.descriptors import Descriptor
    from virtfabric.shim.cardpci.dma import Channel
    from virtfabric.shim.cardpci.switch import Port


class Trouble(NamedTuple):
    """What FAULT is to show."""

    fault: Fault
    key: int
    address: int


@dataclass(frozen=True, slots=True)
class SliceView:
    """A slice as its function sees it. `badge` as in `Firmware.badge`."""

    slice: Slice
    phase: Phase
    badge: str = ""

    def is_ready(self, capability: str) -> bool:
        """Whether it is programmed for that."""
        return self.phase == Phase.READY and self.slice.seat.capability == capability


@dataclass(frozen=True, slots=True)
class Result:
    """How an operation ended, what it wrote to its target, and a fault of its own."""

    status: Status
    written: int = 0
    trouble: Trouble | None = None


class Operations:
    """Of one slice."""

    def __init__(self, memory: CardMemory, port: Port | None) -> None:
        """Begin.

        Args:
            memory: of the card.
            port: of a `net.vf` slice.
        """
        self._memory = memory
        self._port = port

    def carry_out(self, view: SliceView, order: Descriptor, dma: Channel) -> Result | None:
        """One operation; None: nothing has come that it waits for.

        Raises:
            CutOffError: it was ended from outside.
        """
        if not order.sound:
            return Result(Status.BAD_DESCRIPTOR)
        handler = self._BUILT_IN.get(order.operation)
        try:
            if handler is not None:
                return handler(self, view, order, dma)
            return self._compute(view, order, dma)
        except DmaRefusedError as error:
            trouble = Trouble(Fault.DMA_REFUSED, order.key, error.address)
            return Result(Status.DMA_REFUSED, trouble=trouble)
        except ProtectionError as error:
            trouble = Trouble(Fault.ACCESS, order.key, error.fault.start)
            return Result(Status.ACCESS_FAULT, trouble=trouble)
        except EngineError as error:
            return Result(error.status)

    def _nothing(self, _view: SliceView, _order: Descriptor, _dma: Channel) -> Result:
        return Result(Status.DONE)

    def _store(self, view: SliceView, order: Descriptor, dma: Channel) -> Result:
        data = dma.read(order.source.address, order.source.length)
        # after an end the memory may be scrubbed already, for the next holder
        with dma.kept():
            self._memory.write(view.slice.id, order.key, order.card.address, data)
        return Result(Status.DONE, len(data))

    def _load(self, view: SliceView, order: Descriptor, dma: Channel) -> Result:
        if order.card.length > order.target.length:
            return Result(Status.NO_ROOM)
        data = self._memory.read(
            view.slice.id, order.key, order.card.address, order.card.length
        )  # fmt: skip
        dma.write(order.target.address, data)
        return Result(Status.DONE, len(data))

    def _compute(self, view: SliceView, order: Descriptor, dma: Channel) -> Result:
        capability = next((name for name, has in ENGINES.items() if order.operation in has), "")
        if not capability:
            return Result(Status.UNKNOWN_OPERATION)
        if not view.is_ready(capability):
            return Result(Status.NOT_READY)
        secret = b""
        if order.card.length:
            secret = self._memory.read(
                view.slice.id, order.key, order.card.address, order.card.length
            )  # fmt: skip
        source = dma.read(order.source.address, order.source.length)
        parameter = dma.read(order.parameter.address, order.parameter.length)
        compute = ENGINES[capability][order.operation]
        found = compute(Work(source, parameter, secret, order.target.length))
        dma.write(order.target.address, found)
        return Result(Status.DONE, len(found))

    def _send(self, view: SliceView, order: Descriptor, dma: Channel) -> Result:
        if self._port is None or not view.is_ready(switch.CAPABILITY):
            return Result(Status.NOT_READY)
        if not switch.MIN_FRAME <= order.source.length <= switch.MAX_FRAME:
            return Result(Status.BAD_DATA)
        frame = dma.read(order.source.address, order.source.length)
        # whoever sends in another's name would take its frames
        if frame[6:12] != self._port.mac:
            return Result(Status.BAD_DATA)
        self._port.send(frame)
        return Result(Status.DONE)

    def _receive(self, view: SliceView, order: Descriptor, dma: Channel) -> Result | None:
        if self._port is None or not view.is_ready(switch.CAPABILITY):
            return Result(Status.NOT_READY)
        frame = self._port.receive()
        if frame is None:
            return None
        if len(frame) > order.target.length:
            return Result(Status.NO_ROOM)
        dma.write(order.target.address, frame)
        return Result(Status.DONE, len(frame))

    _BUILT_IN: Final[dict[int, Callable[..., Result | None]]] = {
        Operation.NOTHING: _nothing, Operation.STORE: _store, Operation.LOAD: _load,
        Operation.SEND: _send, Operation.RECEIVE: _receive,
    }  # fmt: skip
