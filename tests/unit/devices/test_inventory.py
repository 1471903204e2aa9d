"""Every field of a function, from trees that are written by hand."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from examples import examples
from fakesys import FakeSys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtfabric.adapters.pci.inventory import CurrentUses, SysfsDeviceTree, read_functions
from virtfabric.adapters.pci.tree import SysTree
from virtfabric.model.device import Link, PciAddress, PciFunction, VfSettings
from virtfabric.model.errors import DeviceError, InvalidValueError

NIC = PciAddress("0000:01:00.0")
PORT = PciAddress("0000:00:10.0")


def config(header: int = 0, *capabilities: tuple[int, bytes]) -> bytes:
    """A configuration space with extended capabilities one after the other from 0x100."""
    space = bytearray(4096)
    space[0x0E] = header
    at = 0x100
    for n, (number, body) in enumerate(capabilities):
        following = at + 4 + len(body) if n + 1 < len(capabilities) else 0
        head = number | 1 << 16 | following << 20
        space[at : at + 4] = head.to_bytes(4, "little")
        space[at + 4 : at + 4 + len(body)] = body
        at = following
    return bytes(space)


def acs(offered: int, enabled: int) -> tuple[int, bytes]:
    return 0x0D, offered.to_bytes(2, "little") + enabled.to_bytes(2, "little")


def express(target: int, version: int = 2) -> bytes:
    """A port's configuration space whose Link Control 2 aims at this generation."""
    space = bytearray(config(0x81))
    space[0x34], space[0x60:0x62], space[0x62] = 0x40, bytes((0x10, 0)), version
    space[0x40:0x42] = bytes((0x05, 0x60))  # MSI comes first
    space[0x60 + 0x30] = target
    return bytes(space)


SERIAL = (0x03, bytes.fromhex("0123456789abcdef"))


def igb_behind_a_port(fake: FakeSys) -> None:
    """A port, an igb with two VFs below it, and a plain function on the root bus."""
    port = fake.port(PORT, config=config(0x81, acs(0x5F, 0x1D)))
    fake.group(port, 3)
    nic = fake.function(
        NIC,
        port,
        config=config(0, SERIAL),
        numa_node="1",
        sriov_totalvfs="7",
        reset_method="flr bus",
        current_link_speed="2.5 GT/s PCIe",
        max_link_speed="16.0 GT/s PCIe",
        current_link_width="4",
        max_link_width="8",
    )
    fake.driver(nic, "igb")
    fake.group(nic, 4)
    for index, address in enumerate(("0000:01:10.0", "0000:01:10.2")):
        vf = fake.function(address, port, device="0x10ca", driver_override="vfio-pci")
        fake.vf(nic, index, vf)
        fake.group(vf, 5 + index)
    fake.function("0000:00:02.0", vendor="0x1234", device="0x11e8", **{"class": "0x00ff00"})


def test_every_field(fake: FakeSys) -> None:
    igb_behind_a_port(fake)
    functions = fake.read()
    assert list(functions) == ["0000:00:02.0", PORT, NIC, "0000:01:10.0", "0000:01:10.2"]
    assert functions[NIC] == PciFunction(
        address=NIC,
        vendor=0x8086,
        device=0x10C9,
        subsystem_vendor=0x1AF4,
        subsystem_device=0x1100,
        class_code=0x020000,
        driver="igb",
        node=1,
        group=4,
        parent=PORT,
        vfs=(PciAddress("0000:01:10.0"), PciAddress("0000:01:10.2")),
        vfs_max=7,
        link=Link(2500, 4, 16000, 8),
        resets=("flr", "bus"),
    )
    vf = functions[PciAddress("0000:01:10.2")]
    assert (vf.pf, vf.vf_index, vf.parent, vf.group) == (NIC, 1, PORT, 6)
    assert (vf.driver, vf.driver_override, vf.node) == (None, "vfio-pci", None)
    port = functions[PORT]
    assert (port.bridge, port.acs, port.parent, port.driver) == (True, True, None, "pcieport")
    assert [str(use) for use in port.uses] == ["bridge: 3 functions directly behind it"]
    plain = functions[PciAddress("0000:00:02.0")]
    assert plain == PciFunction(
        PciAddress("0000:00:02.0"), 0x1234, 0x11E8, 0x1AF4, 0x1100, class_code=0xFF00
    )


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("2.5 GT/s PCIe", 2500),
        ("8.0 GT/s PCIe", 8000),
        ("8 GT/s", 8000),  # Linux before 5.7
        ("64.0 GT/s PCIe", 64000),
        ("Unknown", 0),
        ("Unknown speed", 0),
    ],
)
def test_link_speed(fake: FakeSys, text: str, speed: int) -> None:
    fake.function(NIC, current_link_speed=text, current_link_width="255")
    link = fake.read()[NIC].link
    assert (link.speed, link.width) == (speed, 0)


@pytest.mark.parametrize(
    ("space", "limit"),
    [
        (express(2), 5000),
        (express(3), 0),  # as fast as what is below can be
        (express(4), 0),
        (express(2, version=1), None),
        (express(0), None),
        (express(2)[:64], None),  # what others than root may read
        (express(2)[:0x90], None),
        (config(0x81), None),
        (b"\xff" * 4096, None),
    ],
)
def test_what_a_link_is_held_to(fake: FakeSys, space: bytes, limit: int | None) -> None:
    port = fake.port(PORT, config=space, max_link_speed="16.0 GT/s PCIe")
    fake.function(NIC, port, config=space, max_link_speed="8.0 GT/s PCIe")
    found = fake.read()
    assert found[PORT].limit == limit


FATAL = "Undefined 0\nDLP {}\nSDES 0\nTOTAL_ERR_FATAL {}"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, None),
        ({"aer_dev_fatal": FATAL.format(0, 0)}, 0),
        ({"aer_dev_fatal": FATAL.format(1, 2)}, 2),
        ({"aer_dev_fatal": FATAL.format(1, 1), "aer_rootport_total_err_fatal": "3"}, 4),
        ({"aer_rootport_total_err_fatal": "3"}, 3),
        ({"aer_dev_fatal": ""}, None),
    ],
)
def test_fatal_errors(fake: FakeSys, files: dict[str, str], count: int | None) -> None:
    fake.port(PORT, **files)
    assert fake.read()[PORT].fatal_errors == count


def test_nothing_but_a_port_is_held_to_anything(fake: FakeSys) -> None:
    space = bytearray(express(1))
    space[0x0E] = 0
    fake.function(NIC, config=bytes(space), max_link_speed="8.0 GT/s PCIe")
    assert fake.read()[NIC].limit is None


@pytest.mark.parametrize(
    ("space", "isolates"),
    [
        (config(1, acs(0x5F, 0x1D)), True),
        (config(1, SERIAL, acs(0x5F, 0x1D)), True),
        (config(1, acs(0x5F, 0x0D)), False),
        (config(1, acs(0x5F, 0x00)), False),
        # what a device does not offer it does not do: nothing is left to be switched on
        (config(1, acs(0x00, 0x00)), True),
        (config(1, acs(0x01, 0x01)), True),
        (config(1, SERIAL), None),
        (config(1), None),
        (config(1, acs(0x5F, 0x1D))[:64], None),  # what others than root may read
        (config(1, acs(0x5F, 0x1D))[:0x106], None),
        (config(1, acs(0x5F, 0x1D))[:0x102], None),
        (b"", None),
        (b"\xff" * 4096, None),  # a device that is off the bus
    ],
)
def test_acs(fake: FakeSys, space: bytes, isolates: bool | None) -> None:
    fake.function(NIC, config=space)
    assert fake.read()[NIC].acs is isolates


def test_capabilities_that_lead_in_a_circle_end(fake: FakeSys) -> None:
    space = bytearray(config(1, SERIAL))
    space[0x100:0x104] = (0x03 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    fake.function(NIC, config=bytes(space))
    assert fake.read()[NIC].acs is None


def test_a_bridge_is_one_by_its_header_or_else_by_its_class(fake: FakeSys) -> None:
    fake.function("0000:00:01.0", **{"class": "0x060400"})
    fake.function("0000:00:02.0", config=config(1)[:64])
    fake.function("0000:00:03.0", config=config(0x80)[:64], **{"class": "0x060400"})
    assert [f.bridge for f in fake.read().values()] == [True, True, False]


def test_a_root_bus_of_its_own_below_a_function(fake: FakeSys) -> None:
    """As Intel's VMD has it: what is on it is behind the controller."""
    controller = fake.function("0000:00:0e.0")
    fake.function("10000:00:02.0", f"{controller}/pci10000:00")
    functions = fake.read()
    assert functions[PciAddress("10000:00:02.0")].parent == "0000:00:0e.0"
    assert [str(u) for u in functions[PciAddress("0000:00:0e.0")].uses] == [
        "bridge: a function directly behind it"
    ]


def test_a_vf_that_is_gone_is_not_the_pfs(fake: FakeSys) -> None:
    igb_behind_a_port(fake)
    (fake.sys / "bus/pci/devices/0000:01:10.0").unlink()
    assert fake.read()[NIC].vfs == (PciAddress("0000:01:10.2"),)
    assert fake.read()[PciAddress("0000:01:10.2")].vf_index == 1


def test_what_a_pf_keeps_for_its_vfs(fake: FakeSys) -> None:
    igb_behind_a_port(fake)
    vf, other, kept = PciAddress("0000:01:10.0"), PciAddress("0000:01:10.2"), VfSettings(vlan=7)
    gone = PciAddress("0000:01:10.4")
    asked = []

    def read(pf: PciAddress) -> dict[PciAddress, VfSettings]:
        asked.append(pf)
        return {vf: kept, gone: kept}

    functions = SysfsDeviceTree(fake.sys, fake.proc, read).read_functions()
    assert asked == [NIC]
    assert functions[vf].settings == kept
    assert functions[other].settings is None
    assert gone not in functions


def test_a_pf_that_does_not_answer_hides_no_function(fake: FakeSys) -> None:
    igb_behind_a_port(fake)

    def read(pf: PciAddress) -> dict[PciAddress, VfSettings]:
        raise DeviceError(f"ip link show of {pf}: no")

    assert SysfsDeviceTree(fake.sys, fake.proc, read).read_functions() == fake.read()


def test_uses_are_those_of_the_moment(fake: FakeSys) -> None:
    igb_behind_a_port(fake)
    uses = CurrentUses(fake.sys, fake.proc)
    assert uses(NIC) == ()
    nic = (fake.sys / "bus/pci/devices" / NIC).resolve().relative_to(fake.sys.resolve())
    fake.device("net", f"{nic}/net/eth7", flags="0x1003")
    assert uses(NIC) == ("network: eth7 is up",)
    assert uses(PciAddress("0000:00:02.0")) == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vendor", "intel"),
        ("class", ""),
        ("numa_node", "none"),
        ("sriov_totalvfs", "many"),
        ("current_link_speed", "fast"),
        ("current_link_width", "wide"),
        ("aer_dev_fatal", "TOTAL_ERR_FATAL many"),
        ("device", b"\xff\xfe"),
    ],
)
def test_a_malformed_file_is_named(fake: FakeSys, name: str, text: str | bytes) -> None:
    home = fake.function(NIC, **{name: text})
    with pytest.raises(InvalidValueError, match=f"{home}/{name}"):
        fake.read()


def test_an_iommu_group_without_a_number_is_named(fake: FakeSys) -> None:
    home = fake.function(NIC)
    fake.link(f"{home}/iommu_group", "kernel/iommu_groups/odd")
    with pytest.raises(InvalidValueError, match=f"{home}/iommu_group"):
        fake.read()


def test_a_host_without_pci(fake: FakeSys) -> None:
    assert fake.read() == {}


def test_this_machine() -> None:
    functions = SysfsDeviceTree().read_functions()
    assert set(functions) == {p.name for p in Path("/sys/bus/pci/devices").iterdir()}


ANYTHING = settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_or_error(
    fake: FakeSys,
) -> tuple[InvalidValueError | None, dict[PciAddress, PciFunction]]:
    try:
        return None, fake.read()
    except InvalidValueError as error:
        return error, {}


@ANYTHING
@given(data=st.data())
def test_missing_and_garbled_files_never_crash(data: st.DataObject) -> None:
    """Whatever is missing or wrong: the function as far as it is known, left out, or named."""
    with tempfile.TemporaryDirectory() as directory:
        fake = FakeSys(Path(directory))
        igb_behind_a_port(fake)
        fake.device("net", f"devices/pci0000:00/{PORT}/{NIC}/net/eth0", flags="0x1003")
        whole = set(fake.read())
        entries = sorted(p for p in Path(directory).rglob("*") if p.is_symlink() or p.is_file())
        touched = data.draw(st.lists(st.sampled_from(entries), unique=True, max_size=6))
        for path in touched:
            path.unlink()
            if data.draw(st.booleans()):
                path.write_bytes(data.draw(st.binary(max_size=12)))
        error, found = read_or_error(fake)
        if error is not None:
            assert error.field in {str(path) for path in touched}
        else:
            assert set(found) <= whole
            lost = whole - set(found)
            named = {part for path in touched for part in path.parts}
            assert lost <= named


class VanishingTree(SysTree):
    """A function goes away at the n-th look."""

    def __init__(self, root: Path, gone: str, looks: int) -> None:
        super().__init__(root)
        self.gone, self.looks = gone, looks

    def _look(self) -> None:
        self.looks -= 1
        link = self.root / "bus/pci/devices" / self.gone
        if self.looks == 0 and link.is_symlink():
            shutil.rmtree(link.resolve())
            link.unlink()

    def data(self, path: str, limit: int) -> bytes | None:
        self._look()
        return super().data(path, limit)

    def text(self, path: str) -> str | None:
        self._look()
        return super().text(path)

    def link(self, path: str) -> str | None:
        self._look()
        return super().link(path)


@ANYTHING
@given(looks=st.integers(1, 140), gone=st.sampled_from([NIC, "0000:01:10.0", "0000:00:02.0"]))
def test_a_function_that_vanishes_is_whole_or_left_out(looks: int, gone: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fake = FakeSys(Path(directory))
        igb_behind_a_port(fake)
        fake.device("net", f"devices/pci0000:00/{PORT}/{NIC}/net/eth0", flags="0x1003")
        before = fake.read()
        after = read_functions(VanishingTree(fake.sys, gone, looks), SysTree(fake.proc))
        address = PciAddress(gone)
        assert set(before) - set(after) <= {address}
        if address in after and address != NIC:
            assert after[address] == before[address]
        elif address in after:
            assert after[NIC].uses == before[NIC].uses
            assert after[NIC].driver == before[NIC].driver
