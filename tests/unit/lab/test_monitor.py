"""The conversation with a lab's QEMU, where QEMU does not do its part."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from virtfabric.shim.lab import monitor
from virtfabric.shim.lab.place import LabError, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 2}}, "capabilities": []}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "one")
    place.directory.mkdir()
    return place


@pytest.fixture
def serve(place: Place) -> Iterator[Callable[..., None]]:
    """A stand-in for QEMU that says these lines; each but the first answers a command."""
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(place.monitor_socket))
        door.listen()
        threads: list[threading.Thread] = []

        def start(*lines: dict[str, Any] | None) -> None:
            def serve() -> None:
                client, _ = door.accept()
                with client:
                    for number, said in enumerate(lines):
                        heard = json.loads(client.recv(4096)) if number else {}
                        if said is None:  # it ends
                            return
                        known = {"id": heard["id"]} if "id" in heard else {}
                        client.sendall(json.dumps(said | known).encode() + b"\r\n")
                    done.wait(30)

            threads.append(threading.Thread(target=serve))
            threads[0].start()

        yield start
        done.set()
        for thread in threads:
            thread.join()


def test_an_answer(place: Place, serve: Callable[..., None]) -> None:
    serve(GREETING, {"return": {}}, {"return": {"status": "running"}})
    assert monitor.execute(place, "query-status") == {"status": "running"}


def test_a_refusal(place: Place, serve: Callable[..., None]) -> None:
    refused = {"class": "CommandNotFound", "desc": "no such command"}
    serve(GREETING, {"return": {}}, {"error": refused})
    with pytest.raises(LabError, match="lab one: no such command"):
        monitor.execute(place, "query-status")


def test_a_qemu_that_ends_meanwhile(place: Place, serve: Callable[..., None]) -> None:
    serve(GREETING, {"return": {}}, None)
    with pytest.raises(LabError, match="its QEMU ended before it answered"):
        monitor.execute(place, "device_del", id="mem1")


def test_a_qemu_that_ends_as_somebody_comes(place: Place, serve: Callable[..., None]) -> None:
    serve(GREETING, None)
    with pytest.raises(LabError, match="does not answer on QMP"):
        monitor.execute(place, "query-status")


@pytest.mark.parametrize("said", [(), (GREETING,), (GREETING, {"return": {}})])
def test_a_qemu_that_hangs(place: Place, serve: Callable[..., None], said: Any) -> None:
    serve(*said)
    with pytest.raises(LabError, match="did not answer within 1 s") as caught:
        monitor.execute_all(place, [("query-status", {})], answer_s=0.6)
    assert "virtfabric lab down one" in caught.value.advice
