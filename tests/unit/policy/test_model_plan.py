"""Steps as data: their encoding, their undo, and what the journal's reader refuses."""

import json

import pytest
from host_data import guest_id
from hypothesis import given
from hypothesis import strategies as st

from virtfabric.model.cxl import Serial
from virtfabric.model.cxlsteps import CreateRegion, MemoryUse, OnlineMemory, RegionPresence
from virtfabric.model.device import VFIO_PCI, Found, PciAddress
from virtfabric.model.devicesteps import SetProfile
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ids import HOST_ITSELF, RequestId
from virtfabric.model.mark import MarkedPin, PinMark
from virtfabric.model.plan import (
    STEP_TYPES,
    Definition,
    MarkPins,
    Offer,
    PinEmulator,
    PinVcpu,
    Plan,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetShares,
    SetVcpuCount,
    parse_step,
)
from virtfabric.model.profile import Profile, ProfileFile
from virtfabric.model.step import Step
from virtfabric.model.units import CpuSet

who = {"guest": st.integers(0, 9).map(guest_id), "name": st.text(max_size=8)}
who["optional"] = st.booleans()
amount = st.integers(0, 1 << 44)
cpus = st.frozensets(st.integers(0, 300), min_size=1).map(CpuSet)
entries = st.builds(MarkedPin, st.none() | st.integers(0, 512), cpus, cpus | st.just(CpuSet()))
marks = st.lists(entries, max_size=4).map(lambda found: PinMark(tuple(found)))
seconds = st.floats(0.1, 600)
serials = st.integers(1, (1 << 64) - 1).map(Serial)
where = {
    "window": st.integers(0, (1 << 52) - 1),
    "members": st.lists(serials, min_size=1, max_size=16).map(tuple),
}


def built(kind, values, **more):
    return st.builds(kind, **who, before=values, after=values, **more)


steps = st.one_of(
    built(ResizeVirtioMem, amount, alias=st.text(min_size=1), deadline_s=seconds, tolerance=amount),
    built(SetBalloon, amount, deadline_s=seconds, tolerance=amount),
    built(SetVcpuCount, st.integers(1, 512), deadline_s=seconds),
    built(PinVcpu, cpus, vcpu=st.integers(0, 512)),
    built(PinEmulator, cpus),
    built(SetQuota, st.integers(-1, 10**6)),
    built(SetShares, st.integers(1, 10**4)),
    built(SetNodeset, cpus),
    built(MarkPins, marks),
    built(SetPolicy, st.text(), definition=st.sampled_from(Definition)),
    built(
        CreateRegion,
        st.sampled_from(RegionPresence),
        **where,
        deadline_s=seconds,
        size=amount,
        granularity=amount,
    ),
    built(OnlineMemory, st.sampled_from(MemoryUse), **where, deadline_s=seconds),
    built(
        SetProfile,
        st.text(),
        address=st.just(PciAddress("0000:3b:10.1")),
        file=st.from_regex(r"n[A-Za-z0-9_-]*/[A-Za-z0-9_-]+", fullmatch=True).map(ProfileFile),
    ),
)


@given(steps)
def test_steps_survive_the_journal(step):
    text = json.dumps(step.to_json())
    read = parse_step(json.loads(text))
    assert read == step
    assert type(read) is type(step)
    assert type(read.before) is type(step.before)
    assert getattr(read, "file", None).__class__ is getattr(step, "file", None).__class__


@given(steps)
def test_undo_exchanges_before_and_after_and_nothing_else(step):
    back = step.inverse()
    assert (back.before, back.after) == (step.after, step.before)
    assert back.inverse() == step
    assert parse_step(back.to_json()) == back


@given(steps)
def test_every_step_describes_itself_with_its_guest(step):
    assert str(step).startswith(f"{step.name}: ")
    assert "CpuSet(" not in str(step)


def below(kind):
    """All subclasses, at any depth."""
    return {one for t in kind.__subclasses__() for one in (t, *below(t))}


def test_every_step_type_is_registered_and_versioned():
    # by kind: `slots=True` makes each class twice, and the first ones stay listed
    assert set(STEP_TYPES) == {t.kind for t in below(Step) if t.kind}
    assert all(t.kind == kind and t.version >= 1 for kind, t in STEP_TYPES.items())


REGION = {
    "kind": "create-region", "version": 1, "guest": "00000000-0000-0000-0000-000000000000",
    "name": "host", "optional": False, "window": "0x150000000", "members": ["0x100", "0x101"],
    "size": 536870912, "granularity": 256, "deadline_s": 60.0, "before": "absent",
    "after": "present",
}  # fmt: skip
"""What version 1 of the encoding is, for good: journals of an older agent hold it."""
MEMORY = {
    "kind": "online-memory", "version": 1, "guest": "00000000-0000-0000-0000-000000000000",
    "name": "host", "optional": False, "window": "0x150000000", "members": ["0x100"],
    "deadline_s": 30.0, "before": "movable", "after": "offline",
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "encoding", "text"),
    [
        (
            CreateRegion(
                window=0x150000000, members=(Serial(0x100), Serial(0x101)), size=512 << 20,
                before=RegionPresence.ABSENT, after=RegionPresence.PRESENT,
            ),
            REGION,
            "host: create CXL region of 0x100, 0x101 in window 0x150000000, 512MiB",
        ),
        (
            OnlineMemory(
                window=0x150000000, members=(Serial(0x100),), deadline_s=30.0,
                before=MemoryUse.MOVABLE, after=MemoryUse.OFFLINE,
            ),
            MEMORY,
            "host: memory of CXL region of 0x100 in window 0x150000000 movable -> offline",
        ),
    ],
)  # fmt: skip
def test_golden_encodings_of_region_steps(step, encoding, text):
    assert json.loads(json.dumps(step.to_json())) == encoding
    assert parse_step(encoding) == step
    assert str(step) == text
    assert step.guest == HOST_ITSELF


PROFILE = {
    "kind": "set-profile", "version": 1, "guest": str(guest_id(1)), "name": "web",
    "optional": False, "address": "0000:3b:10.1", "file": "nvidia/current_vgpu_type",
    "before": "0", "after": "1155",
}  # fmt: skip


def test_golden_encoding_of_a_profile():
    step = SetProfile(
        guest=guest_id(1), name="web", address=PciAddress("0000:3b:10.1"),
        file=ProfileFile("nvidia/current_vgpu_type"), before="0", after="1155",
    )  # fmt: skip
    assert json.loads(json.dumps(step.to_json())) == PROFILE
    assert parse_step(PROFILE) == step
    assert str(step) == "web: 0000:3b:10.1 profile nvidia/current_vgpu_type 0 -> 1155"


FOUND = {
    "driver": "", "settings": "vlan=0", "siblings": {"0000:3b:10.2": "igbvf"}, "port": None,
    "speed": 0, "fatal_errors": 3,
}  # fmt: skip
"""As an agent before profiles wrote it."""


def test_the_way_back_survives_the_journal_and_comes_from_older_ones():
    old = Found.from_json(FOUND)
    assert (old.profile, old.vfio_driver, old.fatal_errors) == (None, VFIO_PCI, 3)
    profile = {"file": "nvidia/current_vgpu_type", "value": "1155", "none": "0"}
    data = FOUND | {"profile": profile, "vfio_driver": "nvidia"}
    found = Found.from_json(data)
    assert json.loads(json.dumps(found.to_json())) == data
    assert found.profile == Profile(ProfileFile("nvidia/current_vgpu_type"), "1155", "0")
    assert type(found.profile.file) is ProfileFile
    with pytest.raises(InvalidValueError, match="leads out"):
        Found.from_json(data | {"profile": profile | {"file": "driver/unbind"}})


GOOD = PinVcpu(guest=guest_id(1), vcpu=0, before=CpuSet((1,)), after=CpuSet((2,))).to_json()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "reboot"}, "step.kind"),
        ({"kind": None}, "step.kind"),
        ({"version": 99}, "step.version"),
        ({"before": 3}, "step.before"),
        ({"after": None}, "step.after"),
        ({"after": "two"}, "step.after"),
        ({"guest": "web"}, "step.guest"),
        ({"kind": "set-quota"}, "step.before"),
        ({"kind": "mark-pins", "before": "first=2"}, "step.before"),
        ({"kind": "set-policy"}, "step.definition"),
        ({"kind": "set-policy", "definition": "other"}, "step.definition"),
        ({"kind": "set-policy", "definition": "live", "after": 3}, "step.after"),
        (PROFILE | {"file": "driver/unbind"}, "step.file"),
        (PROFILE | {"file": "config"}, "step.file"),
        (PROFILE | {"before": 0}, "step.before"),
        (PROFILE | {"address": "3b"}, "step.address"),
        (REGION | {"members": []}, "step.members"),
        (REGION | {"members": ["mem0"]}, "step.members"),
        (REGION | {"members": ["0x0"]}, "step.members"),
        (REGION | {"window": "decoder0.0"}, "step.window"),
        (REGION | {"after": "mounted"}, "step.after"),
        (REGION | {"kind": "online-memory"}, "step.before"),
    ],
)
def test_what_the_journal_cannot_hold_is_refused_by_field(change, field):
    with pytest.raises(InvalidValueError) as caught:
        parse_step({**GOOD, **change})
    assert caught.value.field == field


def test_an_incomplete_step_is_refused():
    with pytest.raises(InvalidValueError, match="incomplete"):
        parse_step({k: v for k, v in GOOD.items() if k != "vcpu"})


def test_a_plan_names_its_guests():
    one, two = guest_id(1), guest_id(2)
    plan = Plan(
        RequestId("r"), 3,
        (
            SetQuota(guest=two, before=-1, after=500),
            SetQuota(guest=one, before=-1, after=500),
            SetShares(guest=one, before=100, after=50),
        ),
    )  # fmt: skip
    assert plan.guests == {one, two}
    assert Offer(one, (1, 2), (0, 1), "because", chosen=True).to_json() == {
        "guest": one, "order": [1, 2], "cost": [0, 1], "why": "because", "chosen": True,
    }  # fmt: skip
