"""What doctor says of CXL tools, new memory, and nodes of which nothing is granted."""

from pathlib import Path

import pytest

from virtfabric.adapters.pci.record import lay_out
from virtfabric.cli.findings import Verdict
from virtfabric.cli.memorychecks import (
    check_known_nodes,
    check_new_memory,
    check_nodes,
    check_tools,
)
from virtfabric.config import CapacityConfig
from virtfabric.model.units import GIB, Bytes


@pytest.fixture
def cxl(tmp_path):
    (tmp_path / "sys/bus/cxl/devices/mem0").mkdir(parents=True)
    return tmp_path


def set_new_memory(root, state):
    switch = root / "sys/devices/system/memory/auto_online_blocks"
    switch.parent.mkdir(parents=True, exist_ok=True)
    switch.write_text(f"{state}\n")


def test_tools_matter_where_there_is_cxl(cxl, tmp_path_factory):
    [missing] = check_tools(cxl, lambda tool: None if tool == "daxctl" else f"/usr/bin/{tool}")
    assert (missing.verdict, missing.detail.split(":")[0]) == (Verdict.WARN, "daxctl not found")
    assert "apt-get install" in missing.mend
    [there] = check_tools(cxl, lambda tool: f"/usr/bin/{tool}")
    assert there.verdict is Verdict.OK
    [unneeded] = check_tools(tmp_path_factory.mktemp("plain"), lambda _: None)
    assert (unneeded.verdict, unneeded.mend) == (Verdict.OK, "")


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        ("online_movable", Verdict.OK), ("offline", Verdict.OK),
        ("online", Verdict.WARN), ("online_kernel", Verdict.WARN),
    ],
)  # fmt: skip
def test_where_the_kernel_puts_new_memory(cxl, state, verdict):
    set_new_memory(cxl, state)
    [finding] = check_new_memory(cxl)
    assert (finding.verdict, state in finding.detail) == (verdict, True)
    assert ("memhp_default_state=online_movable" in finding.mend) == (verdict is Verdict.WARN)


def test_new_memory_is_nobodys_business_without_cxl(tmp_path):
    set_new_memory(tmp_path, "online")
    [finding] = check_new_memory(tmp_path)
    assert finding.verdict is Verdict.OK


def test_a_kernel_without_hotplug(cxl, tmp_path_factory):
    assert next(check_new_memory(cxl)).verdict is Verdict.WARN
    assert next(check_new_memory(tmp_path_factory.mktemp("plain"))).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("cells", "verdict", "words"),
    [("0", Verdict.WARN, "does not know node 1,3"), ("0123", Verdict.OK, "knows node 0-3")],
)
def test_nodes_that_libvirt_does_not_know(tmp_path, cells, verdict, words):
    machine = Path(__file__).parents[2] / "data/machines/lab-cxl-states"
    lay_out(machine, tmp_path)  # node 2 has no memory online
    listed = "".join(f"<cell id='{n}'/>" for n in cells)
    capabilities = f"<capabilities><host><topology><cells>{listed}</cells></topology></host>"
    [finding] = check_known_nodes(f"{capabilities}</capabilities>", tmp_path)
    assert (finding.verdict, words in finding.detail) == (verdict, True), finding
    assert ("restart libvirtd" in finding.mend) == (verdict is Verdict.WARN)


def test_nodes_that_cannot_be_read(tmp_path):
    [finding] = check_known_nodes("<capabilities/>", tmp_path)
    assert (finding.verdict, finding.mend) == (Verdict.WARN, "")


def test_nodes_of_which_nothing_is_granted():
    host = {
        "withheld": {
            "2": "libvirt does not know it: restart libvirtd (guests run on)",
            "7": "the host has no such node; it counts when it comes",
        },
        "memory": [{"node": 0, "tier": "dram"}, {"node": 2, "tier": "cxl"}],
    }  # fmt: skip
    stale, absent = check_nodes(host, CapacityConfig())
    assert (stale.name, stale.verdict) == ("node 2", Verdict.WARN)
    assert "libvirt does not know it" in stale.detail
    assert (absent.name, "counts when it comes" in absent.detail) == ("node 7", True)
    *_, total = check_nodes(host | {"withheld": {}}, CapacityConfig(memory=Bytes(8 * GIB)))
    assert "nothing is granted of CXL node 2" in total.detail
    assert "node2 = ..." in total.mend
    plain = host | {"withheld": {}, "memory": host["memory"][:1]}
    assert list(check_nodes(plain, CapacityConfig(memory=Bytes(8 * GIB)))) == []
