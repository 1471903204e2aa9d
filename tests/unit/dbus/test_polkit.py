"""The polkit gate against a small authority on a real private bus, and against none."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from dbus_next import Message, MessageType
from dbus_next.aio import MessageBus

from virtfabric.daemon.api import Caller
from virtfabric.dbus.polkit import NAME, Polkit
from virtfabric.model.request import Principal

CALLER = Caller(Principal("alice", 1000), 1000, frozenset({1000}), 42, ":1.99")


class Authority:
    """Owns polkit's name in a thread of its own; answers with `body`."""

    def __init__(self, address: str, signature: str, body: list[Any]) -> None:
        self.asked: list[Any] = []
        self._address, self._signature, self._body = address, signature, body
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Authority:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _answer(self, message: Message) -> Message | None:
        if message.message_type is not MessageType.METHOD_CALL:
            return None
        self.asked.append(message.body)
        if not self._signature:
            return Message.new_error(message, "org.freedesktop.PolicyKit1.Error.Failed", "no")
        return Message.new_method_return(message, self._signature, self._body)

    async def _run(self) -> None:
        bus = await MessageBus(bus_address=self._address).connect()
        bus.add_message_handler(self._answer)
        await bus.request_name(NAME)
        self._ready.set()
        await asyncio.to_thread(self._stop.wait)
        bus.disconnect()


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [
        ("(bba{ss})", [[True, False, {}]], True),
        ("(bba{ss})", [[False, True, {}]], False),
        ("s", ["nonsense"], False),
        ("", [], False),
    ],
)
def test_the_answer_counts(bus: Any, signature: str, body: list[Any], expected: bool) -> None:
    with Authority(bus.address, signature, body) as authority:
        assert Polkit(bus.address)(CALLER, "org.virtfabric1.allocate") is expected
    [subject, action, _, flags, _] = authority.asked[0]
    assert subject[0] == "system-bus-name"
    assert subject[1]["name"].value == ":1.99"
    assert (action, flags) == ("org.virtfabric1.allocate", 0)


def test_without_polkit_others_decide(bus: Any) -> None:
    assert Polkit(bus.address)(CALLER, "org.virtfabric1.allocate") is None


def test_a_caller_off_the_bus_is_not_asked_about() -> None:
    local = Caller(Principal("alice", 1000), 1000, frozenset(), 42)
    assert Polkit("unix:path=/nowhere")(local, "org.virtfabric1.allocate") is None


def test_a_dead_bus_is_a_no() -> None:
    assert Polkit("unix:path=/nowhere")(CALLER, "org.virtfabric1.allocate") is False
