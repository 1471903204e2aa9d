"""Who may do what: polkit where it runs, else uid 0 and a configured group; ceilings by principal.

Every edge goes through here; a denial is audited by the facade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from virtfabric.model.amounts import MEMORY_KEY
from virtfabric.model.errors import Reason, Refusal, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.daemon.api import Caller
    from virtfabric.model.amounts import Amounts
    from virtfabric.model.request import Offerable

    Polkit = Callable[[Caller, str], bool | None]


class Action(StrEnum):
    """polkit action ids."""

    READ = "org.virtfabric1.read"
    AUDIT = "org.virtfabric1.audit"
    ALLOCATE = "org.virtfabric1.allocate"
    POLICY = "org.virtfabric1.policy"
    DEVICES = "org.virtfabric1.devices"
    MEMORY = "org.virtfabric1.memory"
    CARDS = "org.virtfabric1.cards"
    HOOK = "org.virtfabric1.hook"


class Authority:
    """Decides on callers; holds no state but its configuration."""

    def __init__(
        self,
        group: int | None,
        ceiling_for: Callable[[Caller], Offerable],
        polkit: Polkit | None = None,
    ) -> None:
        """Set up.

        Args:
            group: gid whose members may do everything but the hook edge; None for nobody.
            ceiling_for: bounds of a caller.
            polkit: asks polkit; answers None where it does not run.
        """
        self._group = group
        self._ceiling_for = ceiling_for
        self._polkit = polkit

    def configure(self, group: int | None, ceiling_for: Callable[[Caller], Offerable]) -> None:
        """Take over a reloaded configuration."""
        self._group, self._ceiling_for = group, ceiling_for

    def allows(self, caller: Caller, action: Action) -> bool:
        """Whether the caller may do this at all."""
        if caller.uid == 0:
            return True
        if action is Action.HOOK:
            return False
        if action is Action.READ:
            return True
        if self._polkit is not None and (answer := self._polkit(caller, action)) is not None:
            return answer
        return self._group is not None and self._group in caller.gids

    def require(self, caller: Caller, action: Action) -> None:
        """Let the caller pass.

        Raises:
            RefusedError: NOT_ALLOWED, naming what it takes.
        """
        if not self.allows(caller, action):
            who = f"{caller.principal} (uid {caller.uid})"
            raise RefusedError(
                Refusal(
                    Reason.NOT_ALLOWED,
                    f"{who} may not {action.value.rpartition('.')[2]}: it takes root, the group "
                    f"set in [access], or the polkit action {action.value}",
                )
            )

    def ceiling(self, caller: Caller) -> Offerable:
        """The bounds of this caller."""
        return self._ceiling_for(caller)

    def check_priority(self, caller: Caller, priority: int) -> None:
        """Bound the priority a caller may give.

        Raises:
            RefusedError: ABOVE_CEILING.
        """
        highest = self.ceiling(caller).max_priority
        if priority > highest:
            raise RefusedError(
                Refusal(
                    Reason.ABOVE_CEILING,
                    f"priority {priority} is above the ceiling of {caller.principal}, {highest}",
                )
            )

    def check_amounts(self, caller: Caller, holding: Amounts) -> None:
        """Bound what a guest may hold through this caller.

        Raises:
            RefusedError: ABOVE_CEILING.
        """
        bound = self.ceiling(caller).max_amounts
        if bound is None:
            return
        for key, most in bound.items():
            held = holding.all_memory if key == MEMORY_KEY else holding[key]
            if held > most:
                raise RefusedError(
                    Refusal(
                        Reason.ABOVE_CEILING,
                        f"{key} {held} is above the ceiling of {caller.principal}, {most}",
                    )
                )
