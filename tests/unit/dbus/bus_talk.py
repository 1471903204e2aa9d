"""What tests say over the private bus: a service there, a client of it, raw messages, signals."""

from __future__ import annotations

import asyncio
import contextlib

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


@contextlib.asynccontextmanager
async def serving(agent, bus):
    service = Service(agent, bus.address)
    await service.start()
    try:
        yield service
    finally:
        await service.close()


@contextlib.asynccontextmanager
async def both(agent, bus):
    async with serving(agent, bus), AgentClient.connected(bus.address) as client:
        yield client


async def raw(bus, path, interface, member, signature="", body=()):
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


def ignore(_fraction, _text):
    pass


async def heard_until(client, wanted):
    """Signals until one of each wanted name came."""
    found = []
    async for heard in client.signals():
        found.append(heard)
        if wanted <= {h.member for h in found}:
            return found
    raise AssertionError("unreachable")
