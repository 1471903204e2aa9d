"""`virtfabricd`: the agent's process. Signals, log, service manager, bus; nothing else."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from virtfabric import __version__
from virtfabric.adapters.sdnotify import ServiceNotifier
from virtfabric.compose import Composition
from virtfabric.config import load_config
from virtfabric.dbus.service import Service
from virtfabric.domxml.templates import load_templates
from virtfabric.model.errors import VirtfabricError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from virtfabric.config import Config

log = logging.getLogger("virtfabricd")

CONFIG_DIR = Path("/etc/virtfabric")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="virtfabricd",
        description="Changes the hardware under running libvirt guests. Runs in the foreground; "
        "SIGTERM stops it cleanly, SIGHUP reloads the configuration.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="PATH",
        help=f"a TOML file, or a directory of them (default: {CONFIG_DIR})",
    )  # fmt: skip
    parser.add_argument("--uri", help="libvirt connection (overrides agent.uri)")
    parser.add_argument("--state-dir", help="journal and audit log (overrides agent.state_dir)")
    parser.add_argument("--run-dir", help="hook socket (overrides agent.run_dir)")
    parser.add_argument("--bus", metavar="ADDRESS", help="D-Bus address (default: the system bus)")
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], help="default: info"
    )
    parser.add_argument(
        "--check-config", action="store_true", help="read the configuration, say what is wrong"
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="a host in memory with four guests instead of libvirt, to try the commands on; "
        "without other options, its configuration is empty and its files are gone when it ends",
    )
    parser.add_argument("--version", action="version", version=f"virtfabricd {__version__}")
    return parser


def _load(args: argparse.Namespace) -> Config:
    overrides = {
        key: value
        for key, value in (
            ("agent.uri", args.uri),
            ("agent.state_dir", args.state_dir),
            ("agent.run_dir", args.run_dir),
            ("agent.bus", args.bus),
            ("agent.log_level", args.log_level),
        )
        if value is not None
    }
    if args.simulate:
        # whatever its configuration says: no hooks of real guests, no heads of a chain that is none
        overrides["agent.syslog"] = ""
        overrides["agent.hook_socket"] = Path(args.run_dir, "hook.sock")
        return load_config(args.config or (), overrides)
    return load_config(args.config or CONFIG_DIR, overrides)


@contextmanager
def _own_directories(args: argparse.Namespace) -> Iterator[None]:
    """A simulated agent in the state of a real one would settle what that one began."""
    if not args.simulate:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="virtfabricd-simulated-") as scratch:
        args.state_dir = args.state_dir or Path(scratch, "state")
        args.run_dir = args.run_dir or Path(scratch, "run")
        yield


async def _serve(args: argparse.Namespace, config: Config) -> None:
    loop = asyncio.get_running_loop()
    stop, reload = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    manager = ServiceNotifier.from_environment()
    manager.status("opening journal and libvirt")
    composition = await asyncio.to_thread(Composition, config, simulate=args.simulate)
    try:
        service = Service(composition.agent, config.agent.bus or None)
        await asyncio.to_thread(composition.start)
        await service.start()
        manager.ready()
        log.info("ready: %s, state in %s", config.agent.uri, config.agent.state_dir)
        try:
            await asyncio.to_thread(_warm_up)
            await _until_stopped(args, composition, manager, stop, reload)
        finally:
            log.info("stopping")
            manager.stopping()
            await service.close()
    finally:
        await asyncio.to_thread(composition.close)


def _warm_up() -> None:
    """After the start, which need not wait for it, and before the first guest wants a device."""
    try:
        load_templates()
    except VirtfabricError as error:
        log.error("no device can be given to a guest: %s", error)


async def _until_stopped(
    args: argparse.Namespace,
    composition: Composition,
    manager: ServiceNotifier,
    stop: asyncio.Event,
    reload: asyncio.Event,
) -> None:
    stopped = asyncio.ensure_future(stop.wait())
    while not stop.is_set():
        asked = asyncio.ensure_future(reload.wait())
        await asyncio.wait({stopped, asked}, return_when=asyncio.FIRST_COMPLETED)
        if reload.is_set():
            reload.clear()
            manager.reloading()
            await asyncio.to_thread(_reload, args, composition)
            manager.ready()
        asked.cancel()


def _reload(args: argparse.Namespace, composition: Composition) -> None:
    try:
        composition.reload(_load(args))
        log.info("configuration reloaded")
    except VirtfabricError as error:
        log.error("configuration not taken over: %s", error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent; returns the exit code (0 stopped cleanly, 1 failed, 2 usage)."""
    args = _parser().parse_args(argv)
    try:
        with _own_directories(args):
            return _run(args)
    except VirtfabricError as error:
        return _fail(error)


def _run(args: argparse.Namespace) -> int:
    config = _load(args)
    if args.check_config:
        print("the configuration is valid")
        return 0
    logging.basicConfig(
        level=config.agent.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    asyncio.run(_serve(args, config))
    return 0


def _fail(error: VirtfabricError) -> int:
    print(f"virtfabricd: {error}", file=sys.stderr)
    if error.advice:
        print(f"  {error.advice}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
