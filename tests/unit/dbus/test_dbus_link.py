"""The bus itself: none there, no agent on it, a second agent, a restart."""

from __future__ import annotations

import os
import time

import pytest
from bus_talk import DEADLINE_S, Serving, ignore

from virtfabric.dbus.channel import Channel
from virtfabric.dbus.client import AgentClient
from virtfabric.model.errors import (
    AlreadyRunningError,
    InvalidValueError,
    UnreachableError,
)


def test_a_second_agent_on_the_bus_is_refused(agent, bus):
    with (
        Serving(agent, bus),
        pytest.raises(AlreadyRunningError, match="another agent"),
        Serving(agent, bus),
    ):
        pass


def test_no_bus_at_all_is_unreachable(agent, bus):
    bus.stop()
    with pytest.raises(UnreachableError, match="no bus there"), Serving(agent, bus):
        pass


def _version(bus):
    with AgentClient.connected(bus.address) as client:
        return client.call("Health")["version"]


def test_the_agent_comes_back_after_a_bus_restart(agent, bus):
    with Serving(agent, bus):
        bus.stop()
        bus.start()
        give_up = time.monotonic() + DEADLINE_S
        while True:
            try:
                assert _version(bus) == "0.1.0"
                break
            except UnreachableError:
                assert time.monotonic() < give_up
                time.sleep(0.02)


@pytest.mark.parametrize(
    "address",
    [
        "unix:path=/nonexistent/bus",
        "rubbish",
        "unix:",
        "unix:abstract=",
        "tcp:host=localhost,port=1",
    ],
)
def test_a_client_without_a_bus_gets_one_clear_error(address):
    with (
        pytest.raises(UnreachableError, match="the agent does not answer on the bus") as caught,
        AgentClient.connected(address),
    ):
        pass
    assert "virtfabricd" in caught.value.advice


def test_a_client_without_an_agent_gets_one_clear_error(bus):
    with (
        pytest.raises(UnreachableError, match="nobody has the name"),
        AgentClient.connected(bus.address),
    ):
        pass


def test_the_system_bus_is_found_by_its_variable(agent, bus, monkeypatch):
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    with Serving(agent, bus), AgentClient.connected(None) as client:
        assert client.call("Health")["version"] == "0.1.0"


def test_a_client_notices_that_the_agent_left(agent, bus):
    with Serving(agent, bus) as serving, AgentClient.connected(bus.address) as client:
        job = client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
        with pytest.raises(UnreachableError, match="left the bus"):
            client.follow(job, lambda *_: serving.leave())
        with pytest.raises(UnreachableError, match="the agent does not answer on the bus"):
            client.call("Health")


def test_a_client_notices_that_the_bus_left(agent, bus):
    with Serving(agent, bus), AgentClient.connected(bus.address) as client:
        job = client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
        with pytest.raises(UnreachableError, match="the agent does not answer on the bus"):
            client.follow(job, lambda *_: bus.stop())
        agent.let_go.set()


class Bell:
    """Wakes who waits when it is rung."""

    def __init__(self):
        self.awake = False
        self._heard, self._say = os.pipe()

    def fileno(self):
        return self._heard

    def ring(self):
        self.awake = True
        os.write(self._say, b".")

    def close(self):
        os.close(self._heard)
        os.close(self._say)


def test_following_ends_early_when_it_is_woken(agent, bus):
    bell = Bell()
    with Serving(agent, bus), AgentClient.connected(bus.address) as client:
        job = client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
        assert client.follow(job, lambda *_: bell.awake or bell.ring(), bell)["state"] == "running"
        client.cancel(job)
        assert client.follow(job, ignore)["state"] == "cancelled"
    bell.close()


def test_a_wait_ends_without_a_signal(bus):
    channel = Channel.connect(bus.address)
    assert channel.hear(timeout_s=0.01) is not None  # NameAcquired, which every client gets
    assert channel.hear(timeout_s=0.01) is None
    channel.close()


def test_what_does_not_fit_the_signature_is_not_sent(agent, bus):
    with Serving(agent, bus), AgentClient.connected(bus.address) as client:
        with pytest.raises(InvalidValueError, match="cannot be sent"):
            client.call("AddPorts", "db", 1 << 32)
        assert client.call("Health")["version"] == "0.1.0"
