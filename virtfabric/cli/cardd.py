"""`virtfabric-card`: an emulated card's process. Signals, log, service manager; nothing else."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric import __version__
from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.sdnotify import ServiceNotifier
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.units import Bytes
from virtfabric.shim.card.description import read_description
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
        "--log-level", choices=["debug", "info", "warning", "error"], default="info",
        help="default: info",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"virtfabric-card {__version__}")
    return parser


async def _serve(description: CardDescription) -> None:
    loop = asyncio.get_running_loop()
    stop, ready = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    manager = ServiceNotifier.from_environment()
    card = await asyncio.to_thread(Card, description, SystemClock())
    try:
        _introduce(card)
        server = CardServer(card.desk, description.socket)
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
        await asyncio.to_thread(card.close)


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
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        description = read_description(args.description)
        if args.check:
            print("the description is valid")
            return 0
        asyncio.run(_serve(description))
    except VirtfabricError as error:
        print(f"virtfabric-card: {error}", file=sys.stderr)
        if error.advice:
            print(f"  {error.advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
