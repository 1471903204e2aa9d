"""Hooks while the agent starts: nobody is admitted beside guests that are not counted yet."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import agent_world as aw
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.guest import GuestState
    from virtfabric.model.ids import GuestId

ROOT = aw.ROOT
STARTING = "virtfabric: the agent is starting, retry"
BIG_MIB = 900


class StartingWorld(aw.AgentWorld):
    """An agent that starts, and a libvirt that does not list its guests before `listed` is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked, self.listed = threading.Event(), threading.Event()
        self._read_guests = self.host.read_guests
        self.host.read_guests = self._list  # type: ignore[method-assign]
        self._starting = threading.Thread(target=self.start)
        self._starting.start()
        assert self.asked.wait(aw.DEADLINE_S)

    def _list(self) -> dict[GuestId, GuestState]:
        self.asked.set()
        assert self.listed.wait(aw.DEADLINE_S)
        return self._read_guests()

    def close(self) -> None:
        self.listed.set()
        self._starting.join()
        super().close()


def _big(number: int, name: str, *, running: bool) -> Any:
    return aw.make_spec(
        number, name, 50, memory_mib=(BIG_MIB, 2048), initial_mib=BIG_MIB - 256, running=running
    )


@pytest.fixture
def world() -> Iterator[StartingWorld]:
    """Memory for one of two; the one that runs is not in the books yet."""
    specs = (_big(1, "runs", running=True), _big(2, "starts", running=False))
    world = StartingWorld(specs=specs)
    yield world
    world.close()


def test_a_start_is_refused_until_the_guests_that_run_are_counted(
    world: StartingWorld, caplog: pytest.LogCaptureFixture
) -> None:
    assert world.virsh_start("starts", wait_s=0.05) == STARTING
    world.listed.set()
    with caplog.at_level(logging.INFO):
        answer = world.virsh_start("starts")
    assert "starts cannot start" in answer, answer
    assert f"hook: prepare refused: {answer.removeprefix('virtfabric: ')}" in caplog.messages


def test_a_start_waits_for_the_count(world: StartingWorld) -> None:
    answers: list[str] = []
    hook = threading.Thread(target=lambda: answers.append(world.virsh_start("starts")))
    hook.start()
    hook.join(0.05)
    assert answers == []
    world.listed.set()
    hook.join(aw.DEADLINE_S)
    (answer,) = answers
    assert "starts cannot start" in answer, answer


def test_what_fits_beside_them_starts_then(world: StartingWorld) -> None:
    world.host.define_guest(aw.make_spec(3, "small", 50, running=False))
    world.listed.set()
    assert world.virsh_start("small") == ""


def test_unmanaged_guests_and_reconnects_are_not_kept_waiting(world: StartingWorld) -> None:
    stranger = aw.format_prepare(aw.GuestSpec(aw.uuid_of(4), "stranger"))
    assert world.agent.hook_prepare(ROOT, stranger, wait_s=0.0) == ""
    running = aw.format_prepare(world.spec("runs"))
    world.agent.hook_notify(ROOT, "runs", "reconnect", running)
    assert not world.listed.is_set()
