from __future__ import annotations

import pytest
from lxml import etree

from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.filter import replace_placement
from virtfabric.domxml.mark import format_bare_mark, parse_mark, put_mark
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.guest import MemoryMechanism, NumaMode, RunState, VirtioMem
from virtfabric.model.mark import NO_MARK, PinMark
from virtfabric.model.units import MIB, Bytes, CpuSet

LIVE = """\
<?xml version="1.0" encoding="UTF-8"?>
<domain type='qemu' id='1'>
  <name>g0</name>
  <uuid>2EEB61F3-6e1e-4024-ae92-5f1ae9c07760</uuid>
  <metadata>
    <virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1" priority="9"/>
  </metadata>
  <maxMemory slots='1' unit='KiB'>425984</maxMemory>
  <memory unit='KiB'>425984</memory>
  <currentMemory unit='KiB'>425984</currentMemory>
  <vcpu placement='static' current='2'>4</vcpu>
  <cputune>
    <shares>2048</shares>
    <global_period>100000</global_period>
    <global_quota>150000</global_quota>
    <vcpupin vcpu='0' cpuset='1'/>
    <vcpupin vcpu='3' cpuset='0'/>
    <emulatorpin cpuset='0'/>
  </cputune>
  <numatune>
    <memory mode='restrictive' nodeset='0-1'/>
  </numatune>
  <cpu mode='maximum'>
    <numa>
      <cell id='0' cpus='0-3' memory='163840' unit='KiB'/>
    </numa>
  </cpu>
  <devices>
    <memballoon model='none'/>
    <memory model='virtio-mem'>
      <target>
        <size unit='KiB'>262144</size>
        <node>0</node>
        <block unit='KiB'>2048</block>
        <requested unit='KiB'>131072</requested>
        <current unit='KiB'>65536</current>
      </target>
      <alias name='virtiomem0'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </memory>
  </devices>
</domain>
"""
POLICY = """\
    <virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1" priority="9"/>
"""
MARK = """\
    <placement:pins xmlns:placement="urn:virtfabric:placement:1">
      <placement:pin vcpu='0' cpuset='1'/>
      <placement:pin vcpu='3' cpuset='0'/>
      <placement:emulator cpuset='0'/>
    </placement:pins>
"""
MARKED = LIVE.replace(POLICY, POLICY + MARK)
BALLOON = """\
<domain type='kvm'>
  <name>g1</name>
  <uuid>6862b719-3b4b-4426-93ed-fb014d9db8cd</uuid>
  <memory unit='MiB'>160</memory>
  <currentMemory unit='MiB'>120</currentMemory>
  <vcpu cpuset='0-3,^2'>2</vcpu>
  <devices>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""


def test_reads_a_live_guest() -> None:
    guest = parse_domain(LIVE, LIVE.replace("cpuset='1'", "cpuset='7'"))
    assert guest.uuid == "2eeb61f3-6e1e-4024-ae92-5f1ae9c07760"
    assert (guest.name, guest.state, guest.persistent) == ("g0", RunState.RUNNING, True)
    assert (guest.vcpus_online, guest.vcpus_max) == (2, 4)
    assert guest.vcpu_affinity == {0: CpuSet([1]), 1: CpuSet()}
    assert guest.config_pins == {0: CpuSet([7]), 3: CpuSet([0])}
    assert guest.emulator_affinity == CpuSet([0])
    assert guest.scheduler.shares == 2048
    assert guest.scheduler.global_quota == 150_000
    assert (guest.numa_mode, guest.numa_nodes) == (NumaMode.RESTRICTIVE, CpuSet([0, 1]))
    assert guest.config_numa_nodes == CpuSet([0, 1])
    assert guest.policy is not None
    assert guest.policy.priority == 9


def test_virtio_mem_counts_what_is_there() -> None:
    guest = parse_domain(LIVE, None)
    assert guest.mechanism is MemoryMechanism.VIRTIO_MEM
    assert guest.virtio_mem == (
        VirtioMem(
            "virtiomem0", 0, Bytes(256 * MIB), Bytes(2 * MIB), Bytes(128 * MIB), Bytes(64 * MIB)
        ),
    )
    assert guest.boot_memory == 160 * MIB
    assert guest.memory_current == 224 * MIB
    assert guest.memory_max == 416 * MIB


def test_in_a_hook_the_request_counts_as_memory() -> None:
    xml = LIVE.replace("<current unit='KiB'>65536</current>", "")
    xml = xml.replace("<alias name='virtiomem0'/>", "").replace(" id='1'", "")
    guest = parse_domain(xml, None)
    assert guest.virtio_mem[0].alias == ""
    assert guest.memory_current == (160 + 128) * MIB
    assert guest.state is RunState.SHUTOFF
    assert not guest.persistent


def test_memory_is_less_the_devices_where_there_are_no_cells() -> None:
    xml = LIVE.replace("<cell id='0' cpus='0-3' memory='163840' unit='KiB'/>", "")
    assert parse_domain(xml, None).boot_memory == 160 * MIB


def test_balloon_guest() -> None:
    guest = parse_domain(BALLOON, BALLOON)
    assert guest.mechanism is MemoryMechanism.BALLOON
    assert guest.memory_current == 120 * MIB
    assert guest.memory_max == guest.boot_memory == 160 * MIB
    assert guest.vcpu_affinity == dict.fromkeys((0, 1), CpuSet([0, 1, 3]))
    assert guest.policy is None
    assert guest.policy_error == ""


SOURCE = (
    "<source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source>"
)


@pytest.mark.parametrize(
    "device",
    [
        f"<hostdev mode='subsystem' type='pci'>{SOURCE}</hostdev>",
        f"<interface type='hostdev'>{SOURCE}</interface>",
    ],
)
def test_a_passed_through_device_pins_memory(device: str) -> None:
    guest = parse_domain(BALLOON.replace("<devices>", "<devices>" + device), None)
    assert guest.mechanism is MemoryMechanism.FIXED
    assert guest.memory_current == 160 * MIB


def test_no_balloon_is_fixed() -> None:
    guest = parse_domain(BALLOON.replace("model='virtio'", "model='none'"), None)
    assert guest.mechanism is MemoryMechanism.FIXED


def test_named_vcpus_need_not_be_the_first() -> None:
    named = "<vcpus><vcpu id='0' enabled='yes'/><vcpu id='1' enabled='no'/></vcpus>"
    guest = parse_domain(BALLOON.replace("<devices>", named + "<devices>"), None)
    assert guest.vcpus_online == 1


def test_an_invalid_policy_is_told_and_the_guest_is_unmanaged() -> None:
    guest = parse_domain(LIVE.replace('priority="9"', 'priority="900"'), None)
    assert guest.policy is None
    assert not guest.managed
    assert "policy.priority: '900'" in guest.policy_error


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("2EEB61F3", "zzz", "domain.uuid"),
        (">4</vcpu>", ">four</vcpu>", "domain.vcpu"),
        ("current='2'", "current=''", "domain.vcpu.current"),
        ("cpuset='1'", "cpuset='1-'", "vcpupin.cpuset"),
        ("<size unit='KiB'", "<size unit='stone'", "memory.target.size.unit"),
        ("restrictive", "lenient", "numatune.memory.mode"),
        ("<vcpu placement", "<vcpu current='1' placement", "domain XML"),
    ],
)
def test_an_error_names_the_field(old: str, new: str, field: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        parse_domain(LIVE.replace(old, new, 1), None)
    assert error.value.field == field


def test_reads_the_mark_and_skips_what_makes_no_sense_in_it() -> None:
    assert str(parse_domain(MARKED, None).marked_pins) == "0=1 3=0 emulator=0"
    assert parse_domain(LIVE, None).marked_pins == NO_MARK
    for good, bad in (("vcpu='0' c", "vcpu='x' c"), ("vcpu='0' cpuset='1'", "vcpu='0' cpuset='-'")):
        odd = MARKED.replace(f":pin {good}", f":pin {bad}")
        assert str(parse_domain(odd, None).marked_pins) == "3=0 emulator=0"


def test_a_mark_survives_being_written() -> None:
    mark = PinMark.parse("0=2-3/0-7 5=4 emulator=0")
    assert parse_mark(format_bare_mark(mark)) == mark
    assert "xmlns" not in format_bare_mark(mark), "libvirt refuses a namespace of our own"
    root = etree.fromstring(LIVE.encode())
    put_mark(root, mark)
    put_mark(root, mark)
    assert parse_domain(etree.tostring(root, encoding="unicode"), None).marked_pins == mark


def test_filter_replaces_pins_and_keeps_the_rest() -> None:
    done = replace_placement(MARKED, {0: CpuSet([2]), 9: CpuSet([3])}, CpuSet([4]), CpuSet([1]))
    guest = parse_domain(done, done)
    assert guest.config_pins == {0: CpuSet([2])}
    assert guest.emulator_affinity == CpuSet([4])
    assert guest.numa_nodes == CpuSet([1])
    assert guest.scheduler.shares == 2048
    assert guest.policy is not None
    assert str(guest.marked_pins) == "0=2 emulator=4"


def test_filter_strips() -> None:
    done = replace_placement(MARKED, None, None, None)
    assert "vcpupin" not in done
    assert "emulatorpin" not in done
    assert "<shares>2048</shares>" in done
    guest = parse_domain(done, None)
    assert guest.numa_nodes == CpuSet([0, 1])
    assert guest.marked_pins == NO_MARK
    assert guest.policy is not None


def test_filter_leaves_the_operators_pins() -> None:
    assert replace_placement(LIVE, None, None, None).count("pin ") == 3
    moved = MARKED.replace("<vcpupin vcpu='0' cpuset='1'/>", "<vcpupin vcpu='0' cpuset='2'/>")
    pool = dict.fromkeys(range(4), CpuSet([5]))
    done = replace_placement(moved, pool, CpuSet([4]), None)
    guest = parse_domain(done, done)
    assert guest.config_pins == {
        0: CpuSet([2]), 1: CpuSet([5]), 2: CpuSet([5]), 3: CpuSet([5]),
    }  # fmt: skip
    assert str(guest.marked_pins) == "1=5 2=5 3=5 emulator=4"


@pytest.mark.parametrize(
    ("pool", "pinned", "mark"),
    [
        (None, "1-3", ""),  # the operator's again
        ("0-1", "1", "0=1/1-3"),  # inside of it
        ("5-6", "5-6", "0=5-6/1-3"),  # nothing is left of it, as placement has it
        ("0-7", "1-3", ""),
    ],
)
def test_what_our_pin_had_taken_the_place_of_is_a_constraint(
    pool: str | None, pinned: str, mark: str
) -> None:
    xml = MARKED.replace("vcpu='0' cpuset='1'/>", "vcpu='0' cpuset='1' instead='1-3'/>", 1)
    pins = None if pool is None else {0: CpuSet.parse(pool)}
    done = replace_placement(xml, pins, None, None)
    guest = parse_domain(done, done)
    assert guest.config_pins == {0: CpuSet.parse(pinned)}
    assert str(guest.marked_pins) == mark


def test_filter_adds_and_removes_a_whole_cputune() -> None:
    managed = BALLOON.replace("  <memory ", f"  <metadata>\n{POLICY}  </metadata>\n  <memory ")
    pinned = replace_placement(managed, {0: CpuSet([0]), 1: CpuSet([1])}, None, CpuSet([1]))
    assert parse_domain(pinned, pinned).config_pins == {0: CpuSet([0]), 1: CpuSet([1])}
    assert "cputune" not in replace_placement(pinned, None, None, None)


def test_filter_changes_no_line_beside_pins_and_mark() -> None:
    lines = LIVE.splitlines()[1:]
    kept = [line for line in lines if "pin " not in line]
    done = replace_placement(MARKED, None, None, None).replace('"', "'").splitlines()
    assert done == [line.replace('"', "'") for line in kept]


def test_only_domains_are_taken() -> None:
    for read in (lambda x: parse_domain(x, None), lambda x: replace_placement(x, None, None, None)):
        with pytest.raises(InvalidValueError, match="is not a domain"):
            read("<network/>")


def test_free_ports_are_those_with_nothing_behind_them() -> None:
    ports = "".join(f"<controller type='pci' index='{n}' model='pcie-root-port'/>" for n in (1, 2))
    assert parse_domain(LIVE.replace("<devices>", f"<devices>{ports}"), None).free_ports == 1
