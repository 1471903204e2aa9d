"""Memory in parts: cells, DIMMs, virtio-mem devices, and the room for more."""

from __future__ import annotations

import pytest

from virtfabric.domxml.domain import parse_domain
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.guest import FixedMemory, MemoryMechanism, MemoryRoom, NumaMode
from virtfabric.model.units import MIB, Bytes, CpuSet

FRAME = """<domain type='kvm' id='1'><name>g</name>
  <uuid>2eeb61f3-6e1e-4024-ae92-5f1ae9c07760</uuid>{limit}
  <memory unit='MiB'>1408</memory><vcpu>2</vcpu>
  <numatune><memory mode='strict' nodeset='0-1'/>
    <memnode cellid='1' mode='strict' nodeset='2'/></numatune>
  <cpu><numa>{cells}</numa></cpu>
  <devices><memballoon model='none'/>{devices}</devices></domain>"""
LIMIT = "<maxMemory slots='4' unit='MiB'>4096</maxMemory>"
CELLS = """<cell id='0' cpus='0-1' memory='512' unit='MiB'/>
  <cell id='1' memory='256' unit='MiB'/>"""
DIMM = """<memory model='dimm'><source><nodemask>2-3</nodemask></source>
  <target><size unit='MiB'>128</size><node>0</node></target><alias name='dimm0'/></memory>"""
VIRTIO_MEM = """<memory model='virtio-mem'><source><nodemask>2</nodemask></source>
  <target><size unit='MiB'>512</size><node>1</node><block unit='MiB'>2</block>
  <requested unit='MiB'>64</requested><current unit='MiB'>62</current></target>
  <alias name='ua-far'/></memory>"""


def parse(*, limit=LIMIT, cells=CELLS, devices=DIMM + VIRTIO_MEM):
    return parse_domain(FRAME.format(limit=limit, cells=cells, devices=devices), None)


def test_parts_and_their_nodes():
    state = parse()
    assert state.fixed_memory == (
        FixedMemory("cell 0", Bytes(512 * MIB)),
        FixedMemory("cell 1", Bytes(256 * MIB), CpuSet([2])),
        FixedMemory("dimm dimm0", Bytes(128 * MIB), CpuSet([2, 3])),
    )
    assert sum(part.size for part in state.fixed_memory) == state.boot_memory
    assert state.numa_mode is NumaMode.STRICT
    (device,) = state.virtio_mem
    assert (device.alias, device.node, device.host_nodes) == ("ua-far", 1, CpuSet([2]))
    assert (device.requested, device.current) == (64 * MIB, 62 * MIB)
    assert state.mechanism is MemoryMechanism.VIRTIO_MEM


def test_device_that_names_no_node_follows_the_guest():
    plain = VIRTIO_MEM.replace("<source><nodemask>2</nodemask></source>", "")
    (device,) = parse(devices=plain).virtio_mem
    assert device.host_nodes == CpuSet()


def test_room_counts_every_device_with_its_full_size():
    assert parse().memory_room == MemoryRoom(2, Bytes((4096 - 768 - 640) * MIB), 1)
    assert parse(devices="").memory_room == MemoryRoom(4, Bytes((4096 - 768) * MIB), 1)


@pytest.mark.parametrize(
    ("cells", "cell"),
    [
        ("<cell id='0' cpus='0-1' memory='1' unit='MiB'/>", 0),
        ("<cell cpus='0' memory='1'/><cell memory='1'/><cell cpus='1' memory='1'/>", 1),
        ("<cell id='3' memory='1'/><cell id='7' memory='1'/>", 7),
    ],
)
def test_cell_for_more_memory_is_one_without_vcpus_where_there_is_one(cells, cell):
    assert parse(cells=cells, devices="").memory_room.cell == cell


@pytest.mark.parametrize(("limit", "cells"), [("", CELLS), ("", ""), (LIMIT, "")])
def test_no_room_without_slots_or_cells(limit, cells):
    room = parse(limit=limit, cells=cells, devices="").memory_room
    assert (room.slots, room.size, room.cell) == (0, 0, 1 if cells else None)


def test_without_cells_the_parts_are_not_known():
    state = parse(limit="", cells="", devices="")
    assert (state.fixed_memory, state.boot_memory) == ((), 1408 * MIB)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (("<nodemask>2</nodemask>", "<nodemask>two</nodemask>"), "memory.source.nodemask"),
        (("cellid='1'", "cellid='x'"), "numatune.memnode.cellid"),
        (("slots='4'", "slots='many'"), "maxMemory.slots"),
        (("nodeset='2'", "nodeset='3-1'"), "numatune.memnode.nodeset"),
    ],
)
def test_field_that_makes_no_sense_is_named(wrong, field):
    text = FRAME.format(limit=LIMIT, cells=CELLS, devices=VIRTIO_MEM)
    assert wrong[0] in text
    with pytest.raises(InvalidValueError) as caught:
        parse_domain(text.replace(*wrong), None)
    assert caught.value.field == field


HUGE = """<memoryBacking><hugepages>
  <page size='1' unit='GiB' nodeset='0'/><page size='2048' unit='KiB'/>
  <page size='4' unit='KiB' nodeset='3'/></hugepages></memoryBacking>"""
HUGES = "<memoryBacking><hugepages><page {}/></hugepages></memoryBacking>"


def parse_huge(backing, *, cells=CELLS, devices=DIMM + VIRTIO_MEM):
    text = FRAME.format(limit=LIMIT, cells=cells, devices=devices)
    return parse_domain(text.replace("<cpu>", f"{backing}<cpu>"), None)


def pages(state):
    parts = (*state.fixed_memory, *state.virtio_mem)
    return [None if part.page is None else part.page // MIB for part in parts]


def test_pages_by_cell_and_those_of_a_device_by_its_cell():
    # two cells, a DIMM of cell 0, a virtio-mem device of cell 1
    state = parse_huge(HUGE)
    assert pages(state) == [1024, 2, 1024, 2]
    assert state.memory_room.page == 2 * MIB
    assert state.on_huge_pages


def test_a_device_may_name_its_own():
    own = VIRTIO_MEM.replace("<source>", "<source><pagesize unit='KiB'>4</pagesize>")
    assert pages(parse_huge(HUGE, devices=own))[-1] == 0
    own = VIRTIO_MEM.replace("<source>", "<source><pagesize unit='MiB'>2</pagesize>")
    state = parse(devices=own)
    assert pages(state) == [0, 0, 2]
    assert state.on_huge_pages


def test_no_size_is_the_hosts_default():
    state = parse_huge("<memoryBacking><hugepages/></memoryBacking>")
    assert pages(state) == [None] * 4
    assert state.on_huge_pages


def test_cells_that_no_entry_names_have_small_pages():
    one = HUGES.format("size='2' unit='M' nodeset='1'")
    assert pages(parse_huge(one)) == [0, 2, 0, 2]


@pytest.mark.parametrize("size", ["4", "0"])
def test_pages_of_the_kernels_own_size_are_none(size):
    state = parse_huge(HUGES.format(f"size='{size}' unit='KiB'"))
    assert pages(state) == [0] * 4
    assert not state.on_huge_pages


def test_without_cells_all_of_it_is_one_part():
    state = parse_huge("<memoryBacking><hugepages/></memoryBacking>", cells="", devices="")
    assert state.fixed_memory == (FixedMemory("boot memory", Bytes(1408 * MIB), page=None),)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ("<page size='big' unit='KiB'/>", "memoryBacking.hugepages.page.size"),
        ("<page size='2' unit='M' nodeset='x'/>", "memoryBacking.hugepages.page.nodeset"),
    ],
)
def test_garbage_names_its_field(entry, field):
    with pytest.raises(InvalidValueError) as caught:
        parse_huge(f"<memoryBacking><hugepages>{entry}</hugepages></memoryBacking>")
    assert caught.value.field == field
