"""Who calls over the bus: another user, two clients at once, a flood of calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd

import pytest
from bus_talk import Serving, both, run
from dbus_next.message import Message

from virtfabric.dbus.client import AgentClient
from virtfabric.dbus.link import Link
from virtfabric.dbus.names import (
    BUS_NAME,
    MANAGER,
    ROOT,
)
from virtfabric.dbus.service import CALLS_EACH, WORKERS
from virtfabric.model.errors import (
    VirtfabricError,
)


class Somebody:
    """A forked child that has become `nobody` and waits for `go` to do its work.

    Forked, not executed: an interpreter in a directory of root's would not start for others, or
    start with another standard library.
    """

    def __init__(self, work):
        self.user = pwd.getpwnam("nobody")
        begin, self._go = os.pipe()
        self._heard, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work, begin, say)
        os.close(begin)
        os.close(say)

    def _become(self, work, begin, say):
        try:
            os.close(self._go)
            os.setgroups([54321])
            os.setresgid(*[self.user.pw_gid] * 3)
            os.setresuid(*[self.user.pw_uid] * 3)
            if os.read(begin, 1):
                os.write(say, work().encode())
        finally:
            os._exit(0)

    def go(self):
        os.write(self._go, b".")

    def said(self):
        """What its work returned; empty when it broke."""
        return os.read(self._heard, 65536).decode()

    def end(self):
        os.close(self._go)
        os.close(self._heard)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def somebody(work):
    child = Somebody(work)
    try:
        yield child
    finally:
        child.end()


as_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")


def _release(address):
    try:
        with AgentClient.connected(address) as client:
            client.call("Release", "g1")
    except VirtfabricError as error:
        return f"{type(error).__name__} {error}"
    return "released"


@as_root
def test_another_user_is_seen_as_that_user(agent, bus):
    with somebody(lambda: _release(bus.address)) as nobody, Serving(agent, bus):
        nobody.go()
        said = nobody.said()
    uid = nobody.user.pw_uid
    assert said.startswith(f"RefusedError not-allowed: nobody (uid {uid}, gids [")
    [caller] = agent.callers
    assert (caller.uid, caller.principal.name, caller.pid) == (uid, "nobody", nobody.pid)
    assert caller.gids == {nobody.user.pw_gid, 54321}


def test_two_clients_at_once_are_not_mixed_up(agent, bus):
    """Senders travel with their call, however the calls interleave."""

    async def work():
        with Serving(agent, bus):
            links = [await Link.connect(bus.address, lambda _m: None) for _ in range(3)]
            call = {"destination": BUS_NAME, "path": ROOT, "interface": MANAGER}
            replies = await asyncio.gather(
                *(
                    link.call(
                        Message(**call, member="ShowPolicy", signature="s", body=[f"{n}-{k}"])
                    )
                    for k in range(20)
                    for n, link in enumerate(links)
                )
            )
            for link in links:
                await link.close()
            return [r.body[0] for r in replies]

    said = run(work())
    assert said == [f"there is no guest '{n}-{k}'" for k in range(20) for n in range(3)]


def _ask_too_much(address):
    """Names of the errors that a flood of slow calls gets, over two connections."""

    async def work():
        links = [await Link.connect(address, lambda _m: None) for _ in range(2)]
        call = {"destination": BUS_NAME, "path": ROOT, "interface": MANAGER, "member": "Explain"}
        replies = await asyncio.gather(
            *(
                links[n % 2].call(Message(**call, signature="s", body=["wait"]))
                for n in range(CALLS_EACH + 4)
            )
        )
        return ",".join(sorted(str(r.error_name) for r in replies))

    return asyncio.run(work())


@as_root
def test_an_unprivileged_user_cannot_keep_root_out(agent, bus):
    assert CALLS_EACH * 2 <= WORKERS
    with somebody(lambda: _ask_too_much(bus.address)) as nobody, both(agent, bus) as client:
        nobody.go()
        for _ in range(CALLS_EACH):
            assert agent.hanging.acquire(timeout=5)
        health = client.call("Health")  # answered while nobody's calls hang
        agent.let_go.set()
        said = nobody.said()
    assert health["version"] == "0.1.0"
    refused = said.count("org.freedesktop.DBus.Error.LimitsExceeded")
    assert (refused, said.count("None")) == (4, CALLS_EACH)
