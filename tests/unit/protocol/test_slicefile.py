"""Slice files: what they mean, and errors that name the field."""

import textwrap

import pytest
from hypothesis import given, settings
from wire_data import specs

from virtfabric.model.adapter import SliceSpec
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import GIB, MIB, Bytes
from virtfabric.protocol import slicefile
from virtfabric.protocol.adapterforms import form_of_spec, read_spec
from virtfabric.protocol.fields import Fields
from virtfabric.protocol.slicefile import parse_adapter, parse_slices


def text(body):
    return f"version = 1\n{body}"


def test_the_example_of_the_documentation():
    example = slicefile.__doc__.split("\n\n", 1)[1]
    (spec,) = parse_slices(textwrap.dedent(example))
    assert spec == SliceSpec(
        name="aes-for-db", cores=2, memory=Bytes(512 * MIB), lanes=4, capability="crypto.aes",
        units=1, keys=1, priority=70, bandwidth=10_000, reclaimable=True,
    )  # fmt: skip


def test_what_is_left_out_has_its_default():
    (spec,) = parse_slices(text("[[slice]]\ncores = 1"))
    assert spec == SliceSpec(cores=1)
    (spec,) = parse_slices(text('[[slice]]\ncapability = "crypto.aes"'))
    assert spec.units == 1
    (spec,) = parse_slices(text('[[slice]]\nmemory = "1.5MiB"'))
    assert spec.memory == 2 * MIB, "memory is protected by the MiB"


@given(specs())
@settings(max_examples=50, deadline=None)
def test_a_slice_comes_back_from_its_form(spec):
    assert read_spec(Fields(form_of_spec(spec))) == spec.check()


def test_several_slices_in_a_file():
    found = parse_slices(text('[[slice]]\nname="a"\ncores=1\n[[slice]]\nname="b"\nlanes=4'))
    assert [spec.name for spec in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("", "slice"),
        ("slice = []", "slice"),
        ("slice = 1", "slice"),
        ("[[slice]]\ncores = 1\n[more]", "more"),
        ("[[slice]]", "slice[0].cores"),
        ("[[slice]]\ncores = -1", "slice[0].cores"),
        ("[[slice]]\ncores = 1.5", "slice[0].cores"),
        ('[[slice]]\ncores = "2"', "slice[0].cores"),
        ("[[slice]]\ncores = 1\n[[slice]]\ncores = 1\nlanes = 3", "slice[1].lanes"),
        ('[[slice]]\nmemory = "much"', "slice[0].memory"),
        ("[[slice]]\nmemory = -5", "slice[0].memory"),
        ("[[slice]]\ncores = 1\ncontiguous = 1", "slice[0].contiguous"),
        ('[[slice]]\ncapability = "Crypto AES"', "slice[0].capability"),
        ("[[slice]]\nunits = 1", "slice[0].capability"),
        ('[[slice]]\ncores = 1\ncapability = "crypto.aes"\nunits = 0', "slice[0].units"),
        ("[[slice]]\ncores = 1\nkeys = 0", "slice[0].keys"),
        ("[[slice]]\ncores = 1\n[slice.qos]\npriority = 101", "slice[0].qos.priority"),
        ("[[slice]]\ncores = 1\n[slice.qos]\nbandwidth = -1", "slice[0].qos.bandwidth"),
        ("[[slice]]\ncores = 1\n[slice.qos]\nreclaimable = 0", "slice[0].qos.reclaimable"),
        ("[[slice]]\ncores = 1\nqos = 1", "slice[0].qos"),
        ("[[slice]]\ncorse = 1", "slice[0].corse"),
        ('[[slice]]\nname="a"\ncores=1\n[[slice]]\nname="a"\ncores=1', "slice.name"),
    ],
)
def test_the_error_names_the_field(body, field):
    with pytest.raises(InvalidValueError) as caught:
        parse_slices(text(body))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("whole", "field"),
    [
        ("[[slice]]\ncores = 1", "version"),
        ("version = 2\n[[slice]]\ncores = 1", "version"),
        ("version = ", "file"),
        ("a = " + "[" * 5000, "file"),
        ("#" * (1 << 21), "file"),
    ],
)
def test_the_file_itself(whole, field):
    with pytest.raises(InvalidValueError) as caught:
        parse_slices(whole)
    assert caught.value.field == field


def test_a_wrong_word_is_told_the_right_one():
    with pytest.raises(InvalidValueError) as caught:
        parse_slices(text("[[slice]]\ncores = 1\n[slice.qos]\npriorty = 1"))
    assert caught.value.advice == "did you mean priority?"


ADAPTER = """
[adapter]
serial = "C-1"
cores = 16
memory = "16GiB"
lanes = 16
keys = 15
bandwidth = 100000
site = "node:0"
[adapter.accelerators]
"crypto.aes" = 4
"""


def test_an_adapter_file():
    adapter = parse_adapter(text(ADAPTER))
    assert adapter.memory == 16 * GIB
    assert adapter.accelerators == {"crypto.aes": 4}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("cores = 16", "cores = 4096", "adapter.cores"),
        ("keys = 15\n", "", "adapter.keys"),
        ('"crypto.aes" = 4', '"Crypto" = 4', "adapter.accelerators"),
        ('"crypto.aes" = 4', '"crypto.aes" = "x"', "adapter.accelerators.crypto.aes"),
        ('serial = "C-1"', 'serial = "C-1"\ncolour = 1', "adapter.colour"),
    ],
)
def test_a_wrong_adapter_file(old, new, field):
    assert old in ADAPTER
    with pytest.raises(InvalidValueError) as caught:
        parse_adapter(text(ADAPTER.replace(old, new)))
    assert caught.value.field == field
