"""A look that hangs keeps nobody waiting, and no other is made beside it."""

from __future__ import annotations

import threading

import pytest

from virtfabric.adapters.clock import SystemClock
from virtfabric.daemon.glance import Glance


@pytest.fixture
def glance() -> Glance:
    return Glance(SystemClock())


def test_a_look_that_ends_is_made_each_time(glance: Glance) -> None:
    looks: list[int] = []
    assert glance.within(10, lambda: looks.append(1))
    assert glance.within(10, lambda: looks.append(2))
    assert looks == [1, 2]


def test_beside_one_that_hangs_no_other_begins(glance: Glance) -> None:
    begun: list[str] = []
    go = threading.Event()

    def hang() -> None:
        begun.append("first")
        go.wait()

    assert not glance.within(0.01, hang)
    assert not glance.within(0.01, lambda: begun.append("never"))
    assert begun == ["first"]
    go.set()
    assert glance.within(10, lambda: begun.append("second"))
    assert begun == ["first", "second"]


def test_who_comes_while_another_looks_gets_a_look_of_its_own(glance: Glance) -> None:
    """What was seen before somebody asked is not what they asked for."""
    begun, go = threading.Event(), threading.Event()
    seen: list[str] = []

    def slow() -> None:
        begun.set()
        go.wait()
        seen.append("slow")

    first = threading.Thread(target=lambda: glance.within(10, slow))
    first.start()
    assert begun.wait(10)
    answers: list[bool] = []
    second = threading.Thread(
        target=lambda: answers.append(glance.within(10, lambda: seen.append("own")))
    )
    second.start()
    go.set()
    first.join()
    second.join()
    assert (seen, answers) == (["slow", "own"], [True])


def test_one_that_fails_is_no_end(glance: Glance) -> None:
    def look() -> None:
        raise OSError("gone")

    assert glance.within(10, look)
    assert glance.within(10, look)
