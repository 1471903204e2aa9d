"""What the inventory says of real machines (tests/data/machines)."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.adapters.pci.inventory import SysfsDeviceTree, read_functions
from virtfabric.adapters.pci.record import lay_out
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.daemon.deviceviews import function_view
from virtfabric.model.device import (
    DeviceInventory,
    DevicePool,
    Link,
    Match,
    PciAddress,
    PciFunction,
)
from virtfabric.model.errors import InvalidValueError
from virtfabric.policy.pools import blast_radius, members, obstacles

MACHINES = Path(__file__).parents[2] / "data" / "machines"
RECORD = json.loads((MACHINES / "lab-passthrough/tree.json").read_text())
NAMES = sorted(
    path.parent.name
    for path in MACHINES.glob("*/tree.json")
    if "bus/pci/devices" in path.read_text()  # others are records of memory
)
POOLS = (
    DevicePool("net.vf", Match(ids=frozenset({"8086:10ca"}), vfs=True)),
    DevicePool("storage.nvme", Match(class_prefix="0108", vfs=True)),
    DevicePool("test.edu", Match(ids=frozenset({"1234:11e8"}))),
)


def read(name: str) -> DeviceInventory:
    with tempfile.TemporaryDirectory() as directory:
        roots = lay_out(MACHINES / name, Path(directory))
        return DeviceInventory(SysfsDeviceTree(*roots).read_functions(), POOLS)


machine = cache(read)


def only(host: DeviceInventory, **values: object) -> list[PciFunction]:
    """Functions with these values, by address."""
    return [
        one
        for one in host.functions.values()
        if all(getattr(one, name) == value for name, value in values.items())
    ]


def test_the_machines_are_there() -> None:
    assert {"lab-passthrough", "virtio-vm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_is_sound(name: str) -> None:
    host = machine(name)
    assert host.functions
    for one in host.functions.values():
        assert function_view(host, one)["address"] == one.address
        assert one.parent is None or host.functions[one.parent].bridge
        assert one.pf is None or one.address in host.functions[one.pf].vfs
        if one.uses and not one.bridge:
            assert obstacles(host, one.address)


class Garbled(SysTree):
    """Some files and links are missing (None) or say something else."""

    def __init__(self, root: Path, wrong: dict[str, bytes | None]) -> None:
        super().__init__(root)
        self.wrong = wrong

    def data(self, path: str, limit: int) -> bytes | None:
        return self.wrong[path] if path in self.wrong else super().data(path, limit)

    def text(self, path: str) -> str | None:
        if path not in self.wrong:
            return super().text(path)
        content = self.wrong[path]
        return None if content is None else content.decode(errors="replace").strip()

    def link(self, path: str) -> str | None:
        return None if path in self.wrong else super().link(path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return lay_out(MACHINES / "lab-passthrough", tmp_path_factory.mktemp("lab"))


PATHS = [
    sorted(p for part in ("files", "links", "pieces") for p in tree[part])
    for tree in (RECORD["sys"], RECORD["proc"])
]


@settings(max_examples=examples(60), deadline=None)
@given(
    wrong=st.dictionaries(st.sampled_from(PATHS[0]), st.none() | st.binary(max_size=8), max_size=9),
    wrong_proc=st.dictionaries(st.sampled_from(PATHS[1]), st.none() | st.binary(max_size=40)),
)
def test_a_machine_with_files_missing_or_garbled(
    lab: tuple[Path, Path], wrong: dict[str, bytes | None], wrong_proc: dict[str, bytes | None]
) -> None:
    try:
        found = read_functions(Garbled(lab[0], wrong), Garbled(lab[1], wrong_proc))
    except InvalidValueError as error:
        named = Path(error.field).relative_to(lab[0])
        assert wrong[str(named)] is not None or named.name == "iommu_group"
    else:
        lost = machine("lab-passthrough").functions.keys() - found
        assert all(any(address in path for path in wrong) for address in lost)


def test_a_machine_of_which_half_is_gone() -> None:
    """Functions without their port, VFs without their PF: what is left is told."""
    with tempfile.TemporaryDirectory() as directory:
        roots = lay_out(MACHINES / "lab-passthrough", Path(directory))
        whole = SysfsDeviceTree(*roots).read_functions()
        for link in sorted((roots[0] / "bus/pci/devices").iterdir())[::2]:
            shutil.rmtree(link.resolve(), ignore_errors=True)  # it may have gone with its port
            link.unlink()
        left = SysfsDeviceTree(*roots).read_functions()
        assert 0 < len(left) < len(whole)
        host = DeviceInventory(left, POOLS)
        for address in left:
            assert function_view(host, left[address])["address"] == address


def test_this_vm_lives_on_its_functions() -> None:
    host = machine("virtio-vm")
    uses = {one.address: [str(use) for use in one.uses] for one in only(host) if one.uses}
    assert uses == {
        "0000:00:02.0": ["mounted: vda on /"],
        "0000:00:03.0": ["network: eth0 is up"],
    }
    assert all("no IOMMU group" in " ".join(obstacles(host, a)) for a in uses)
    assert {one.driver for one in only(host)} == {None, "virtio-pci"}
    assert obstacles(host, PciAddress("0000:00:00.0")) == ("is a bridge or port",)


IGB, IGB_PORT = PciAddress("0000:01:00.0"), PciAddress("0000:00:10.0")
NVME = PciAddress("0000:52:00.0")


def test_the_labs_pf_and_vfs() -> None:
    host = machine("lab-passthrough")
    igb, port = host.functions[IGB], host.functions[IGB_PORT]
    assert (igb.ids, igb.driver, igb.vfs_max, igb.interfaces) == ("8086:10c9", "igb", 7, ("eth1",))
    assert (igb.resets, igb.link) == (("flr", "pm", "bus"), Link(2500, 1, 2500, 1))
    assert [str(use) for use in igb.uses] == ["network: eth1 is up"]
    assert (port.bridge, port.acs, port.link) == (True, True, Link(2500, 1, 16000, 32))
    vfs = members(host, "net.vf")
    assert [(vf.address, vf.vf_index, vf.resets) for vf in vfs] == [
        ("0000:01:10.0", 0, ("flr",)), ("0000:01:10.2", 1, ("flr",)),
    ]  # fmt: skip
    for vf in vfs:
        assert (vf.pf, vf.parent) == (IGB, IGB_PORT)
        assert obstacles(host, vf.address) == ()
        assert list(host.group_of(vf.address)) == []
    assert "is a PF with VFs" in obstacles(host, IGB)
    assert [(one.address, word) for one, word in blast_radius(host, vfs[0].address)] == [
        (IGB, "PF"), (vfs[1].address, "PF"),
    ]  # fmt: skip


def test_the_labs_nvme_has_its_namespace_through_multipath() -> None:
    host = machine("lab-passthrough")
    nvme = host.functions[NVME]
    assert (nvme.node, nvme.driver, nvme.interfaces) == (1, "nvme", ("nvme0n1",))
    assert [str(use) for use in nvme.uses] == ["swap: nvme0n1"]
    assert [one.address for one in members(host, "storage.nvme")] == list(nvme.vfs)
    assert nvme.vfs == ("0000:52:00.1", "0000:52:00.2")


def test_the_labs_groups() -> None:
    host = machine("lab-passthrough")
    edus = members(host, "test.edu")
    assert len(edus) == 6
    shared = {one.address for one in edus if any(not o.bridge for o in host.group_of(one.address))}
    assert {"0000:03:00.0", "0000:03:00.1", "0000:05:01.0", "0000:05:02.0"} <= shared
    assert all(obstacles(host, one.address) == () for one in edus)
    alone, port = PciAddress("0000:06:00.0"), PciAddress("0000:00:10.4")
    assert host.functions[port].acs is None
    assert [one.address for one in host.group_of(alone)] == [port]
    sata = obstacles(host, PciAddress("0000:00:1f.2"))
    assert sata[0].startswith("its IOMMU group 13 has 0000:00:1f.0, which lpc_ich drives")


def test_the_lab_lives_on_its_own_disks() -> None:
    host = machine("lab-passthrough")
    assert [str(use) for use in host.functions[PciAddress("0000:00:01.0")].uses] == [
        "mounted: vda on /"
    ]
    assert obstacles(host, PciAddress("0000:00:03.0"))[0].startswith("the host uses it (network")
