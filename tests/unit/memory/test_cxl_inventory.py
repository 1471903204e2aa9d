"""What the inventory says of the recorded lab, and of one whose devices tell garbage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import MACHINES, Machine

from virtfabric.adapters.cxl.inventory import read_inventory
from virtfabric.adapters.cxl.record import record_memory
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.cli.main import main
from virtfabric.daemon.memoryviews import memory_view
from virtfabric.model.amounts import Tier
from virtfabric.model.cxl import (
    CxlInventory,
    CxlPort,
    DaxDevice,
    HostMemory,
    MemoryState,
    PortKind,
    Serial,
)
from virtfabric.model.hugepages import HugePools
from virtfabric.model.units import GIB, MIB
from virtfabric.policy.regions import check_region

if TYPE_CHECKING:
    from pathlib import Path

QUARTER = 256 * MIB


def test_memdevs_of_the_lab(idle: Machine) -> None:
    found = idle.read()
    known = {str(m.serial): (m.ram, m.pmem, m.address, m.node) for m in found.memdevs}
    assert known == {
        "0x100": (QUARTER, 0, "0000:41:00.0", 0), "0x101": (QUARTER, 0, "0000:a1:00.0", 0),
        "0x102": (QUARTER, 0, "0000:a4:00.0", 0), "0x103": (QUARTER, 0, "0000:a5:00.0", 0),
        "0x104": (QUARTER, 0, "0000:43:00.0", 0), "0x200": (0, QUARTER, "0000:42:00.0", 0),
    }  # fmt: skip
    assert found.problems == ()
    assert found.regions == ()
    assert found.taken == frozenset()


def test_ports_and_windows_of_the_lab(idle: Machine) -> None:
    found = idle.read()
    ports = {p.device: p for p in found.ports}
    assert ports["ACPI0017:00"].kind is PortKind.ROOT
    one, other = ports["pci0000:40"], ports["pci0000:a0"]
    assert (one.kind, other.kind) == (PortKind.BRIDGE, PortKind.BRIDGE)
    switch = ports["0000:a2:00.0"]
    assert (switch.kind, switch.parent) == (PortKind.SWITCH, other.name)
    behind = {str(m.serial): m.port for m in found.memdevs}
    assert behind == {
        "0x100": one.name, "0x200": one.name, "0x104": one.name, "0x101": other.name,
        "0x102": switch.name, "0x103": switch.name,
    }  # fmt: skip
    assert found.behind(other.name) == {other.name, switch.name}
    assert [(w.base, w.size, w.ways, w.granularity, w.targets) for w in found.windows] == [
        (0x150000000, 2 * GIB, 1, 0, (one.name,)),
        (0x1D0000000, 2 * GIB, 1, 0, (other.name,)),
        (0x250000000, 2 * GIB, 2, 256, (one.name, other.name)),
    ]


def test_a_switch_behind_a_switch_whatever_the_numbers() -> None:
    ports = (
        CxlPort("port10", PortKind.SWITCH, "port9"), CxlPort("port9", PortKind.SWITCH, "port2"),
        CxlPort("port2", PortKind.BRIDGE, "root0"), CxlPort("port3", PortKind.BRIDGE, "root0"),
    )  # fmt: skip
    assert CxlInventory(ports=ports).behind("port2") == {"port2", "port9", "port10"}


def test_regions_of_the_lab(busy: Machine) -> None:
    found = busy.read()
    assert [
        (r.window, r.base, r.size, r.ways, r.granularity, [str(m) for m in r.members])
        for r in found.regions
    ] == [
        ("decoder0.0", 0x150000000, QUARTER, 1, 0, ["0x104"]),
        ("decoder0.1", 0x1D0000000, 2 * QUARTER, 2, 1024, ["0x102", "0x103"]),
        ("decoder0.2", 0x250000000, 2 * QUARTER, 2, 256, ["0x100", "0x101"]),
    ]
    assert all(r.committed and not r.ours and r.mode == "ram" for r in found.regions)
    assert [r.dax for r in found.regions] == [
        (DaxDevice(f"dax{n}.0", r.size, n + 1, MemoryState.ONLINE, movable=True),)
        for n, r in enumerate(found.regions)
    ]
    assert {node: r.name for node, r in found.node_regions.items()} == {
        1: "region0", 2: "region1", 3: "region2",
    }  # fmt: skip


def test_nodes_know_their_tier_and_whether_they_can_go(busy: Machine) -> None:
    nodes = busy.memory().read_memory().nodes
    assert {n: (node.tier, node.offlinable) for n, node in nodes.items()} == {
        0: (Tier.DRAM, False), 1: (Tier.CXL, True), 2: (Tier.CXL, True), 3: (Tier.CXL, True),
    }  # fmt: skip
    assert "ZONE_DMA, DMA32, NORMAL" in nodes[0].why_not_offlinable
    assert nodes[1].why_not_offlinable == ""


def test_memory_in_zone_normal_cannot_go(mixed: Machine) -> None:
    memory = mixed.memory().read_memory()
    assert [(r.dax[0].state, r.dax[0].movable) for r in memory.cxl.regions] == [
        (MemoryState.ONLINE, False), (MemoryState.OFFLINE, False), (MemoryState.ONLINE, True),
    ]  # fmt: skip
    assert (memory.nodes[2].memory_total, memory.nodes[2].offlinable) == (0, False)
    assert memory.nodes[2].why_not_offlinable == "it has no memory online"
    assert not memory.nodes[1].offlinable
    assert memory.nodes[1].why_not_offlinable.startswith("256MiB in ZONE_NORMAL")
    assert memory.nodes[3].offlinable


def test_gigantic_pages_keep_a_node(busy: Machine) -> None:
    pages = busy.sys / "devices/system/node/node2/hugepages/hugepages-1048576kB/nr_hugepages"
    pages.write_text("1\n")
    node = busy.memory().read_memory().nodes[2]
    assert (node.offlinable, node.why_not_offlinable) == (
        False,
        "1 gigantic pages, which cannot move",
    )


def test_half_of_the_blocks_online(busy: Machine) -> None:
    blocks = busy.sys / "devices/system/memory"
    (blocks / "memory42/state").write_text("offline\n")
    assert busy.read().regions[0].dax[0].state is MemoryState.PARTLY
    (blocks / "memory43/valid_zones").write_text("Normal\n")
    assert busy.read().regions[0].dax[0].movable is False


def test_a_dax_device_that_is_no_system_memory(busy: Machine) -> None:
    driver = busy.device("dax0.0") / "driver"
    driver.unlink()
    memory = busy.memory().read_memory()
    assert memory.cxl.regions[0].dax[0].state is MemoryState.DEVICE
    assert memory.nodes[1].tier is Tier.DRAM


def test_a_host_without_cxl(tmp_path: Path) -> None:
    assert read_inventory(SysTree(tmp_path)) == CxlInventory()


# -- garbage ------------------------------------------------------------------------------------


def refusal(found: CxlInventory, *serials: int) -> str:
    """Why no region can be made of these memdevs; empty when it can."""
    members = tuple(map(Serial, serials))
    no = check_region(found, 0x150000000, members, QUARTER * len(members), 256)
    return no.detail if no else ""


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("serial", "", "its serial number is ''"),
        ("serial", "0x0", "its serial number is '0x0'"),
        ("serial", "0x1" + "0" * 16, "its serial number is '0x10000000000000000'"),
        ("serial", "-1", "its serial number is '-1'"),
        ("serial", "S5GX", "its serial number is 'S5GX'"),
        ("ram/size", "lots", "its ram/size is 'lots', which is no number"),
        ("ram/size", "-268435456", "its ram capacity of -268435456 bytes is impossible"),
        ("ram/size", "0xffffffffffffffff", "its ram capacity of 18446744073709551615 bytes"),
        ("ram/size", "0x10000001", "is no multiple of 256MiB"),
        ("ram/size", "0x0", "it has no capacity"),
        ("pmem/size", "garbage", "its pmem/size is 'garbage', which is no number"),
    ],
)
def test_a_memdev_that_tells_garbage_is_never_used(
    idle: Machine, file: str, text: str, problem: str
) -> None:
    assert refusal(idle.read(), 0x100) == ""
    home = idle.memdev("0x100")
    (home / file).write_text(f"{text}\n")
    found = idle.read()
    (memdev,) = [m for m in found.memdevs if m.name == home.name]
    assert any(problem in text for text in memdev.problems), memdev.problems
    assert any(problem in text and home.name in text for text in found.problems)
    assert not memdev.usable
    assert Serial(0x100) not in found.usable
    assert len(found.usable) == 5
    assert refusal(found, 0x100)


def test_a_serial_that_appears_twice_is_nobody(idle: Machine) -> None:
    first, second = idle.memdev("0x100"), idle.memdev("0x101")
    (second / "serial").write_text("0x100\n")
    found = idle.read()
    assert [
        f"memdev 0x100 ({one.name}): its serial number is that of {other.name} as well"
        for one, other in sorted([(first, second), (second, first)])
    ] == sorted(found.problems)
    assert set(found.usable) == {0x102, 0x103, 0x104, 0x200}
    assert "as well" in refusal(found, 0x100)
    assert refusal(found, 0x104) == ""


def test_a_region_of_a_memdev_that_is_not_trusted(busy: Machine) -> None:
    (busy.memdev("0x104") / "serial").write_text("nobody\n")
    found = busy.read()
    assert found.regions[0].members == (None,)
    assert "region region0: its position 0 has no known memdev" in found.problems


def test_a_memdev_that_was_pulled_out_of_its_region(busy: Machine) -> None:
    busy.drop(busy.memdev("0x100").name)
    found = busy.read()
    assert 0x100 not in found.usable
    assert any("region2" in text for text in found.problems) or (
        found.regions[2].members == (Serial(0x100), Serial(0x101))
    )
    memory_view(HostMemory({}, found), HugePools(), str)


def test_a_window_that_tells_garbage_takes_no_region(idle: Machine) -> None:
    (idle.device("decoder0.0") / "size").write_text("0x7\n")
    found = idle.read()
    assert found.problems == (
        "window decoder0.0: its address capacity of 7B is no multiple of 256MiB",
    )
    assert "there is no window at 0x150000000" in refusal(found, 0x100)


RECORD = json.loads((MACHINES / "lab-cxl-regions/tree.json").read_text())
PATHS = sorted(RECORD["sys"]["files"].keys() | RECORD["sys"]["links"].keys())


class Garbled(SysTree):
    """Some files hold garbage, or are not there."""

    def __init__(self, root: Path, wrong: dict[str, str | None]) -> None:
        super().__init__(root)
        self.wrong = wrong

    def text(self, path: str) -> str | None:
        return self.wrong[path] if path in self.wrong else super().text(path)

    def link(self, path: str) -> str | None:
        return None if path in self.wrong else super().link(path)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine("lab-cxl-regions", tmp_path_factory.mktemp("lab"))


@settings(max_examples=examples(80), deadline=None)
@given(
    wrong=st.dictionaries(
        st.sampled_from(PATHS), st.none() | st.text(max_size=12), min_size=1, max_size=9
    )
)
def test_no_garbage_stops_the_inventory(laid_out: Machine, wrong: dict[str, str | None]) -> None:
    found = read_inventory(Garbled(laid_out.sys, wrong))
    assert json.dumps(memory_view(HostMemory({}, found), HugePools(), str))
    for serial, memdev in found.usable.items():
        assert memdev.problems == ()
        assert [m.serial for m in found.memdevs].count(serial) == 1
        assert (memdev.ram + memdev.pmem) % QUARTER == 0


# -- records ------------------------------------------------------------------------------------


def test_a_record_reads_like_the_host(mixed: Machine, tmp_path: Path) -> None:
    assert main([
        "memory", "record", str(tmp_path / "again"), "--sys", str(mixed.sys), "--proc",
        str(mixed.proc),
    ]) == 0  # fmt: skip
    original = MACHINES / "lab-cxl-states/tree.json"
    assert (tmp_path / "again/tree.json").read_text() == original.read_text()


def test_a_record_does_not_overwrite(mixed: Machine, tmp_path: Path) -> None:
    record_memory(tmp_path / "one", sys=mixed.sys, proc=mixed.proc)
    assert main([
        "memory", "record", str(tmp_path / "one"), "--sys", str(mixed.sys), "--proc",
        str(mixed.proc),
    ]) == 2  # fmt: skip
