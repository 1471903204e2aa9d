"""A census reads only what may be another now, and sees what one sees that knows nothing yet."""

from __future__ import annotations

import itertools
import os
import posixpath
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.adapters.pci.census import Census
from virtfabric.adapters.pci.inventory import SysfsDeviceTree, read_functions
from virtfabric.adapters.pci.record import lay_out
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.device import PciAddress, PciFunction, VfSettings

if TYPE_CHECKING:
    import re
    from collections.abc import Collection

LAB = Path(__file__).parents[2] / "data/machines/lab-passthrough"
PORT, PF, OTHER_PF = map(PciAddress, ("0000:00:10.0", "0000:01:00.0", "0000:52:00.0"))
VF, VF_1 = PciAddress("0000:01:10.0"), PciAddress("0000:01:10.2")
EDU, EDU_1 = PciAddress("0000:03:00.0"), PciAddress("0000:03:00.1")
"""They share an IOMMU group."""

OPENED = 160, 25
"""Files and directories opened for all 34 functions, and for one VF (before: 643 in any case)."""


class CountingTree(SysTree):
    """Notes which files are opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def piece(self, path: str, offset: int, size: int) -> bytes | None:
        self.opened.append(path)
        return super().piece(path, offset, size)

    def text(self, path: str) -> str | None:
        self.opened.append(path)
        return super().text(path)

    def inodes(self, path: str, pattern: re.Pattern[str]) -> dict[str, int]:
        self.opened.append(path)
        return super().inodes(path, pattern)

    def take(self) -> list[str]:
        opened, self.opened = self.opened, []
        return opened


class Lab:
    """The recorded lab, in a census that has read it once."""

    def __init__(self, directory: Path) -> None:
        self.sys, self.proc = lay_out(LAB, directory)
        self.trees = CountingTree(self.sys), CountingTree(self.proc)
        self.census = Census(*self.trees)
        self.census.read()
        self.take()
        self.homes = {
            PciAddress(link.name): link.resolve()
            for link in (self.sys / "bus/pci/devices").iterdir()
        }
        self._free = itertools.count()

    def take(self) -> list[str]:
        return [path for tree in self.trees for path in tree.take()]

    def read(self, only: Collection[PciAddress] | None = None) -> dict[PciAddress, PciFunction]:
        return self.census.read(only).joined()

    def anew(self) -> dict[PciAddress, PciFunction]:
        return read_functions(SysTree(self.sys), SysTree(self.proc))

    def write(self, address: PciAddress, name: str, text: str) -> None:
        (self.homes[address] / name).write_text(f"{text}\n")

    def link(self, address: PciAddress, name: str, target: Path | None) -> None:
        place = self.homes[address] / name
        place.unlink(missing_ok=True)
        if target is not None:
            place.symlink_to(os.path.relpath(target, place.parent))

    def bind(self, address: PciAddress, driver: str | None) -> None:
        self.link(address, "driver", self.sys / "bus/pci/drivers" / driver if driver else None)

    def remove(self, address: PciAddress) -> None:
        """As the kernel does: with all behind it, first from the bus; no number is given again."""
        for one, home in self.homes.items():
            link = self.sys / "bus/pci/devices" / one
            if home.is_relative_to(self.homes[address]) and link.is_symlink():
                link.rename(self.sys / f"gone{next(self._free)}")
        shutil.rmtree(self.homes[address])

    def plug(self, address: PciAddress, **files: str) -> None:
        home = self.homes[address]
        home.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (home / name).write_text(f"{text}\n")
        link = self.sys / "bus/pci/devices" / address
        link.symlink_to(os.path.relpath(home, link.parent))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_what_one_reading_opens(lab: Lab) -> None:
    lab.read()
    everything = lab.take()
    lab.read([VF])
    one = lab.take()
    assert (len(everything), len(one)) == OPENED


def test_only_those_who_decide_on_a_function_are_read_with_it(lab: Lab) -> None:
    def touched(*only: PciAddress) -> set[str]:
        lab.take()
        lab.read(only)
        directories = {posixpath.basename(posixpath.dirname(path)) for path in lab.take()}
        return lab.homes.keys() & directories

    assert touched(VF) == {VF, PF, PORT}
    groups = {a: f.group for a, f in lab.anew().items()}
    alike = {a for a, group in groups.items() if group == groups[EDU]}
    assert {EDU, EDU_1} <= alike
    assert alike <= touched(EDU) < alike | {a for a, f in lab.anew().items() if f.bridge}


def test_what_lasts_is_read_once(lab: Lab) -> None:
    lab.read()
    names = {path.rpartition("/")[2] for path in lab.take()}
    assert not names & {"vendor", "device", "class", "subsystem_vendor", "max_link_width"}
    assert {"numa_node", "reset_method", "driver_override", "sriov_totalvfs"} <= names


def test_a_function_that_came_in_the_place_of_another_is_read_anew(lab: Lab) -> None:
    """Same address, same home, nobody told: only the number of its link differs."""
    before = lab.read()[VF_1]
    lab.remove(VF_1)
    lab.plug(VF_1, vendor="0x1234", device="0x5678", **{"class": "0x0c0330"})
    after = lab.read([PF])[VF_1]
    assert (before.ids, after.ids) == ("8086:10ca", "1234:5678")
    assert (after.group, after.pf, after.link.width_max) == (None, None, 0)
    assert lab.read() == lab.anew()


def test_one_that_came_or_went_is_noticed_whatever_is_asked_for(lab: Lab) -> None:
    lab.remove(VF_1)
    assert lab.read([EDU]) == lab.anew()
    lab.plug(VF_1, vendor="0x8086", device="0x10ca", **{"class": "0x020000"})
    assert lab.read([EDU]) == lab.anew()


def test_a_vf_that_learns_of_its_pf_late(lab: Lab) -> None:
    """The kernel puts a VF on the bus before it links it to its PF."""
    links = {name: (lab.homes[VF_1] / name).resolve() for name in ("physfn", "iommu_group")}
    content = {n: (lab.homes[VF_1] / n).read_text().strip() for n in ("vendor", "device", "class")}
    lab.remove(VF_1)
    lab.plug(VF_1, **content)
    assert lab.read()[VF_1].pf is None
    for name, target in links.items():
        lab.link(VF_1, name, target)
    found = lab.read([EDU])[VF_1]
    assert (found.pf, found.group is None) == (PF, False)
    assert lab.read([EDU]) == lab.anew()


@pytest.mark.parametrize("address", [PORT, VF])
def test_what_a_function_told_that_did_not_answer_is_not_believed(
    lab: Lab, address: PciAddress
) -> None:
    """It was off, or in a reset, when it was seen first: all of its registers were ones."""
    config = lab.homes[address] / "config"
    told = config.read_bytes()
    whole = lab.anew()[address]
    config.write_bytes(b"\xff" * len(told))
    lab.write(address, "max_link_width", "63")
    late = Census(*lab.trees)
    assert late.read().joined()[address] != whole
    config.write_bytes(told)
    lab.write(address, "max_link_width", str(whole.link.width_max))
    assert late.read().joined()[address] == whole


def test_a_port_that_stops_answering(lab: Lab) -> None:
    """Nothing isolates what is behind it, as far as anybody knows."""
    config = lab.homes[PORT] / "config"
    assert lab.read()[PORT].acs is True
    config.write_bytes(b"\xff" * config.stat().st_size)
    found = lab.read([VF])[PORT]
    assert (found.acs, found.limit, found.bridge) == (None, None, True)


CHANGES = {
    "bind": lambda lab, a, n: lab.bind(a, [None, "vfio-pci", "igb"][n % 3]),
    "override": lambda lab, a, n: lab.write(a, "driver_override", ["(null)", "vfio-pci"][n % 2]),
    "node": lambda lab, a, n: lab.write(a, "numa_node", str(n % 3 - 1)),
    "errors": lambda lab, a, n: lab.write(a, "aer_dev_fatal", f"TOTAL_ERR_FATAL {n}"),
    "speed": lambda lab, a, n: lab.write(a, "current_link_speed", ["5.0 GT/s", "Unknown"][n % 2]),
    "total": lambda lab, a, n: lab.write(a, "sriov_totalvfs", str(n)),
    "reset": lambda lab, a, n: lab.write(a, "reset_method", ["flr", "", "pm bus"][n % 3]),
    "no vfs": lambda lab, a, n: lab.link(a, f"virtfn{n % 2}", None),
    "unplug": lambda lab, a, n: lab.remove(a),
}  # fmt: skip
"""What happens to functions; each may happen to any, if the function has such a thing at all."""


def happen(lab: Lab, name: str, address: PciAddress, number: int) -> None:
    needs = {"errors": "aer_dev_fatal", "speed": "current_link_speed", "total": "sriov_totalvfs",
             "reset": "reset_method"}  # fmt: skip
    home = lab.homes[address]
    if home.is_dir() and (name not in needs or (home / needs[name]).exists()):
        CHANGES[name](lab, address, number)


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(CHANGES)),
                st.sampled_from([PORT, PF, OTHER_PF, VF, VF_1, EDU, EDU_1]),
                st.integers(0, 5),
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    ),
    whole=st.booleans(),
)
def test_whatever_happens_it_reads_as_one_that_knows_nothing(
    rounds: list[list[tuple[str, PciAddress, int]]], whole: bool
) -> None:
    """`only` is told of what happens, as the kernel tells; of arrivals and departures it is not."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        for changes in rounds:
            for name, address, number in changes:
                happen(lab, name, address, number)
            concerned = {address for name, address, _ in changes if name != "unplug"}
            assert lab.read(None if whole else concerned) == lab.anew()


def test_uses_are_read_of_those_asked_for_only(lab: Lab) -> None:
    assert [str(use) for use in lab.read()[PF].uses] == ["network: eth1 is up"]
    (lab.homes[PF] / "net/eth1/flags").write_text("0x1002\n")
    assert lab.read([EDU])[PF].uses != ()
    assert lab.read([VF])[PF].uses == ()


class Settings:
    """A PF's own, with a note of who was asked."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.asked, self.vlan = lab, list[PciAddress](), 1

    def __call__(self, pf: PciAddress) -> dict[PciAddress, VfSettings]:
        self.asked.append(pf)
        links = sorted(self.lab.homes[pf].glob("virtfn*"))
        return {PciAddress(link.resolve().name): VfSettings(vlan=self.vlan) for link in links}

    def take(self) -> list[PciAddress]:
        asked, self.asked = self.asked, []
        return asked


def test_a_pf_is_asked_for_settings_where_somebody_wants_those_of_its_vfs(lab: Lab) -> None:
    """Each is a run of ip(8)."""
    kept = Settings(lab)
    tree = SysfsDeviceTree(lab.sys, lab.proc, kept)
    tree.read_functions()
    assert kept.take() == [PF, OTHER_PF]
    kept.vlan = 2
    assert tree.read_functions(settings=[])[VF].settings == VfSettings(vlan=1)
    assert tree.read_functions([EDU])[VF].settings == VfSettings(vlan=1)
    assert tree.read_functions([VF], [])[VF].settings == VfSettings(vlan=1)
    assert kept.take() == []
    assert tree.read_functions([VF])[VF_1].settings == VfSettings(vlan=2)
    assert kept.take() == [PF]
    tree.read_functions(settings=[VF, VF_1])
    assert kept.take() == [PF]
    lab.remove(VF_1)
    assert VF_1 not in tree.read_functions([], [])
    assert kept.take() == []
