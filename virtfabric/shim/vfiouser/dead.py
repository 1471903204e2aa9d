"""What answers for a function whose server has died, until its client lets go of it.

As a root port does for a dead device: reads give all ones, writes go nowhere. Mappings are agreed
to: QEMU 11.1.2 ends where one fails ("vfio: DMA mapping failed, unable to continue"), and a kernel
that takes its driver from a dead function changes them.

    python -m virtfabric.shim.vfiouser.dead DESCRIPTOR...    # of connections, between two messages
"""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING

from virtfabric.shim.vfiouser import bodies, wire
from virtfabric.shim.vfiouser.bodies import InvalidRequestError
from virtfabric.shim.vfiouser.wire import BrokenWireError, Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.shim.vfiouser.wire import Request


def answer_for_dead(client: socket.socket) -> None:
    """Until the client goes."""
    with client, suppress(BrokenWireError, OSError):
        while (request := wire.read_request(client)) is not None:
            request.close_fds()
            if request.reply:
                _answer(client, request)


def _answer(client: socket.socket, request: Request) -> None:
    try:
        body = _format_answer(request)
    except InvalidRequestError as error:
        wire.send_error(client, request, error.errno)
    else:
        wire.send_reply(client, request, body, ())


def _format_answer(request: Request) -> bytes:
    match request.command:
        case Command.REGION_READ:
            access = bodies.parse_access(request.body, write=False)
            return request.body[:16] + b"\xff" * access.count
        case Command.REGION_WRITE:
            return request.body[:16]
        case Command.DMA_UNMAP:
            return request.body[:24]
        case Command.DMA_MAP | Command.SET_IRQS | Command.RESET:
            return b""
    raise InvalidRequestError(f"command {request.command} of a dead function", errno.ENODEV)


def main(argv: Sequence[str]) -> None:
    """Serve connections that were inherited; ends with the last of them."""
    clients = [socket.socket(fileno=int(word)) for word in argv]
    threads = [Thread(target=answer_for_dead, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
