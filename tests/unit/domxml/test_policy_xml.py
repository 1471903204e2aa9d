from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from virtfabric.domxml.policy import (
    bare_policy,
    format_bare_policy,
    format_policy,
    parse_bare_policy,
    parse_policy,
)
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.policy import (
    Admission,
    CpuPolicy,
    DevicePolicy,
    DriftAction,
    Escalation,
    Growth,
    GuestPolicy,
    MemoryPolicy,
    Placement,
    Smt,
)
from virtfabric.model.units import GIB, MIB, Bytes, MilliCpu

HEAD = '<virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1"'
EXAMPLE = (
    HEAD + ' priority="80" admission="strict" drift="repair">'
    '<cpu reservation="1" limit="4" shares="100" placement="dedicated" smt="require"/>'
    '<memory reservation="512MiB" limit="4GiB" tiers="dram,cxl"/>'
    '<device capability="net.vf" count="2" reclaimable="yes"/></virtfabric:policy>'
)
POLICY = GuestPolicy(
    priority=80,
    admission=Admission.STRICT,
    drift=DriftAction.REPAIR,
    cpu=CpuPolicy(MilliCpu(1000), MilliCpu(4000), 100, Placement.DEDICATED, Smt.REQUIRE),
    memory=MemoryPolicy(Bytes(512 * MIB), Bytes(4 * GIB), 100, ("dram", "cxl")),
    devices=(DevicePolicy("net.vf", 2, reclaimable=True),),
)
GOLDEN = """\
<virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1" priority="80" \
admission="strict" drift="repair">
  <cpu reservation="1" limit="4" shares="100" placement="dedicated" smt="require"/>
  <memory reservation="512MiB" limit="4GiB" shares="100" tiers="dram,cxl"/>
  <device capability="net.vf" count="2" reclaimable="yes"/>
</virtfabric:policy>"""


def test_reads_the_example() -> None:
    assert parse_policy(EXAMPLE) == POLICY


def test_writes_the_golden_form() -> None:
    assert format_policy(POLICY) == GOLDEN


def test_what_is_left_out_has_the_default() -> None:
    assert parse_policy(HEAD + "/>") == GuestPolicy()


def test_children_may_carry_the_namespace_as_libvirt_writes_them() -> None:
    assert parse_policy(EXAMPLE.replace("<cpu ", "<virtfabric:cpu ")) == POLICY
    text = EXAMPLE.replace("virtfabric:policy xmlns:virtfabric", "policy xmlns")
    assert parse_policy(text.replace("</virtfabric:policy>", "</policy>")) == POLICY


def test_bare_form_declares_no_namespace() -> None:
    element = etree.fromstring(format_bare_policy(POLICY))
    assert element.tag == "policy"
    assert element.nsmap == {}
    assert [child.tag for child in element] == ["cpu", "memory", "device"]


def test_canonical_form_is_the_same_however_libvirt_writes_it() -> None:
    bare = format_bare_policy(POLICY)
    prefixed = format_policy(POLICY)
    element = etree.fromstring(prefixed)
    etree.indent(element, "        ")
    indented = etree.tostring(element, encoding="unicode")
    assert indented != prefixed
    for form in (prefixed, indented, bare):
        assert bare_policy(form) == bare
    assert parse_bare_policy(bare) == POLICY


def test_canonical_form_keeps_what_is_not_valid() -> None:
    """An undo brings back what somebody wrote, also where we cannot read it."""
    text = bare_policy(
        HEAD + ' extra="1"><cpu>word</cpu><o:odd xmlns:o="urn:o"/></virtfabric:policy>'
    )
    assert 'extra="1"' in text
    assert "<cpu>word</cpu>" in text
    assert "urn:o" in text
    assert bare_policy(text) == text


amounts = st.integers(min_value=0, max_value=1 << 48)
cpus = st.integers(min_value=0, max_value=8_192_000)


@given(
    cpu=st.tuples(cpus, cpus).map(sorted),
    memory=st.tuples(amounts, amounts).map(sorted),
    priority=st.integers(0, 100),
    shares=st.integers(1, 10_000),
    limited=st.booleans(),
    escalate=st.sampled_from(Escalation),
    growth=st.sampled_from(Growth),
)
def test_round_trip(
    cpu: list[int],
    memory: list[int],
    priority: int,
    shares: int,
    limited: bool,
    escalate: Escalation,
    growth: Growth,
) -> None:
    policy = GuestPolicy(
        priority=priority,
        cpu=CpuPolicy(MilliCpu(cpu[0]), MilliCpu(cpu[1]) if limited else None, shares),
        memory=MemoryPolicy(
            Bytes(memory[0]), Bytes(memory[1]) if limited else None, shares,
            escalate=escalate, growth=growth,
        ),
    )  # fmt: skip
    assert parse_policy(format_policy(policy)) == policy


@pytest.mark.parametrize(
    ("old", "new", "field", "value"),
    [
        ('priority="80"', 'priority="101"', "policy.priority", "101"),
        ('priority="80"', 'priority="-1"', "policy.priority", "-1"),
        ('priority="80"', 'priority="high"', "policy.priority", "high"),
        ('version="1"', 'version="2"', "policy.version", "2"),
        ('version="1"', "", "policy.version", None),
        ('"strict"', '"maybe"', "policy.admission", "maybe"),
        ('"repair"', '"break"', "policy.drift", "break"),
        ('limit="4"', 'limit="0.5"', "cpu.limit", "0.5"),
        ('reservation="1"', 'reservation="-1"', "cpu.reservation", "-1"),
        ('reservation="1"', 'reservation="one"', "cpu.reservation", "one"),
        ('shares="100"', 'shares="0"', "cpu.shares", "0"),
        ('shares="100"', 'shares="10001"', "cpu.shares", "10001"),
        ('"dedicated"', '"mine"', "cpu.placement", "mine"),
        ('"require"', '"maybe"', "cpu.smt", "maybe"),
        ("512MiB", "512XiB", "memory.reservation", "512XiB"),
        ("512MiB", "9999TiB", "memory.reservation", "9999TiB"),
        ("4GiB", "4MiB", "memory.limit", "4MiB"),
        ("dram,cxl", "dram,tape", "memory.tiers", "dram,tape"),
        ('tiers="dram,cxl"', 'escalate="kill"', "memory.escalate", "kill"),
        ('tiers="dram,cxl"', 'growth="wild"', "memory.growth", "wild"),
        ("net.vf", "Net", "device.capability", "Net"),
        ("net.vf", "net", "device.capability", "net"),
        ("net.vf", "n." + "v" * 63, "device.capability", "n." + "v" * 63),
        ("<device ", '<device capability="net.vf"/><device ', "device.capability", "net.vf"),
        ('count="2"', 'count="0"', "device.count", "0"),
        ('reclaimable="yes"', 'reclaimable="perhaps"', "device.reclaimable", "perhaps"),
        ("<cpu ", '<cpu colour="red" ', "cpu.colour", "red"),
        ("<device ", "<gadget ", "policy", "<gadget>"),
        ("<device ", '<cpu limit="1"/><device ', "policy", "<cpu>"),
        ("urn:virtfabric:policy:1", "urn:virtfabric:policy:9", "policy", None),
    ],
)
def test_an_error_names_the_field_and_the_value(
    old: str, new: str, field: str, value: str | None
) -> None:
    text = EXAMPLE.replace(old, new, 1)
    assert text != EXAMPLE
    with pytest.raises(InvalidValueError) as error:
        parse_policy(text)
    assert error.value.field == field
    if value is not None:
        assert error.value.value == value


@pytest.mark.parametrize("text", ["", "<a", "plain", "<a/><b/>", "\x00", "<a>&nope;</a>"])
def test_broken_xml_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        parse_policy(text)
    assert error.value.field == "policy"


def test_entities_and_doctypes_are_refused() -> None:
    bomb = '<!DOCTYPE p [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + EXAMPLE
    with pytest.raises(InvalidValueError, match="DOCTYPE"):
        parse_policy(bomb)
