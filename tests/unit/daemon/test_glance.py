"""A look that hangs keeps nobody waiting, and is not made twice at once."""

from __future__ import annotations

import threading

from virtfabric.daemon.glance import Glance


def test_a_look_that_ends_is_made_each_time() -> None:
    looks: list[int] = []
    glance = Glance(lambda: looks.append(1))
    assert glance.within(10)
    assert glance.within(10)
    assert len(looks) == 2


def test_one_that_hangs_is_joined_not_repeated() -> None:
    looks: list[int] = []
    go = threading.Event()

    def look() -> None:
        looks.append(1)
        go.wait()

    glance = Glance(look)
    assert not glance.within(0.01)
    assert not glance.within(0.01)
    go.set()
    assert glance.within(10)
    assert len(looks) == 1


def test_one_that_fails_is_no_end() -> None:
    def look() -> None:
        raise OSError("gone")

    assert Glance(look).within(10)
