"""Runs in a lab: carries out steps by the real handlers, and prints what came of each as JSON.

Orders are lines of stdin: `[verb, argument]`, with `apply` (apply and verify) or `undo` and a
step's journal encoding, `changes` (how often memory has changed since it was asked last), `vfs`
and `[PF, count]`, `nvme` and `[PF, queues]`, `settings` and a VF, `offered` and a port. It goes on
until stdin ends: under TCG its start alone takes many seconds.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from virtfabric.adapters.cxl.memory import SysfsMemory
from virtfabric.adapters.libvirt import open_libvirt
from virtfabric.adapters.pci.functionfiles import FunctionFiles
from virtfabric.adapters.pci.inventory import CurrentUses
from virtfabric.adapters.pci.linkspeed import LinkSpeeds
from virtfabric.adapters.pci.vfs import VfPools
from virtfabric.adapters.pci.vfsettings import VfSettingsFiles
from virtfabric.model.device import PciAddress
from virtfabric.model.errors import VirtfabricError
from virtfabric.model.plan import parse_step


class Context:
    """A `StepContext` that keeps what it was told."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.notes: list[str] = []

    def progress(self, fraction: float, text: str) -> None:
        self.notes.append(text)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    opened = open_libvirt()
    opened.events.start(lambda _event: None)
    files = FunctionFiles()
    pools = VfPools(files, CurrentUses())

    def apply(data):
        step, context = parse_step(data), Context()
        handler = opened.handlers.for_step(step)
        handler.apply(step, context)
        applied = time.monotonic()
        handler.verify(step)
        return {"verify_s": round(time.monotonic() - applied, 3), "notes": context.notes}

    def undo(data):
        step = parse_step(data)
        return opened.handlers.for_step(step).undo(step)

    changed: list[float] = []
    memory = SysfsMemory()
    memory.watch(lambda: changed.append(time.monotonic()))

    def changes(_):
        count = len(changed)
        del changed[:count]
        return count

    verbs = {
        "changes": changes,
        "apply": apply,
        "undo": undo,
        "vfs": lambda given: pools.ensure(PciAddress(given[0]), given[1]),
        "nvme": lambda given: pools.ensure_nvme(PciAddress(given[0]), given[1]),
        "settings": lambda given: str(VfSettingsFiles(files).read(PciAddress(given))),
        "offered": lambda given: LinkSpeeds(files).offered(PciAddress(given)),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        verb, argument = json.loads(line)
        began = time.monotonic()
        try:
            result = {"result": verbs[verb](argument)}
        except VirtfabricError as error:
            result = {"error": type(error).__name__, "text": str(error), "advice": error.advice}
        result |= {"verb": verb, "seconds": round(time.monotonic() - began, 3)}
        print(json.dumps(result), flush=True)
    memory.close()
    opened.close()


if __name__ == "__main__":
    main()
