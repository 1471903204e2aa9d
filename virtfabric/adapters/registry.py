"""Which handler carries out which type of step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfabric.model.step import Step
    from virtfabric.ports import Handlers, StepHandler


class HandlerRegistry:
    """Implements `ports.Handlers`."""

    def __init__(self, handlers: Iterable[StepHandler]) -> None:
        """Register one handler for each step type.

        Raises:
            InvalidValueError: two for one type.
        """
        self._by_kind: dict[str, StepHandler] = {}
        for handler in handlers:
            if handler.kind in self._by_kind:
                raise InvalidValueError("handler.kind", handler.kind, "has a handler already")
            self._by_kind[handler.kind] = handler

    @property
    def kinds(self) -> frozenset[str]:
        """The step types there is a handler for."""
        return frozenset(self._by_kind)

    def for_step(self, step: Step) -> StepHandler:
        """The one handler of this step's type.

        Raises:
            InvalidValueError: no handler for the type.
        """
        handler = self._by_kind.get(step.kind)
        if handler is None:
            raise InvalidValueError("step.kind", step.kind, "has no handler")
        return handler


class JoinedHandlers:
    """Implements `ports.Handlers`: a step goes to the registry that knows its type, else first."""

    def __init__(self, first: Handlers, *others: HandlerRegistry) -> None:
        self._first = first
        self._others = others

    def for_step(self, step: Step) -> StepHandler:
        """The one handler of this step's type.

        Raises:
            InvalidValueError: no handler for the type.
        """
        for registry in self._others:
            if step.kind in registry.kinds:
                return registry.for_step(step)
        return self._first.for_step(step)
