"""One client of a function: its requests, one after the other, and what it lent."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from virtfabric.shim.vfiouser import bodies, wire
from virtfabric.shim.vfiouser.bodies import CONFIG_REGION, MSI_INDEX, InvalidRequestError
from virtfabric.shim.vfiouser.config import SIZE as CONFIG_SIZE
from virtfabric.shim.vfiouser.function import Bus, Region
from virtfabric.shim.vfiouser.interrupts import Vectors
from virtfabric.shim.vfiouser.memory import GuestMemory
from virtfabric.shim.vfiouser.wire import Command

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from virtfabric.shim.vfiouser.function import PciFunction
    from virtfabric.shim.vfiouser.wire import Request

_NOTHING: Final = Region(0)
Answer = tuple[bytes, tuple[int, ...]]


class Session:
    """What lasts as long as a connection."""

    def __init__(self, sock: socket.socket, function: PciFunction) -> None:
        self._sock = sock
        self._function = function
        self._memory = GuestMemory(lambda: function.config.may_master)
        self._vectors = Vectors(1)
        self._greeted = False

    def serve(self) -> None:
        """Until the client goes; then all that it lent is given back.

        Raises:
            BrokenWireError: the client says what cannot be followed.
            OSError: of the socket.
        """
        self._function.plug(Bus(self._function.config, self._memory, self._vectors))
        try:
            while (request := wire.read_request(self._sock)) is not None:
                try:
                    self._answer(request)
                finally:
                    request.close_fds()
        finally:
            self._function.unplug()
            self._vectors.detach(0, self._vectors.count)
            self._memory.clear()

    def _answer(self, request: Request) -> None:
        try:
            body, fds = self._carry_out(request)
        except InvalidRequestError as error:
            if request.reply:
                wire.send_error(self._sock, request, error.errno)
            return
        if request.reply:
            wire.send_reply(self._sock, request, body, fds)

    def _carry_out(self, request: Request) -> Answer:
        handler = self._HANDLERS.get(request.command)
        if handler is None:
            raise InvalidRequestError(f"command {request.command}", errno.ENOTSUP)
        if not request.complete:
            raise InvalidRequestError("too many descriptors")
        if self._greeted is (request.command == Command.VERSION):
            raise InvalidRequestError("the version comes first, and once")
        return handler(self, request)

    def _version(self, request: Request) -> Answer:
        answer = bodies.format_version(*bodies.parse_version(request.body))
        self._greeted = True
        return answer, ()

    def _map(self, request: Request) -> Answer:
        mapping = bodies.parse_dma_map(request.body)
        if len(request.fds) > 1:
            raise InvalidRequestError("a mapping has one file")
        if request.fds:
            self._memory.map(mapping, request.fds.pop())
        else:
            self._memory.map(mapping)
        return b"", ()

    def _unmap(self, request: Request) -> Answer:
        self._memory.unmap(bodies.parse_dma_unmap(request.body))
        return request.body[:24], ()

    def _info(self, _request: Request) -> Answer:
        return bodies.format_info(), ()

    def _region_info(self, request: Request) -> Answer:
        index = bodies.parse_index(request.body, bodies.REGIONS)
        region = self._region(index)
        mapped = region.fd >= 0
        answer = bodies.format_region_info(index, region.size, mapped=mapped)
        return answer, (region.fd,) if mapped else ()

    def _irq_info(self, request: Request) -> Answer:
        index = bodies.parse_index(request.body, bodies.INTERRUPTS)
        vectors = self._vectors.count if index == MSI_INDEX else 0
        return bodies.format_irq_info(index, vectors), ()

    def _set_irqs(self, request: Request) -> Answer:
        wanted = bodies.parse_set_interrupts(request.body)
        if wanted.start + wanted.count > (
            self._vectors.count if wanted.index == MSI_INDEX else 0
        ):  # fmt: skip
            raise InvalidRequestError(f"no such vectors of interrupt {wanted.index}")
        if wanted.trigger:
            for vector in range(wanted.start, wanted.start + wanted.count):
                self._vectors.trigger(vector)
        elif request.fds:
            if len(request.fds) != wanted.count:
                raise InvalidRequestError("a vector has one eventfd")
            self._vectors.attach(wanted.start, request.fds)
        else:  # all of them if none is named, else these
            self._vectors.detach(wanted.start, wanted.count or self._vectors.count)
        return b"", ()

    def _read(self, request: Request) -> Answer:
        access = bodies.parse_access(request.body, write=False)
        self._check_within(access)
        if access.region == CONFIG_REGION:
            data = self._function.config.read(access.offset, access.count)
        else:
            data = self._function.read(access.region, access.offset, access.count)
        return request.body[:16] + data, ()

    def _write(self, request: Request) -> Answer:
        access = bodies.parse_access(request.body, write=True)
        self._check_within(access)
        if access.region != CONFIG_REGION:
            self._function.write(access.region, access.offset, access.data)
        else:
            self._configure(access)
        return request.body[:16], ()

    def _configure(self, access: bodies.Access) -> None:
        if self._function.config.write(access.offset, access.data):
            self._start_anew()
        # who switches bus mastering off may count on the memory from the answer on
        self._memory.settle()

    def _reset(self, _request: Request) -> Answer:
        self._start_anew()
        return b"", ()

    def _start_anew(self) -> None:
        self._function.config.reset()
        self._function.reset()

    def _region(self, index: int) -> Region:
        if index == CONFIG_REGION:
            return Region(CONFIG_SIZE)
        return self._function.regions.get(index, _NOTHING)

    def _check_within(self, access: bodies.Access) -> None:
        if access.offset + access.count > self._region(access.region).size:
            raise InvalidRequestError(f"{access.count} bytes at {access.offset:#x} of the region")

    _HANDLERS: Final[dict[int, Callable[[Session, Request], Answer]]] = {
        Command.VERSION: _version, Command.DMA_MAP: _map, Command.DMA_UNMAP: _unmap,
        Command.GET_INFO: _info, Command.GET_REGION_INFO: _region_info,
        Command.GET_IRQ_INFO: _irq_info, Command.SET_IRQS: _set_irqs,
        Command.REGION_READ: _read, Command.REGION_WRITE: _write, Command.RESET: _reset,
    }  # fmt: skip
