"""What a running agent takes over of a changed configuration, and what it says of the rest."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.compose import Composition
from virtfabric.config import load_config
from virtfabric.daemon.api import Caller
from virtfabric.model.request import Principal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from virtfabric.config import Config

ROOT = Caller(Principal("root", 0), 0, frozenset({0}))


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    def make(**changed: object) -> Config:
        own: dict[str, object] = {
            "agent.state_dir": tmp_path / "state", "agent.run_dir": tmp_path / "run",
            "agent.syslog": "",
        }  # fmt: skip
        return load_config((), own | {k.replace("__", "."): v for k, v in changed.items()})

    return make


@pytest.fixture
def composition(configured: Callable[..., Config]) -> Iterator[Composition]:
    with Composition(configured(), simulate=True) as made:
        made.start()
        yield made


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"memory__deadline_s": 7.5}, ""),
        ({"agent__drift_interval_s": 60.0, "agent__sample_interval_s": 2.0}, ""),
        ({"agent__log_level": "debug"}, "[agent], but for its intervals, takes effect"),
    ],
)
def test_what_waits_for_the_next_start_is_said(
    composition: Composition,
    configured: Callable[..., Config],
    changed: dict[str, Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "virtfabric.compose")
    composition.reload(configured(**changed))
    told = [record.getMessage() for record in caplog.records if "effect" in record.getMessage()]
    assert [text.startswith(said) for text in told] == [True] * bool(said)


def test_the_deadline_of_the_next_request_is_the_new_one(
    composition: Composition, configured: Callable[..., Config]
) -> None:
    def deadlines() -> set[float]:
        request = composition.agent._allocation._request(ROOT, "web", {"cpu": "+100m"})
        call = composition.agent._reclaim._open({"node": "1"})
        return {request.deadline_s, call.claim.deadline_s}

    assert deadlines() == {30.0}
    composition.reload(configured(memory__deadline_s=7.5))
    assert deadlines() == {7.5}
