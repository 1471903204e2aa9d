"""What the inventory says of real machines (tests/data/machines)."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.adapters.pci.inventory import SysfsDeviceTree
from virtfabric.adapters.pci.record import lay_out
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
NAMES = sorted(path.name for path in MACHINES.iterdir() if path.is_dir())
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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_machine_with_files_missing_or_garbled(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        roots = lay_out(MACHINES / data.draw(st.sampled_from(NAMES)), Path(directory))
        entries = [p for p in Path(directory).rglob("*") if p.is_symlink() or p.is_file()]
        touched = data.draw(st.lists(st.sampled_from(sorted(entries)), unique=True, max_size=8))
        for path in touched:
            path.unlink()
            match data.draw(st.sampled_from(["gone", "garbled", "directory"])):
                case "garbled":
                    path.write_bytes(data.draw(st.binary(max_size=8)))
                case "directory":
                    path.mkdir()
        try:
            found = SysfsDeviceTree(*roots).read_functions()
        except InvalidValueError as error:
            named = error.field
        else:
            named = None
            for one in found.values():
                assert one.parent is None or one.parent in found or one.parent in str(touched)
        assert named is None or named in {str(path) for path in touched}


def test_a_machine_of_which_half_is_gone() -> None:
    """Functions without their port, VFs without their PF: what is left is told."""
    with tempfile.TemporaryDirectory() as directory:
        roots = lay_out(MACHINES / "lab-passthrough", Path(directory))
        whole = SysfsDeviceTree(*roots).read_functions()
        for link in sorted((roots[0] / "bus/pci/devices").iterdir())[::2]:
            shutil.rmtree(link.resolve())
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
