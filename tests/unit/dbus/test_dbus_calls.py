"""The skin on a real bus: every method, properties, introspection, errors and types."""

from __future__ import annotations

import json

import pytest
from bus_talk import Serving, both, raw
from dbus_next import Variant
from dbus_next.constants import MessageType

from virtfabric.dbus.names import (
    INTROSPECTABLE,
    JOB,
    MANAGER,
    MANAGER_INTERFACE,
    PROPERTIES,
    ROOT,
    job_path,
)
from virtfabric.model.errors import (
    Reason,
    RefusedError,
    VirtfabricError,
)

REGION = {"window": "decoder0.0", "memdevs": "0x100"}
ARGUMENTS = {
    "CreateRegion": (REGION,),
    "PlanRegion": (REGION,),
    "DestroyRegion": ("region0",),
    "PlanRegionEnd": ("region0",),
    "ReleaseMemory": ("0x100",),
    "ShowCard": ("C-1",),
    "TrustCard": ("C-1",),
    "CreateSlices": ("version = 1", {"guest": "db"}),
    "PlanSlices": ("version = 1", {"guest": "db"}),
    "DestroySlice": ("aes",),
    "PlanSliceEnd": ("aes",),
    "ProgramSlice": ("aes", "/x/aes.img"),
    "ReclaimMemory": ({"node": "1", "detach": "yes"},),
    "PlanReclaim": ({"node": "1"},),
    "ReleaseDevice": ("0000:3b:10.1",),
    "ShowPolicy": ("db",),
    "SetPolicy": ("db", {"priority": "80"}),
    "PlanPolicy": ("db", {"device:net.vf": "2"}),
    "ClearPolicy": ("db",),
    "ListPorts": ("db",),
    "AddPorts": ("db", 2),
    "Allocate": ("db", {"cpu": "+1"}),
    "Plan": ("db", {"cpu": "+1"}),
    "Release": ("g1",),
    "Explain": ("r1",),
    "Audit": (12.5, "r1"),
    "VerifyAudit": ("",),
}


def test_every_method_is_reachable_and_answers_what_the_agent_says(agent, bus, little):
    with both(agent, bus) as client:
        answers = {
            method.name: client.call(method.name, *ARGUMENTS.get(method.name, ()))
            for method in MANAGER_INTERFACE.methods
        }
    assert answers["GetHost"] == little.HOST
    assert answers["ListGuests"] == little.GUESTS
    assert answers["Plan"] == little.PLAN
    assert answers["ListDevices"] == [little.DEVICE]
    assert answers["GetMemory"] == little.MEMORY
    assert answers["ListCards"] == [little.CARD]
    assert answers["ListSlices"] == answers["ShowCard"]["slice_list"] == [little.SLICE]
    assert answers["TrustCard"] == answers["ShowCard"]
    assert answers["PlanSlices"]["options"] == {"guest": "db"}
    assert answers["PlanSliceEnd"]["slice"] == "aes"
    assert answers["Audit"][0]["body"] == {"since": 12.5, "subject": "r1"}
    assert answers["Health"]["generation"] == 17
    titles = {j["id"]: j["title"] for j in answers["ListJobs"]}
    assert titles[answers["Allocate"]] == "allocation for db"
    assert titles[answers["Release"]] == "release"
    assert titles[answers["RepairDrift"]] == "repair"
    assert titles[answers["CreateRegion"]] == "region"
    assert titles[answers["CreateSlices"]] == "slice aes"
    assert titles[answers["DestroySlice"]] == "end of slice aes"
    assert titles[answers["ProgramSlice"]] == "image for aes"
    assert titles[answers["DestroyRegion"]] == "end of region0"
    assert answers["PlanRegion"]["wants"] == REGION
    assert answers["PlanRegionEnd"]["region"] == "region0"
    assert titles[answers["ReclaimMemory"]] == "called home"
    assert answers["PlanReclaim"]["wants"] == {"node": "1"}
    assert {c.uid for c in agent.callers} == {0}
    assert all(c.pid > 0 for c in agent.callers)


def test_properties_of_the_manager(agent, bus):
    with Serving(agent, bus):
        every = raw(bus, ROOT, PROPERTIES, "GetAll", "s", [MANAGER]).body[0]
        one = raw(bus, ROOT, PROPERTIES, "Get", "ss", [MANAGER, "Generation"]).body[0]
    assert {n: v.value for n, v in every.items()} == {
        "Version": "0.1.0", "Generation": 17, "Connected": True,
    }  # fmt: skip
    assert one == Variant("t", 17)


def test_introspection_shows_the_whole_api(agent, bus):
    with Serving(agent, bus):
        top, org, root, jobs = (
            raw(bus, path, INTROSPECTABLE, "Introspect").body[0]
            for path in ("/", "/org", ROOT, f"{ROOT}/job")
        )
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
    with both(agent, bus) as client, pytest.raises(RefusedError, match=words) as caught:
        client.call(member, *args)
    assert caught.value.refusal.reason is reason
    if reason is Reason.NO_CAPACITY:
        assert caught.value.refusal.would_fit == {"cpu": 1000}
        assert caught.value.refusal.considered == ("web",)


def test_error_names_and_text_are_the_published_ones(agent, bus):
    with Serving(agent, bus):
        no = raw(bus, ROOT, MANAGER, "Allocate", "sa{ss}", ["db", {"cpu": "+64"}])
        defect = raw(bus, ROOT, MANAGER, "Explain", "s", ["defect"])
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
    with Serving(agent, bus):
        reply = raw(bus, path, interface, member, signature, body)
    assert reply.error_name == f"org.freedesktop.DBus.Error.{error}"
    assert "Traceback" not in "".join(reply.body)
    assert ".py" not in "".join(reply.body)
    assert agent.callers == []


def test_an_unknown_job_is_an_unknown_id(agent, bus):
    with Serving(agent, bus):
        names = [
            raw(bus, job_path("gone"), *call).error_name
            for call in ((JOB, "Cancel"), (PROPERTIES, "GetAll", "s", [JOB]))
        ]
    assert names == ["org.virtfabric1.Error.UnknownId"] * 2


def test_the_client_knows_only_the_api(agent, bus):
    with both(agent, bus) as client, pytest.raises(VirtfabricError, match="not in the API"):
        client.call("Explode")
