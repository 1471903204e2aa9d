"""The skin on a real bus: every method, errors, types, callers, jobs, bursts, a bus restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd

import pytest
from dbus_next import Variant
from dbus_next.constants import MessageType
from dbus_next.message import Message

from virtfabric.daemon.api import Notice
from virtfabric.dbus.client import AgentClient, with_agent
from virtfabric.dbus.emission import Outbox, emissions_of
from virtfabric.dbus.link import Link
from virtfabric.dbus.names import (
    BUS_NAME,
    INTROSPECTABLE,
    JOB,
    MANAGER,
    MANAGER_INTERFACE,
    PROPERTIES,
    ROOT,
    job_path,
)
from virtfabric.dbus.service import CALLS_EACH, WORKERS, Service
from virtfabric.model.errors import (
    AlreadyRunningError,
    Reason,
    RefusedError,
    UnreachableError,
    VirtfabricError,
)

DEADLINE_S = 10.0
ARGUMENTS = {
    "ShowPolicy": ("db",),
    "SetPolicy": ("db", {"priority": "80"}),
    "ClearPolicy": ("db",),
    "Allocate": ("db", {"cpu": "+1"}),
    "Plan": ("db", {"cpu": "+1"}),
    "Release": ("g1",),
    "Explain": ("r1",),
    "Audit": (12.5, "r1"),
    "VerifyAudit": ("",),
}


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


def test_every_method_is_reachable_and_answers_what_the_agent_says(agent, bus, little):
    async def work():
        async with both(agent, bus) as client:
            answers = {}
            for method in MANAGER_INTERFACE.methods:
                args = ARGUMENTS.get(method.name, ())
                answers[method.name] = await client.call(method.name, *args)
            return answers

    answers = run(work())
    assert answers["GetHost"] == little.HOST
    assert answers["ListGuests"] == little.GUESTS
    assert answers["Plan"] == little.PLAN
    assert answers["Audit"][0]["body"] == {"since": 12.5, "subject": "r1"}
    assert answers["Health"]["generation"] == 17
    titles = {j["id"]: j["title"] for j in answers["ListJobs"]}
    assert titles[answers["Allocate"]] == "allocation for db"
    assert titles[answers["Release"]] == "release"
    assert titles[answers["RepairDrift"]] == "repair"
    assert {c.uid for c in agent.callers} == {0}
    assert all(c.pid > 0 for c in agent.callers)


def test_properties_of_the_manager(agent, bus):
    async def work():
        async with serving(agent, bus):
            every = await raw(bus, ROOT, PROPERTIES, "GetAll", "s", [MANAGER])
            one = await raw(bus, ROOT, PROPERTIES, "Get", "ss", [MANAGER, "Generation"])
            return every.body[0], one.body[0]

    every, one = run(work())
    assert {n: v.value for n, v in every.items()} == {
        "Version": "0.1.0", "Generation": 17, "Connected": True,
    }  # fmt: skip
    assert one == Variant("t", 17)


def test_introspection_shows_the_whole_api(agent, bus):
    async def work():
        async with serving(agent, bus):
            return [
                (await raw(bus, path, INTROSPECTABLE, "Introspect")).body[0]
                for path in ("/", "/org", ROOT, f"{ROOT}/job")
            ]

    top, org, root, jobs = run(work())
    assert '<node name="org"' in top
    assert '<node name="virtfabric1"' in org
    for method in MANAGER_INTERFACE.methods:
        assert f'<method name="{method.name}"' in root
    assert '<node name="job"' in root
    assert "Manager" not in jobs


@pytest.mark.parametrize(
    ("member", "args", "reason", "words"),
    [
        ("ShowPolicy", ("nobody",), Reason.UNKNOWN_GUEST, "there is no guest 'nobody'"),
        ("Allocate", ("db", {"cpu": "+64"}), Reason.NO_CAPACITY, "not to be had"),
        ("SetPolicy", ("db", {"priority": "99"}), Reason.INVALID_ARGUMENT, "priority: '99'"),
        ("Audit", (float("nan"), ""), Reason.INVALID_ARGUMENT, "since"),
    ],
)
def test_a_no_comes_back_whole(agent, bus, member, args, reason, words):
    async def work():
        async with both(agent, bus) as client:
            await client.call(member, *args)

    with pytest.raises(RefusedError, match=words) as caught:
        run(work())
    assert caught.value.refusal.reason is reason
    if reason is Reason.NO_CAPACITY:
        assert caught.value.refusal.would_fit == {"cpu": 1000}
        assert caught.value.refusal.considered == ("web",)


def test_error_names_and_text_are_the_published_ones(agent, bus):
    async def work():
        async with serving(agent, bus):
            return await raw(
                bus, ROOT, MANAGER, "Allocate", "sa{ss}", ["db", {"cpu": "+64"}]
            ), await raw(bus, ROOT, MANAGER, "Explain", "s", ["defect"])

    no, defect = run(work())
    assert no.message_type is MessageType.ERROR
    assert no.error_name == "org.virtfabric1.Error.NoCapacity"
    assert no.body[0] == "64 more CPUs are not to be had"
    assert json.loads(no.body[1])["reason"] == "no-capacity"
    assert defect.error_name == "org.virtfabric1.Error.Internal"
    assert "secret" not in "".join(defect.body)
    assert "Traceback" not in "".join(defect.body)


@pytest.mark.parametrize(
    ("path", "interface", "member", "signature", "body", "error"),
    [
        (ROOT, MANAGER, "Allocate", "s", ["db"], "InvalidArgs"),
        (ROOT, MANAGER, "Allocate", "sa{sv}", ["db", {"cpu": Variant("i", 1)}], "InvalidArgs"),
        (ROOT, MANAGER, "Audit", "ss", ["yesterday", ""], "InvalidArgs"),
        (ROOT, MANAGER, "GetStatus", "i", [1], "InvalidArgs"),
        (ROOT, MANAGER, "Explode", "", [], "UnknownMethod"),
        (ROOT, "org.virtfabric1.Other", "GetStatus", "", [], "UnknownInterface"),
        ("/org/virtfabric2", MANAGER, "GetStatus", "", [], "UnknownObject"),
        (f"{ROOT}/job/a/b", JOB, "Cancel", "", [], "UnknownObject"),
        (ROOT, PROPERTIES, "Get", "ss", [MANAGER, "Colour"], "UnknownProperty"),
        (ROOT, PROPERTIES, "Get", "ss", ["", "Version"], "UnknownInterface"),
        (ROOT, PROPERTIES, "Get", "s", [MANAGER], "InvalidArgs"),
        (
            ROOT, PROPERTIES, "Set", "ssv", [MANAGER, "Version", Variant("s", "9")],
            "PropertyReadOnly",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_without_a_traceback(
    agent, bus, path, interface, member, signature, body, error
):
    async def work():
        async with serving(agent, bus):
            return await raw(bus, path, interface, member, signature, body)

    reply = run(work())
    assert reply.error_name == f"org.freedesktop.DBus.Error.{error}"
    assert "Traceback" not in "".join(reply.body)
    assert ".py" not in "".join(reply.body)
    assert agent.callers == []


def test_an_unknown_job_is_an_unknown_id(agent, bus):
    async def work():
        async with serving(agent, bus):
            return [
                (await raw(bus, job_path("gone"), *call)).error_name
                for call in ((JOB, "Cancel"), (PROPERTIES, "GetAll", "s", [JOB]))
            ]

    assert run(work()) == ["org.virtfabric1.Error.UnknownId"] * 2


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
        with_agent(address, lambda client: client.call("Release", "g1"))
    except VirtfabricError as error:
        return f"{type(error).__name__} {error}"
    return "released"


@as_root
def test_another_user_is_seen_as_that_user(agent, bus):
    with somebody(lambda: _release(bus.address)) as nobody:

        async def work():
            async with serving(agent, bus):
                nobody.go()
                return await asyncio.to_thread(nobody.said)

        said = run(work())
    uid = nobody.user.pw_uid
    assert said.startswith(f"RefusedError not-allowed: nobody (uid {uid}, gids [")
    [caller] = agent.callers
    assert (caller.uid, caller.principal.name, caller.pid) == (uid, "nobody", nobody.pid)
    assert caller.gids == {nobody.user.pw_gid, 54321}


def test_two_clients_at_once_are_not_mixed_up(agent, bus):
    """Senders travel with their call, however the calls interleave."""

    async def work():
        async with serving(agent, bus):
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


def test_a_job_is_followed_to_its_end(agent, bus, little):
    async def work():
        shown = []

        def show(fraction, text):
            shown.append((fraction, text))
            if len(shown) == 5:
                agent.let_go.set()

        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
            return await client.follow(job, show), shown

    job, shown = run(work())
    assert job["state"] == "done"
    assert job["result"] == little.RESULT
    assert [f for f, _ in shown] == sorted(f for f, _ in shown)
    assert shown[-1][1].startswith("step ")


def test_a_job_over_before_we_look_is_still_told(agent, bus, little):
    async def work():
        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1"})
            await asyncio.to_thread(agent.jobs_.get(job).ended.wait)
            return await client.follow(job, ignore)

    assert run(work())["result"] == little.RESULT


def test_a_cancelled_job_undoes_and_says_so(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            job = await client.call("Allocate", "db", {"cpu": "+1", "key": "slow"})
            await client.cancel(job)
            return await client.follow(job, ignore)

    job = run(work())
    assert job["state"] == "cancelled"
    assert job["error"]["reason"] == "cancelled"
    assert job["error"]["detail"].endswith("nothing changed")


def test_a_failing_job_tells_its_error_and_no_secrets(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            ended = []
            for key in ("bad", "defect"):
                job = await client.call("Allocate", "db", {"cpu": "+1", "key": key})
                ended.append((await client.follow(job, ignore))["error"])
            return ended

    bad, defect = run(work())
    assert (bad["detail"], bad["advice"]) == ("libvirt said no", "ask it again")
    assert defect["reason"] == "internal"
    assert "secret" not in json.dumps(defect)


async def _heard(client, wanted):
    """Signals until one of each wanted name came."""
    found = []
    async for heard in client.signals():
        found.append(heard)
        if wanted <= {h.member for h in found}:
            return found
    raise AssertionError("unreachable")


def test_signals_of_a_job_and_of_notices(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            wanted = {"Done", "JobDone", "GrantMade", "Notice", "DriftFound", "Alert"}
            hearing = asyncio.create_task(_heard(client, wanted))
            await asyncio.sleep(0)
            job = await client.call("Allocate", "db", {"cpu": "+1"})
            agent.notices.publish("drift.found", {"guest": "x", "what": "pin"})
            agent.notices.alert("topic", "look at this")
            return job, await hearing

    job, found = run(work())
    by_member = {h.member: h for h in found}
    assert by_member["Done"].path == job_path(job)
    assert by_member["Done"].body[0] == "done"
    assert by_member["JobDone"].body == (job_path(job), "done")
    assert json.loads(by_member["GrantMade"].body[0])["id"] == "g1"
    assert by_member["Alert"].body == ("look at this",)
    kinds = [h.body[0] for h in found if h.member == "Notice"]
    assert "grant.made" in kinds
    assert "job.progress" not in kinds


def test_a_burst_of_notices_does_not_break_the_bus(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            numbers = []

            async def hear():
                async for heard in client.signals():
                    body = json.loads(heard.body[1]) if heard.member == "Notice" else {}
                    if "n" in body:
                        numbers.append(body["n"])
                        if body["n"] == 999:
                            return

            hearing = asyncio.create_task(hear())
            await asyncio.sleep(0)
            for n in range(1000):
                agent.notices.publish("burst.test", {"n": n, "filler": "x" * 500})
            health = await client.call("Health")
            await hearing
            return numbers, health

    numbers, health = run(work())
    assert numbers == list(range(1000))
    assert health["version"] == "0.1.0"


def test_more_than_the_queue_takes_is_counted_and_told():
    async def work():
        outbox = Outbox(limit=10)
        for n in range(15):
            [emission] = emissions_of(Notice("flood.test", 0.0, {"n": n}))
            outbox.put(emission)
        taken = [await outbox.take() for _ in range(11)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await outbox.take()
        return [(e.body[0], json.loads(e.body[1])) for e in taken]

    *kept, last = run(work())
    assert [body["n"] for _, body in kept] == list(range(10))
    assert last == ("notices.lost", {"count": 5})


def test_only_the_newest_progress_waits():
    async def work():
        outbox = Outbox()
        for n in range(100):
            body = {"job": "j1", "fraction": n / 100, "text": f"step {n}"}
            for emission in emissions_of(Notice("job.progress", 0.0, body)):
                outbox.put(emission)
        ended = {"job": "j1", "state": "done", "result": {}, "error": None}
        for emission in emissions_of(Notice("job.done", 0.0, ended)):
            outbox.put(emission)
        return [await outbox.take() for _ in range(3)]

    first, *rest = run(work())
    assert (first.member, first.body) == ("Progress", (0.99, "step 99"))
    assert "Done" in {e.member for e in rest}


def test_a_malformed_notice_silences_nothing(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            hearing = asyncio.create_task(_heard(client, {"Alert"}))
            await asyncio.sleep(0)
            agent.notices.publish("job.done", {"nothing": "right"})
            agent.notices.publish("job.progress", {"job": "../x", "fraction": 1, "text": ""})
            agent.notices.alert("topic", "still here")
            return await hearing

    assert run(work())[-1].body == ("still here",)


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
    with somebody(lambda: _ask_too_much(bus.address)) as nobody:

        async def work():
            async with both(agent, bus) as client:
                nobody.go()
                for _ in range(CALLS_EACH):
                    assert await asyncio.to_thread(agent.hanging.acquire, timeout=5)
                health = await client.call("Health")  # answered while nobody's calls hang
                agent.let_go.set()
                return health, await asyncio.to_thread(nobody.said)

        health, said = run(work())
    assert health["version"] == "0.1.0"
    refused = said.count("org.freedesktop.DBus.Error.LimitsExceeded")
    assert (refused, said.count("None")) == (4, CALLS_EACH)


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


def test_signals_of_others_are_not_believed(agent, bus):
    """Anybody may send a signal straight to our connection."""

    async def work():
        async with both(agent, bus) as client:
            hearing = asyncio.create_task(_heard(client, {"Alert"}))
            await asyncio.sleep(0)
            liar = await Link.connect(bus.address, lambda _m: None)
            lie = Message.new_signal(ROOT, MANAGER, "Alert", "s", ["a lie"])
            lie.destination = client._link.unique_name
            await liar.send(lie)
            await liar.call_bus("GetId", "")  # the bus has passed the lie on by now
            agent.notices.alert("topic", "the truth")
            found = await hearing
            await liar.close()
            return [h.body for h in found if h.member == "Alert"]

    assert run(work()) == [("the truth",)]


def test_the_client_knows_only_the_api(agent, bus):
    async def work():
        async with both(agent, bus) as client:
            await client.call("Explode")

    with pytest.raises(VirtfabricError, match="not in the API"):
        run(work())
