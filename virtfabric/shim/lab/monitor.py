"""One QMP conversation with a lab's QEMU, through the official `qemu.qmp` library."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from qemu.qmp import ConnectError, ExecInterruptedError, QMPClient, QMPError

from virtfabric.shim.lab.place import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.shim.lab.place import Place

Command = tuple[str, dict[str, Any]]
"""A QMP command and its arguments (QEMU: docs/interop/qemu-qmp-ref)."""
ANSWER_S: Final = 120.0
"""How long QEMU may take to answer; it serves one client on a socket after the other."""
_LEAVE_S: Final = 5.0


def execute(place: Place, command: str, **arguments: Any) -> Any:
    """Run one command and return its answer.

    Raises:
        LabError: the lab does not run, or QEMU refuses the command, ends or does not answer.
    """
    return execute_all(place, [(command, arguments)])[0]


def execute_all(
    place: Place, commands: Sequence[Command], *, answer_s: float = ANSWER_S
) -> list[Any]:
    """Run commands in order over one connection; ends at the first that fails.

    Args:
        place: of the lab.
        commands: what to run.
        answer_s: how long QEMU may take to greet, and for each command.

    Raises:
        LabError: as `execute`.
    """
    return asyncio.run(_converse(place, commands, answer_s))


def execute_human(place: Place, line: str) -> str:
    """Run a command of the human monitor: what QMP has no word for.

    Raises:
        LabError: as `execute`. HMP itself tells errors only in its text.
    """
    return str(execute(place, "human-monitor-command", **{"command-line": line}))


async def _converse(place: Place, commands: Sequence[Command], answer_s: float) -> list[Any]:
    client = QMPClient(f"lab {place.name}")
    try:
        await asyncio.wait_for(client.connect(str(place.monitor_socket)), answer_s)
        return [
            await asyncio.wait_for(client.execute(name, arguments), answer_s)
            for name, arguments in commands
        ]
    except TimeoutError as error:
        raise LabError(
            f"lab {place.name}: its QEMU did not answer within {answer_s:.0f} s",
            advice=f"`virtfabric lab down {place.name}` ends it also where it hangs",
        ) from error
    except ConnectError as error:
        raise LabError(f"lab {place.name} does not answer on QMP: is it up?") from error
    except ExecInterruptedError as error:
        raise LabError(f"lab {place.name}: its QEMU ended before it answered") from error
    except QMPError as error:
        raise LabError(f"lab {place.name}: {error}") from error
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.disconnect(), _LEAVE_S)
