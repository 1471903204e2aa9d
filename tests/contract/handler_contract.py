"""What every step handler keeps, against any world that can show its guest.

A test module provides a fixture `world` and subclasses or imports the classes here:

    from tests.contract.handler_contract import HandlerContract

    class TestSimulated(HandlerContract): ...

The simulated host and a real libvirt run the same functions.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from virtfabric.model.errors import GuestGoneError, VerificationError
from virtfabric.model.plan import STEP_TYPES, parse_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfabric.model.step import Step
    from virtfabric.ports import Handlers


class World(Protocol):
    """A running guest and the handlers that change it."""

    handlers: Handlers

    def steps(self) -> Sequence[Step]:
        """One valid step of each kind this world can do, `before` being what is there now."""

    def observe(self, step: Step) -> Any:
        """What kernel and guest show of what the step changes; comparable by `==`."""

    def vanish(self, step: Step) -> None:
        """Stop the step's guest."""


OF_THE_HOST = frozenset(
    {
        "bind-driver",
        "set-up-vf",
        "set-profile",
        "limit-link",
        "create-region",
        "online-memory",
        "make-huge-pages",
        "bring-slice",
        "assign-slice",
    }
)
"""Kinds that change the host whatever their guest does. `reset-function` has nothing to undo and
is in no world's steps."""


class Context:
    """A `StepContext` that remembers."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.reports: list[tuple[float, str]] = []

    def progress(self, fraction: float, text: str) -> None:
        assert 0 <= fraction <= 1
        self.reports.append((fraction, text))


def steps_of(world: World) -> list[Step]:
    steps = list(world.steps())
    assert steps
    return steps


class HandlerContract:
    """Inherit it in a module that has a `world` fixture."""

    def test_every_step_has_its_handler(self, world: World) -> None:
        for step in steps_of(world):
            assert world.handlers.for_step(step).kind == step.kind
            assert step.kind in STEP_TYPES

    def test_apply_verify_undo_restores(self, world: World) -> None:
        for step in steps_of(world):
            handler = world.handlers.for_step(step)
            before = world.observe(step)
            handler.apply(step, Context())
            handler.verify(step)
            assert world.observe(step) != before, step
            assert handler.undo(step) == 0
            assert world.observe(step) == before, step

    def test_verify_tells_when_nothing_happened(self, world: World) -> None:
        for step in steps_of(world):
            with pytest.raises(VerificationError):
                world.handlers.for_step(step).verify(step)

    def test_repeating_is_safe(self, world: World) -> None:
        for step in steps_of(world):
            handler = world.handlers.for_step(step)
            before = world.observe(step)
            assert handler.undo(step) == 0  # never applied: a crash may have come first
            assert world.observe(step) == before, step
            handler.apply(step, Context())
            once = world.observe(step)
            handler.apply(step, Context())
            handler.verify(step)
            assert world.observe(step) == once, step
            assert handler.undo(step) == 0
            assert handler.undo(step) == 0
            assert world.observe(step) == before, step

    def test_step_from_the_journal_undoes_what_was_applied(self, world: World) -> None:
        for step in steps_of(world):
            before = world.observe(step)
            world.handlers.for_step(step).apply(step, Context())
            again = parse_step(step.to_json())
            assert world.handlers.for_step(again).undo(again) == 0
            assert world.observe(step) == before, step

    def test_all_together_undone_newest_first(self, world: World) -> None:
        steps = steps_of(world)
        before = [world.observe(s) for s in steps]
        for step in steps:
            world.handlers.for_step(step).apply(step, Context())
            world.handlers.for_step(step).verify(step)
        for step in reversed(steps):
            assert world.handlers.for_step(step).undo(step) == 0
        assert [world.observe(s) for s in steps] == before

    def test_what_is_the_hosts_is_undone_without_the_guest(self, world: World) -> None:
        for step in (s for s in steps_of(world) if s.kind in OF_THE_HOST):
            handler = world.handlers.for_step(step)
            world.vanish(step)
            before = world.observe(step)
            handler.apply(step, Context())
            assert world.observe(step) != before, step
            assert handler.undo(step) == 0
            assert world.observe(step) == before, step

    def test_vanished_guest_counts_as_undone(self, world: World) -> None:
        steps = steps_of(world)
        for step in steps:
            world.handlers.for_step(step).apply(step, Context())
        for guest_step in steps:
            world.vanish(guest_step)
        for step in reversed(steps):
            handler = world.handlers.for_step(step)
            assert handler.undo(step) == 0
            if step.kind in OF_THE_HOST:
                continue
            with pytest.raises(GuestGoneError):
                handler.apply(step, Context())
            with pytest.raises(GuestGoneError):
                handler.verify(step)
