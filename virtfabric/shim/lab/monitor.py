"""One QMP conversation with a lab's QEMU, through the official `qemu.qmp` library."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient

from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.shim.lab.place import Place

Command = tuple[str, dict[str, Any]]
"""A QMP command and its arguments (QEMU: docs/interop/qemu-qmp-ref)."""


def execute(place: Place, command: str, **arguments: Any) -> Any:
    """Run one command and return its answer.

    Raises:
        LabError: the lab does not run, or QEMU refuses the command.
    """
    return execute_all(place, [(command, arguments)])[0]


def execute_all(place: Place, commands: Sequence[Command]) -> list[Any]:
    """Run commands in order over one connection; ends at the first that fails.

    Raises:
        LabError: as `execute`.
    """
    return asyncio.run(_converse(place, commands))


def execute_human(place: Place, line: str) -> str:
    """Run a command of the human monitor: what QMP has no word for.

    Raises:
        LabError: as `execute`. HMP itself tells errors only in its text.
    """
    return str(execute(place, "human-monitor-command", **{"command-line": line}))


async def _converse(place: Place, commands: Sequence[Command]) -> list[Any]:
    client = QMPClient(f"lab {place.name}")
    try:
        await client.connect(str(place.monitor_socket))
    except ConnectError as error:
        raise LabError(f"lab {place.name} does not answer on QMP: is it up?") from error
    try:
        return [await client.execute(name, arguments) for name, arguments in commands]
    except ExecuteError as error:
        raise LabError(f"lab {place.name}: {error}") from error
    finally:
        with contextlib.suppress(Exception):
            await client.disconnect()
