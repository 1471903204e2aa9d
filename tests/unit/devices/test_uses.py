"""How the host uses a function: each kind alone, on trees written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.model.device import PciAddress

if TYPE_CHECKING:
    from fakesys import FakeSys

ONE, TWO = PciAddress("0000:00:01.0"), PciAddress("0000:00:02.0")
VIRTUAL = "devices/virtual/block"


@pytest.fixture
def home(fake: FakeSys) -> str:
    """Where the function is that the tests use; another one beside it is never used."""
    fake.function(TWO)
    return fake.function(ONE)


def uses(fake: FakeSys) -> list[str]:
    functions = fake.read()
    assert functions[TWO].uses == ()
    return [str(use) for use in functions[ONE].uses]


def test_a_disk_that_nobody_uses(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/nvme/nvme0/nvme0n1", "259:0")
    fake.mount("259:7", "/")
    assert uses(fake) == []
    assert fake.read()[ONE].interfaces == ("nvme0n1",)


def test_a_mounted_disk(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/virtio1/block/vda", "254:0")
    fake.mount("254:0", "/srv/with\\040blank")
    assert uses(fake) == ["mounted: vda on /srv/with blank"]


def test_many_mounts_of_one_disk_are_one_use(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/virtio1/block/vda", "254:0")
    for point in ("/var/lib/containers", "/", "/srv"):
        fake.mount("254:0", point)
    assert uses(fake) == ["mounted: vda on / and 2 more"]


def test_a_mounted_partition_of_a_usb_stick(fake: FakeSys, home: str) -> None:
    disk = fake.disk(f"{home}/usb1/1-1/1-1:1.0/host6/target6:0:0/6:0:0:0/block/sda", "8:0")
    fake.disk(f"{disk}/sda1", "8:1")
    fake.mount("8:1", "/media")
    assert uses(fake) == ["mounted: sda1 on /media"]
    assert fake.read()[ONE].interfaces == ("sda",)


def test_a_logical_volume_on_a_partition(fake: FakeSys, home: str) -> None:
    disk = fake.disk(f"{home}/nvme/nvme0/nvme0n1", "259:0")
    fake.disk(f"{disk}/nvme0n1p3", "259:3", holders=("dm-0",))
    fake.disk(f"{VIRTUAL}/dm-0", "253:0", holders=("dm-1",))
    fake.write(f"{VIRTUAL}/dm-0/dm/name", "luks-root")
    fake.disk(f"{VIRTUAL}/dm-1", "253:1")
    fake.write(f"{VIRTUAL}/dm-1/dm/name", "vg-root")
    fake.mount("253:1", "/")
    assert uses(fake) == [
        "mounted: vg-root on /",
        "stacked: luks-root is part of dm-1",
        "stacked: nvme0n1p3 is part of dm-0",
    ]


def test_a_raid_that_is_not_mounted(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/ata1/host0/target0:0:0/0:0:0:0/block/sda", "8:0", holders=("md0",))
    fake.disk(f"{VIRTUAL}/md0", "9:0")
    assert uses(fake) == ["stacked: sda is part of md0"]


def test_holders_in_a_circle_end(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/block/sda", "8:0", holders=("dm-0",))
    fake.disk(f"{VIRTUAL}/dm-0", "253:0", holders=("dm-0", "sda"))
    assert "stacked: sda is part of dm-0" in uses(fake)


@pytest.mark.parametrize("name", ["/dev/nvme0n1p2", "/dev/dm-3"])
def test_swap(fake: FakeSys, home: str, name: str) -> None:
    disk = fake.disk(f"{home}/nvme/nvme0/nvme0n1", "259:0")
    fake.disk(f"{disk}/nvme0n1p2", "259:2", holders=("dm-3",))
    fake.disk(f"{VIRTUAL}/dm-3", "253:3")
    fake.swap(name)
    assert f"swap: {name.removeprefix('/dev/')}" in uses(fake)


def test_btrfs_has_a_device_number_of_its_own(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/virtio1/block/vda", "254:0")
    fake.mount("0:33", "/", source="/dev/vda", kind="btrfs")
    assert uses(fake) == ["mounted: vda on /"]


def test_a_second_device_of_a_btrfs(fake: FakeSys, home: str) -> None:
    fake.disk(f"{home}/virtio1/block/vda", "254:0")
    fake.link("fs/btrfs/0f2d1f5c-7b6a-4c30-8f0e-3a3d6f9f2b11/devices/vda", f"{home}/block/vda")
    fake.mount("0:33", "/", source="/dev/vdb", kind="btrfs")
    assert uses(fake) == ["mounted: vda is part of a mounted btrfs"]


def test_nvme_with_multipath(fake: FakeSys, home: str) -> None:
    """The namespace is no child of the controller; only its hidden path is."""
    fake.disk(f"{home}/nvme/nvme3/nvme0c3n1", "0:0")
    head = fake.disk("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    fake.disk(f"{head}/nvme0n1p1", "259:1")
    fake.mount("259:1", "/srv")
    assert uses(fake) == ["mounted: nvme0n1p1 on /srv"]
    assert fake.read()[ONE].interfaces == ("nvme0n1",)


def test_an_interface(fake: FakeSys, home: str) -> None:
    fake.device("net", f"{home}/virtio2/net/eth0", flags="0x1002")
    assert uses(fake) == []
    assert fake.read()[ONE].interfaces == ("eth0",)
    fake.write(f"{home}/virtio2/net/eth0/flags", "0x1003")
    assert uses(fake) == ["network: eth0 is up"]


def test_a_part_of_a_bridge(fake: FakeSys, home: str) -> None:
    fake.device("net", f"{home}/net/eth0", flags="0x1002")
    fake.link(f"{home}/net/eth0/master", "devices/virtual/net/br0")
    assert uses(fake) == ["network: eth0 is part of br0"]


def test_the_boot_display(fake: FakeSys, home: str) -> None:
    fake.write(f"{home}/boot_vga", "0")
    assert uses(fake) == []
    fake.write(f"{home}/boot_vga", "1")
    assert uses(fake) == ["console: boot display"]


@pytest.mark.parametrize(
    ("name", "bound", "used"),
    [
        ("(M) frame buffer device", "1", True),
        ("(M) frame buffer device", "0", False),
        ("(S) dummy device", "1", False),
    ],
)
def test_a_framebuffer_console(fake: FakeSys, home: str, name: str, bound: str, used: bool) -> None:
    fake.device("graphics", f"{home}/graphics/fb0")
    fake.device("vtconsole", "devices/virtual/vtconsole/vtcon1", name=name, bind=bound)
    assert uses(fake) == (["console: console on fb0"] if used else [])


def test_a_serial_console(fake: FakeSys, home: str) -> None:
    fake.device("tty", f"{home}/tty/ttyS4")
    fake.device("tty", "devices/virtual/tty/console", active="tty0 ttyS4")
    assert uses(fake) == ["console: kernel messages on ttyS4"]
    fake.write("devices/virtual/tty/console/active", "tty0")
    assert uses(fake) == []
