"""`virtfabricd` that dies, or stands still, at a named point of a named step: `FAULT [options]`.

FAULT is `ACTION:STEP:PHASE[:PATH]`:

* ACTION `kill` (SIGKILL to the own process) or `hold` (create PATH, go on when it is gone; once);
* STEP a step type (`resize-virtio-mem`, ...), or `any`;
* PHASE `before-apply`, `after-apply` or `after-verify`.

`recover-only` makes an agent that recovers from its journal, and dies before it does anything else:
what is there then is the undo's work, not that of the placement that follows every start.

The product has no switch for this. The handlers are exchanged from outside, in this process only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import virtfabric.adapters.libvirt as real
from virtfabric.cli import agentd
from virtfabric.daemon.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.model.step import Step
    from virtfabric.ports import StepContext, StepHandler

PHASES = ("before-apply", "after-apply", "after-verify")
_POLL_S = 0.02


def die() -> None:
    """As `kill -9` does it: no handler, no flush, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Fault:
    """What happens where; once."""

    action: str
    step: str
    phase: str
    path: Path | None = None
    struck: bool = False

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads `ACTION:STEP:PHASE[:PATH]`."""
        action, step, phase, *path = text.split(":", 3)
        if (
            action not in ("kill", "hold")
            or phase not in PHASES
            or (action == "hold") != bool(path)
        ):
            sys.exit(f"fault_agent: {text!r} is not ACTION:STEP:PHASE[:PATH]")
        return cls(action, step, phase, Path(path[0]) if path else None)

    def reach(self, step: Step, phase: str) -> None:
        """The agent is at this phase of this step."""
        if self.struck or phase != self.phase or self.step not in (step.kind, "any"):
            return
        self.struck = True
        if self.path is None:
            die()
            return
        self.path.write_text(str(step))
        while self.path.exists():
            time.sleep(_POLL_S)


class FaultyHandler:
    """Implements `ports.StepHandler` with the real handler, and the fault."""

    def __init__(self, inner: StepHandler, fault: Fault) -> None:
        self.kind = inner.kind
        self._inner = inner
        self._fault = fault

    def apply(self, step: Step, context: StepContext) -> None:
        """The fault strikes before or after."""
        self._fault.reach(step, "before-apply")
        self._inner.apply(step, context)
        self._fault.reach(step, "after-apply")

    def verify(self, step: Step) -> None:
        """The fault strikes after."""
        self._inner.verify(step)
        self._fault.reach(step, "after-verify")

    def undo(self, step: Step) -> int:
        """As it is."""
        return self._inner.undo(step)


def main() -> int:
    """Runs the agent with the fault of the first argument."""
    text, options = sys.argv[1], sys.argv[2:]
    if text == "recover-only":
        Agent.start = lambda _self: die()  # type: ignore[method-assign]
        return agentd.main(options)
    fault = Fault.parse(text)
    for name in ("libvirt_handlers", "pci_handlers", "cxl_handlers"):
        setattr(real, name, faulty(getattr(real, name), fault))
    return agentd.main(options)


def faulty(build: Callable[..., Any], fault: Fault) -> Callable[..., tuple[FaultyHandler, ...]]:
    """What builds handlers, with the fault in each."""
    return lambda *args: tuple(FaultyHandler(handler, fault) for handler in build(*args))


if __name__ == "__main__":
    sys.exit(main())
