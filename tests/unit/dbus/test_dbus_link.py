"""The bus itself: none there, no agent on it, a second agent, a restart."""

from __future__ import annotations

import asyncio

import pytest
from bus_talk import ignore, run, serving

from virtfabric.dbus.client import AgentClient
from virtfabric.dbus.service import Service
from virtfabric.model.errors import (
    AlreadyRunningError,
    UnreachableError,
)


def test_a_second_agent_on_the_bus_is_refused(agent, bus):
    async def work():
        async with serving(agent, bus):
            second = Service(agent, bus.address)
            try:
                await second.start()
            finally:
                await second.close()

    with pytest.raises(AlreadyRunningError, match="another agent"):
        run(work())


def test_no_bus_at_all_is_unreachable(agent, tmp_path):
    async def work():
        service = Service(agent, f"unix:path={tmp_path}/nothing")
        try:
            await service.start()
        finally:
            await service.close()

    with pytest.raises(UnreachableError, match="no bus there"):
        run(work())


def test_the_agent_comes_back_after_a_bus_restart(agent, bus):
    async def work():
        async with serving(agent, bus):
            bus.stop()
            bus.start()
            while True:
                try:
                    async with AgentClient.connected(bus.address) as client:
                        return await client.call("Health")
                except UnreachableError:
                    await asyncio.sleep(0.02)

    assert run(work())["version"] == "0.1.0"


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/bus", "rubbish", "unix:abstract="])
def test_a_client_without_a_bus_gets_one_clear_error(address):
    async def work():
        async with AgentClient.connected(address):
            pass

    with pytest.raises(UnreachableError, match="the agent does not answer on the bus") as caught:
        run(work())
    assert "virtfabricd" in caught.value.advice


def test_a_client_without_an_agent_gets_one_clear_error(bus):
    async def work():
        async with AgentClient.connected(bus.address):
            pass

    with pytest.raises(UnreachableError, match="nobody has the name"):
        run(work())


def test_a_client_notices_that_the_agent_left(agent, bus):
    async def work():
        service = Service(agent, bus.address)
        await service.start()
        async with AgentClient.connected(bus.address) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
            following = asyncio.create_task(client.follow(job, ignore))
            await asyncio.sleep(0)
            await service.close()
            await following

    with pytest.raises(UnreachableError):
        run(work())
