"""`virtfabric devices record`: what it takes, what it leaves out, what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.pci.inventory import SysfsDeviceTree
from virtfabric.adapters.pci.record import lay_out, record_machine
from virtfabric.cli.main import main
from virtfabric.model.errors import InstallationError, InvalidValueError

if TYPE_CHECKING:
    from pathlib import Path

    from fakesys import FakeSys


@pytest.fixture
def host(fake: FakeSys) -> FakeSys:
    """An NVMe disk with a mounted logical volume, and a NIC that is part of a bridge."""
    space = bytearray(4096)
    space[0x34] = 0x40
    space[0x80:0x88] = b"VPDATA01"
    space[0x100:0x104] = (0x03 | 1 << 16 | 0x140 << 20).to_bytes(4, "little")
    space[0x104:0x10C] = b"SERIALNO"
    space[0x140:0x148] = (0x0D | 1 << 16).to_bytes(4, "little") + bytes([0x5F, 0, 0x1D, 0])
    port = fake.port("0000:00:01.0", config=bytes(space))
    disk = fake.function("0000:01:00.0", port, config=bytes(space), reset_method="flr bus")
    fake.group(disk, 7)
    fake.write(f"{disk}/nvme/nvme0/serial", "S5GXNX0R")
    whole = fake.disk(f"{disk}/nvme/nvme0/nvme0n1", "259:0", holders=("dm-0",))
    fake.write(f"{whole}/wwid", "eui.0025385b")
    fake.disk("devices/virtual/block/dm-0", "253:0")
    fake.write("devices/virtual/block/dm-0/dm/name", "vg-root")
    fake.mount("253:0", "/", source="/dev/mapper/vg-root")
    fake.mount("0:55", "/home/jane/secret", source="tmpfs", kind="tmpfs")
    nic = fake.function("0000:00:02.0")
    fake.device("net", f"{nic}/net/eth0", flags="0x1003", address="52:54:00:aa:bb:cc")
    fake.link(f"{nic}/net/eth0/master", "devices/virtual/net/br0")
    return fake


def record(host: FakeSys, directory: Path) -> int:
    return record_machine(directory, sys=host.sys, proc=host.proc)


def test_a_record_reads_like_the_host(host: FakeSys, tmp_path: Path) -> None:
    assert record(host, tmp_path / "m") == 3
    roots = lay_out(tmp_path / "m", tmp_path / "again")
    assert SysfsDeviceTree(*roots).read_functions() == host.read()
    uses = [str(u) for f in host.read().values() for u in f.uses]
    assert "mounted: vg-root on /" in uses
    assert "network: eth0 is part of br0" in uses


def test_a_record_of_a_record_is_the_same(host: FakeSys, tmp_path: Path) -> None:
    record(host, tmp_path / "m")
    sys, proc = lay_out(tmp_path / "m", tmp_path / "again")
    record_machine(tmp_path / "second", sys=sys, proc=proc)
    assert (tmp_path / "m/tree.json").read_text() == (tmp_path / "second/tree.json").read_text()


def test_what_is_left_out(host: FakeSys, tmp_path: Path) -> None:
    record(host, tmp_path / "m")
    text = (tmp_path / "m/tree.json").read_text()
    for secret in ("S5GXNX0R", "eui.", "52:54:00", "/home/jane", "relatime"):
        assert secret not in text
    for secret in (b"SERIALNO", b"VPDATA01"):
        assert secret.hex() not in text
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "tree.json"]
    assert "3 PCIe functions" in (tmp_path / "m/README.md").read_text()


def test_a_directory_that_is_not_empty(host: FakeSys, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/mine").write_text("keep")
    with pytest.raises(InvalidValueError, match="is not empty"):
        record(host, tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mine"]
    with pytest.raises(InvalidValueError, match="is not a directory"):
        record(host, tmp_path / "m/mine")
    assert (tmp_path / "m/mine").read_text() == "keep"


def test_an_empty_directory_will_do(host: FakeSys, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert record(host, tmp_path / "m") == 3


def test_a_directory_that_cannot_be_made(host: FakeSys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstallationError, match="Not a directory"):
        record(host, tmp_path / "file/m")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1}', '{"version": 1, "sys": [], "proc": {}}'],
)
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(InvalidValueError, match=r"tree\.json"):
        lay_out(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("place", ["../outside", "/tmp/virtfabric-outside", "a/../../outside"])
@pytest.mark.parametrize("part", ["files", "pieces", "links", "names"])
def test_a_record_writes_nowhere_else(tmp_path: Path, place: str, part: str) -> None:
    empty = {"files": {}, "links": {}, "pieces": {}, "names": []}
    content = {"files": "x", "links": "y", "pieces": {"0": "00"}}
    bad = {part: [place] if part == "names" else {place: content[part]}}
    tree = {"version": 1, "sys": empty | bad, "proc": empty}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    with pytest.raises(InvalidValueError, match="outside"):
        lay_out(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/outside").exists()
    assert not (tmp_path / "outside").exists()


def test_the_command(host: FakeSys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["devices", "record", "--sys", str(host.sys), "--proc", str(host.proc)]
    assert main([*words, str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["functions"] == 3
    assert main([*words, str(tmp_path / "m")]) == 2
    assert "is not empty" in capsys.readouterr().err
