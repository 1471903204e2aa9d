"""What tests say over the private bus: a service there, a client of it, raw messages, signals."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from dbus_next.message import Message

from virtfabric.dbus.client import AgentClient
from virtfabric.dbus.link import Link
from virtfabric.dbus.names import (
    BUS_NAME,
)
from virtfabric.dbus.service import Service

DEADLINE_S = 10.0


def run(work):
    async def limited():
        async with asyncio.timeout(DEADLINE_S):
            return await work

    return asyncio.run(limited())


class Serving:
    """A service on the bus, in a thread of its own: the clients of these tests block."""

    def __init__(self, agent, bus):
        self._loop = asyncio.new_event_loop()
        self._service = Service(agent, bus.address)
        self._thread = threading.Thread(target=self._loop.run_forever)

    def _do(self, work):
        async def limited():
            async with asyncio.timeout(DEADLINE_S):
                return await work

        return asyncio.run_coroutine_threadsafe(limited(), self._loop).result()

    def __enter__(self):
        self._thread.start()
        try:
            self._do(self._service.start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def leave(self):
        """Go off the bus; safe to repeat."""
        self._do(self._service.close())

    def __exit__(self, *_exc):
        self.leave()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def both(agent, bus):
    with Serving(agent, bus), AgentClient.connected(bus.address) as client:
        yield client


async def _raw(bus, path, interface, member, signature, body):
    link = await Link.connect(bus.address, lambda _m: None)
    try:
        return await link.call(
            Message(
                destination=BUS_NAME, path=path, interface=interface, member=member,
                signature=signature, body=list(body),
            )
        )  # fmt: skip
    finally:
        await link.close()


def raw(bus, path, interface, member, signature="", body=()):
    """The reply to a call that our own client would not make."""
    return run(_raw(bus, path, interface, member, signature, body))


def ignore(_fraction, _text):
    pass


def heard_until(signals, wanted):
    """Signals until one of each wanted name came."""
    found = []
    for heard in signals:
        found.append(heard)
        if wanted <= {h.member for h in found}:
            return found
    raise AssertionError("unreachable")
