"""`virtfabric-card`: an emulated card's process. Signals, log, service manager; nothing else."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric import __version__
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.sdnotify import ServiceNotifier
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.units import Bytes
from virtfabric.shim.card.description import read_description
from virtfabric.shim.card.functions import CardFunctions, qmp_slots
from virtfabric.shim.card.server import Card, CardServer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.shim.card.description import CardDescription

log = logging.getLogger("virtfabric-card")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="virtfabric-card",
        description="Runs an emulated offload card from its description, in the foreground; "
        "SIGTERM stops it cleanly, and what it was told is still there at its next start.",
        epilog="docs/card.md says what is in a description. Its certificate is made by "
        "`virtfabric card provision`.",
    )
    parser.add_argument("description", type=Path, metavar="FILE", help="the card, as TOML")
    parser.add_argument(
        "--check", action="store_true", help="read the description, say what is wrong"
    )
    parser.add_argument(
        "--functions", type=Path, metavar="DIR",
        help="serve its PCI functions, too: a vfio-user socket in DIR for each (QEMU 10.1)",
    )  # fmt: skip
    parser.add_argument(
        "--qmp",
        type=Path,
        metavar="SOCKET",
        help="plug functions into the QEMU of this QMP socket, which nobody else uses",
    )
    parser.add_argument(
        "--port",
        action="append",
        default=[],
        metavar="ID",
        dest="ports",
        help="a root port there that is kept free for one function; the first is for the mailbox",
    )
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info",
        help="default: info",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"virtfabric-card {__version__}")
    return parser


@dataclass(frozen=True, slots=True)
class _Bus:
    """Where the card's functions go.

    Attributes:
        monitor: of the QEMU that they are plugged into; None: somebody else does.
        ports: of that QEMU.
    """

    directory: Path
    monitor: Path | None
    ports: tuple[str, ...]


def _bus(parser: argparse.ArgumentParser, args: argparse.Namespace) -> _Bus | None:
    if bool(args.qmp) != bool(args.ports):
        parser.error("--qmp and --port go together")
    if args.qmp and not args.functions:
        parser.error("--qmp needs --functions")
    if len(set(args.ports)) != len(args.ports):
        parser.error("--port: each is for one function")
    return _Bus(args.functions, args.qmp, tuple(args.ports)) if args.functions else None


async def _serve(description: CardDescription, bus: _Bus | None) -> None:
    loop = asyncio.get_running_loop()
    stop, ready = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    manager = ServiceNotifier.from_environment()
    card = await asyncio.to_thread(
        partial(Card, description, SystemClock(), has_functions=bus is not None)
    )
    functions = None
    try:
        _introduce(card)
        functions = _open_functions(card, bus) if bus else None
        server = CardServer(
            card.desk, description.socket, functions.refresh if functions else lambda: None
        )
        serving = asyncio.create_task(server.run(stop, ready))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if ready.is_set():
            manager.ready()
            log.info("ready")
        await serving
        manager.stopping()
    finally:
        if functions is not None:
            await functions.close()
        await asyncio.to_thread(card.close)


def _open_functions(card: Card, bus: _Bus) -> CardFunctions:
    slots = qmp_slots(bus.monitor, bus.ports) if bus.monitor else None
    functions = CardFunctions(card, bus.directory, slots)
    log.info("functions in %s: %s", bus.directory, ", ".join(functions.sockets))
    return functions


def _introduce(card: Card) -> None:
    books = card.firmware.books
    adapter = books.adapter
    able = ", ".join(f"{n} {what}" for what, n in sorted(adapter.accelerators.items())) or "none"
    log.info(
        "card %s at %s: %d cores, %s, %d lanes, %d keys, accelerators: %s",
        adapter.serial, adapter.site or "no site", adapter.cores, Bytes(adapter.memory),
        adapter.lanes, adapter.keys, able,
    )  # fmt: skip
    log.info(
        "kept from before: %d slices, %d promises (generation %d)",
        len(books.slices), len(books.reservations), books.generation,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the card; returns the exit code (0 stopped cleanly, 1 failed, 2 usage)."""
    parser = _parser()
    args = parser.parse_args(argv)
    bus = _bus(parser, args)
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # its errors are raised as well
    try:
        description = read_description(args.description)
        if args.check:
            print("the description is valid")
            return 0
        asyncio.run(_serve(description, bus))
    except VirtfabricError as error:
        print(f"virtfabric-card: {error}", file=sys.stderr)
        if error.advice:
            print(f"  {error.advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
