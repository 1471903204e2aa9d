"""Quantities, CPU sets and amounts: what they read, print and refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key, node_locality
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.ids import GuestId
from virtfabric.model.units import GIB, KIB, MAX_BYTES, MIB, Bytes, CpuSet, MilliCpu

numbers = st.frozensets(st.integers(0, 300))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("512MiB", 512 * MIB), ("512M", 512 * MIB), ("4G", 4 * GIB), ("4 gib", 4 * GIB),
        ("1.5GiB", 3 * GIB // 2), ("64KiB", 64 * KIB), ("1KB", 1000), ("1048576", MIB),
        ("1024T", MAX_BYTES),
    ],
)  # fmt: skip
def test_sizes_are_read(text, value):
    assert Bytes.parse(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1X", "one", "1..5G", "1.5.5", "2000T", "9" * 20, "٣"])
def test_bad_sizes_name_field_and_value(text):
    with pytest.raises(InvalidValueError) as caught:
        Bytes.parse(text, field="memory.limit")
    assert caught.value.field == "memory.limit"
    assert caught.value.value == text


@given(st.integers(0, 1 << 50))
def test_sizes_print_what_reads_back_as_the_same(value):
    assert Bytes.parse(str(Bytes(value))) == value


@pytest.mark.parametrize(
    ("value", "exact", "in_table"),
    [
        (1025 * KIB, "1025KiB", "1025KiB"),
        (1088 * MIB, "1088MiB", "1088MiB"),
        (3 * GIB // 2, "1.5GiB", "1.5GiB"),
        (5 * GIB // 4, "1.25GiB", "1.25GiB"),
        (-5 * GIB // 4, "-1.25GiB", "-1.25GiB"),
        (16 * GIB - 4 * KIB, "16777212KiB", "~16GiB"),
        (33570009088, "32783212KiB", "~31.3GiB"),
        (GIB - 1, "1073741823B", "~1024MiB"),
        (1023, "1023B", "1023B"),
        (0, "0B", "0B"),
    ],
)
def test_sizes_are_exact_but_for_tables_which_say_so(value, exact, in_table):
    assert str(Bytes(value)) == exact
    assert Bytes(value).rounded() == in_table


@given(st.integers(0, 1 << 44))
def test_a_rounded_size_says_so_and_is_short(value):
    text = Bytes(value).rounded()
    assert len(text) <= 11
    if not text.startswith("~"):
        assert Bytes.parse(text) == value
    else:
        assert abs(Bytes.parse(text[1:]) - value) <= value * 0.05


@given(st.integers(0, 1023), st.sampled_from([KIB, MIB, GIB]))
def test_whole_units_print_exactly(count, unit):
    assert Bytes.parse(str(Bytes(count * unit))) == count * unit


@pytest.mark.parametrize(
    ("text", "milli", "whole"),
    [("2", 2000, 2), ("0.5", 500, 1), ("500m", 500, 1), ("1.25", 1250, 2), ("0", 0, 0)],
)
def test_cpu_amounts_are_read(text, milli, whole):
    assert MilliCpu.parse(text) == milli
    assert MilliCpu(milli).whole == whole


@pytest.mark.parametrize("text", ["", "-1", "1.2345", "m", "1e3", "9000", "+1"])
def test_bad_cpu_amounts_are_refused(text):
    with pytest.raises(InvalidValueError, match=r"cpu\.limit"):
        MilliCpu.parse(text, field="cpu.limit")


@given(st.integers(0, 8192 * 1000))
def test_cpu_amounts_round_trip(milli):
    # `%g` keeps six digits: exact up to 1000 CPUs, which is where it is read again
    if milli < 1_000_000:
        assert MilliCpu.parse(str(MilliCpu(milli))) == milli


@given(numbers)
def test_cpu_sets_round_trip(chosen):
    cpus = CpuSet(chosen)
    assert CpuSet.parse(str(cpus)) == cpus
    assert list(cpus) == sorted(chosen)
    assert cpus.sorted() == sorted(chosen)
    assert hash(cpus) == hash(frozenset(chosen))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("0-3,8", "0-3,8"),
        ("8,3,2,1,0", "0-3,8"),
        ("0-7,^3", "0-2,4-7"),
        ("", ""),
        (" 1 , 2", "1-2"),
    ],
)
def test_cpu_lists_as_kernel_and_libvirt_write_them(text, printed):
    assert str(CpuSet.parse(text)) == printed


@pytest.mark.parametrize("text", ["a", "1-", "3-1", "70000", "1;2", "-1", "0x3"])
def test_bad_cpu_lists_are_refused(text):
    with pytest.raises(InvalidValueError) as caught:
        CpuSet.parse(text, field="capacity.cpus")
    assert caught.value.field == "capacity.cpus"


vectors = st.dictionaries(
    st.sampled_from([Key(CPU), Key(MEMORY), Key(MEMORY, node_locality(1))]),
    st.integers(-(10**6), 10**6),
).map(Amounts)


@given(vectors, vectors)
def test_amounts_are_a_vector_space_without_zeros(a, b):
    assert a + b - b == a
    assert a + -a == Amounts()
    assert not a - a
    assert hash(a + b) == hash(b + a)
    assert all((a + b).values())
    assert a.positive().fits_in(a.positive() + b.positive())


@given(vectors)
def test_amounts_round_trip(amounts):
    assert Amounts.from_json(amounts.to_json()) == amounts


def test_guest_ids_are_canonical_uuids():
    text = "6F1B0C1E-1111-4222-8333-0123456789AB"
    assert GuestId.parse(text) == text.lower()
    assert GuestId.parse(text).short == "6f1b0c1e"
    with pytest.raises(InvalidValueError, match="is not a UUID"):
        GuestId.parse("web-1")
