"""`virtfabricd` whose steps do nothing and report success: the demo's checker has to notice.

The product has no switch for this. The handlers are exchanged from outside, in this process only.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import virtfabric.adapters.libvirt as real
from virtfabric.cli import agentd
from virtfabric.model.plan import STEP_TYPES

if TYPE_CHECKING:
    from virtfabric.model.step import Step
    from virtfabric.ports import StepContext


class IdleHandler:
    """Implements `ports.StepHandler` by doing nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def apply(self, step: Step, context: StepContext) -> None:
        """Nothing."""

    def verify(self, step: Step) -> None:
        """Finds everything as it should be."""

    def undo(self, step: Step) -> int:
        """Nothing."""
        return 0


def main() -> int:
    """Runs the agent with idle handlers."""
    idle = tuple(IdleHandler(kind) for kind in STEP_TYPES)
    every = [name for name in vars(real) if name.endswith("_handlers")]
    if "libvirt_handlers" not in every:
        sys.exit("noop_agent: virtfabric.adapters.libvirt has no libvirt_handlers now")
    for name in every:
        handlers = idle if name == "libvirt_handlers" else ()
        setattr(real, name, lambda *_where, handlers=handlers: handlers)
    return agentd.main()


if __name__ == "__main__":
    sys.exit(main())
