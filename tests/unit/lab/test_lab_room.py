"""What a lab has no room for is told before anything is built."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.model.units import Bytes
from virtfabric.shim.lab import lab
from virtfabric.shim.lab.boot import start_qemu
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


@pytest.mark.parametrize("part", ["node", "CXL"])
def test_a_lab_with_more_memory_than_there_is(root: Path, started: list[Any], part: str) -> None:
    much = Bytes.parse("512TiB")
    topology = read_shipped_topology("cxl")
    if part == "node":
        first, *others = topology.nodes
        topology = replace(topology, nodes=(replace(first, memory=much), *others))
    else:
        assert topology.cxl is not None
        first, *others = topology.cxl.devices
        cxl = replace(topology.cxl, devices=(replace(first, volatile=much), *others))
        topology = replace(topology, cxl=cxl)
    with pytest.raises(
        LabError, match=r"lab one has \S+GiB of memory, and .*B are available"
    ) as caught:
        lab.up(topology, name="one", title="cxl", report=[].append)
    assert "a topology with less" in caught.value.advice
    assert not started
    assert not [*root.iterdir()]


def test_files_are_sparse_and_ask_for_no_room(root: Path, started: list[Any]) -> None:
    topology = read_shipped_topology("passthrough")
    much = Bytes.parse("512TiB")
    topology = replace(topology, nvme=tuple(replace(one, size=much) for one in topology.nvme))
    with pytest.raises(LabError, match="that is enough"):
        lab.up(topology, name="one", title="passthrough", report=[].append)


def test_the_payload_has_to_fit(
    root: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    free, total = 99 << 20, 1 << 30
    usage = SimpleNamespace(f_frsize=1, f_bsize=1, f_blocks=total, f_bfree=free, f_bavail=free)
    with monkeypatch.context() as small:
        small.setattr(os, "statvfs", lambda _: usage)
        with pytest.raises(LabError, match=f"to {root}, and 99MiB are free there") as caught:
            lab.up(SMALL, name="one", title="small", report=[].append)
        assert "$VIRTFABRIC_LABS" in caught.value.advice
        assert not started
        usage.f_blocks = usage.f_bfree = usage.f_bavail = 0  # a tmpfs without a bound
        with pytest.raises(LabError, match="that is enough"):
            lab.up(SMALL, name="one", title="small", report=[].append)
    assert not [*root.iterdir()]


def test_where_memory_runs_out_the_labs_qemu_goes_first(root: Path) -> None:
    place = place_of("one")
    place.directory.mkdir()
    argv = ["tail", "-f", "/dev/null", "-pidfile", str(place.pid_file)]
    with start_qemu(place, argv) as qemu:
        try:
            assert Path(f"/proc/{qemu.pid}/oom_score_adj").read_text() == "1000\n"
        finally:
            qemu.kill()
