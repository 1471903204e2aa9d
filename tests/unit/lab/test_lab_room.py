"""What a lab has no room for is told before anything is built."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.shim.lab import lab
from virtfabric.shim.lab.cards import cards_of
from virtfabric.shim.lab.place import LabError, place_of
from virtfabric.shim.topology.shipped import read_shipped_topology

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = read_shipped_topology("small")
CARD = read_shipped_topology("card")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for labs with a path about as long as the usual one."""
    with tempfile.TemporaryDirectory(prefix="virtfabric-", dir="/tmp") as root:
        monkeypatch.setenv("VIRTFABRIC_LABS", root)
        yield Path(root)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Labs whose image would be built now; they get no further."""
    started: list[Any] = []

    def start(topology: Any, *_: Any) -> None:
        started.append(topology)
        raise LabError("that is enough")

    monkeypatch.setattr(lab, "_start", start)
    return started


def test_a_sockets_path_that_is_too_long(root: Path, started: list[Any]) -> None:
    first, *others = CARD.cards
    topology = replace(CARD, cards=(replace(first, id="c" * 31), *others))
    name = "l" * 31
    (card, _) = cards_of(topology, place_of(name))
    path = card.functions / "management.sock"
    with pytest.raises(LabError, match=f"{path} is {len(str(path))} bytes long") as caught:
        lab.up(topology, name=name, title="card", report=[].append)
    assert f"the id of card {card.serial}" in caught.value.advice
    assert "--name" in caught.value.advice
    assert not started
    assert not [*root.iterdir()]
    with pytest.raises(LabError, match="that is enough"):
        lab.up(topology, name="l", title="card", report=[].append)
