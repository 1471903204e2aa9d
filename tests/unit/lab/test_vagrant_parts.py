"""The pure parts of the Vagrant box: settings, guests, what is put in."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from virtfabric.domxml.policy import parse_policy
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.units import MIB, Bytes
from virtfabric.shim.guestimage import GuestImage
from virtfabric.shim.lab import recipe
from virtfabric.shim.lab.box import Box
from virtfabric.shim.lab.boxguests import GUESTS, format_box_guest
from virtfabric.shim.lab.outer import OuterQemu
from virtfabric.shim.lab.recipe import CMDLINE
from virtfabric.shim.lab.vagrantbox import format_settings
from virtfabric.shim.lab.vagrantdisks import choose_state, read_qemu_user, write_backing_files
from virtfabric.shim.topology.shipped import (
    read_shipped_topology,
    read_topology,
    shipped_topologies,
)
from virtfabric.shim.topology.text import parse_topology
from virtfabric.shim.topology.vagrant import format_vagrant_settings

BOX = Box("virtfabric-lab-1", Path("/c/lab.box"), Path("/c/vmlinux"), Path("/c/initrd"))
POLICY = "{urn:virtfabric:policy:1}policy"


@pytest.mark.parametrize("name", shipped_topologies())
def test_a_topology_with_cxl_memory_is_never_carried_by_kvm(name: str) -> None:
    topology = read_shipped_topology(name)
    text = format_settings(
        topology, BOX, default_driver="kvm", emulator=Path("/c/qemu"), state=Path("/c/state")
    )
    settings = json.loads(text)
    assert settings["driver"] == ("kvm" if topology.cxl is None else "qemu")
    assert sorted(settings["drivers"]) == (["kvm", "qemu"] if topology.cxl is None else ["qemu"])
    assert settings["box"]["name"] == "virtfabric-lab-1"
    told = settings["provider"]["kernel_arguments"]
    assert settings["cmdline"].split() == [*CMDLINE.split(), *told]
    assert settings["provider"] == json.loads(format_vagrant_settings(topology, Path("/c/state")))


def test_a_node_of_one_cpu_is_a_run_for_vagrant() -> None:
    topology = parse_topology(
        json.dumps(
            {
                "version": 1,
                "cpu": {"sockets": 2, "cores": 1, "threads": 1},
                "nodes": [
                    {"id": 0, "memory": "256MiB", "cpus": "0"},
                    {"id": 1, "memory": "256MiB", "cpus": "1"},
                ],
            }
        )
    )
    settings = json.loads(format_vagrant_settings(topology, Path("/s")))
    assert [node["cpus"] for node in settings["numa_nodes"]] == ["0-0", "1-1"]


def test_a_topology_by_name_or_file(tmp_path: Path) -> None:
    assert read_topology("small") == ("small", read_shipped_topology("small"))
    own = tmp_path / "own.json"
    own.write_text('{"version": 1, "cpu": {"sockets": 1, "cores": 1, "threads": 1}, "memory": "1"}')
    with pytest.raises(InvalidValueError, match="memory"):
        read_topology(str(own))
    with pytest.raises(InvalidValueError, match="cannot be read"):
        read_topology(str(tmp_path / "missing.json"))
    own.write_text('{"version": 1, "description": "für alle"}', encoding="latin-1")
    with pytest.raises(InvalidValueError, match="is not UTF-8 from byte 32 on"):
        read_topology(str(own))


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_a_boxs_guest_has_a_valid_policy_that_it_meets(guest) -> None:  # type: ignore[no-untyped-def]
    xml = format_box_guest(guest, GuestImage(Path("/c/vmlinux"), Path("/c/initrd")), "kvm")
    domain = etree.fromstring(xml)
    policy = parse_policy(domain.find(f"metadata/{POLICY}"))
    assert policy.priority == guest.priority
    assert policy.memory.reservation == int(domain.findtext("memory")) * MIB
    assert policy.cpu.limit is not None
    assert policy.cpu.reservation <= policy.cpu.limit
    assert guest.plugged_mib <= guest.virtio_mem_mib
    assert guest.plugged_mib % 128 == 0, "a guest takes virtio-mem in sections of 128 MiB"


@pytest.mark.parametrize("name", ["initrd-init", "setup"])
def test_the_boxs_scripts_are_shell(name: str) -> None:
    text = recipe.read_file(f"box/{name}")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become others")
def test_a_machines_disks_are_libvirts_qemus_and_nobody_elses(tmp_path: Path) -> None:
    def may(user: int, command: str) -> bool:
        who = {"user": user, "group": user, "extra_groups": []}
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False, **who)  # type: ignore[call-overload]
        return bool(done.returncode == 0)

    topology = read_shipped_topology("passthrough")
    disk = tmp_path / f"{topology.nvme[0].id}.disk"
    tmp_path.chmod(0o755)
    disk.touch()
    os.truncate(disk, topology.nvme[0].size)
    disk.chmod(0o666)  # what it had once
    write_backing_files(topology, tmp_path, 4242)
    assert may(4242, f"exec 3<> {disk.name}")
    assert not may(4243, f"exec 3< {disk.name}")
    assert not may(4243, f"exec 3> {disk.name}")
    write_backing_files(topology, tmp_path, None)
    assert not may(4242, f"exec 3< {disk.name}")


def test_a_machines_disk_has_the_size_that_its_topology_says(tmp_path: Path) -> None:
    topology = read_shipped_topology("passthrough")
    nvme = topology.nvme[0]
    disk = tmp_path / f"{nvme.id}.disk"
    disk.write_text("kept")
    os.truncate(disk, nvme.size)
    write_backing_files(topology, tmp_path, None)
    assert disk.open().read(4) == "kept"
    larger = dataclasses.replace(nvme, size=Bytes(4 * nvme.size))
    write_backing_files(dataclasses.replace(topology, nvme=(larger,)), tmp_path, None)
    assert disk.stat().st_size == 4 * nvme.size


def test_the_same_topology_of_two_checkouts_has_disks_of_its_own() -> None:
    first, second = (Path(f"/c/{name}/.vagrant/lab/cxl.json") for name in ("one", "two"))
    assert choose_state("cxl", first) == choose_state("cxl", first)
    assert choose_state("cxl", first) != choose_state("cxl", second)


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ('#user = "libvirt-qemu"\nuser = "root"\n', 0),
        ("user = '+4242'", 4242),
        ('user="4243"', 4243),
        ('user = "no-such-user"', None),
        ('swtpm_user = "4244"\nuser = "0"', 0),
    ],
)
def test_libvirt_says_whom_its_qemu_runs_as(tmp_path: Path, text: str, user: int | None) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_text(text)
    assert read_qemu_user(conf) == user


def test_an_unpacked_qemu_becomes_one_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path))
    (tmp_path / "lab" / "qemu").mkdir(parents=True)
    assert OuterQemu(("/usr/bin/qemu",), "the system's").ensure_emulator() == Path("/usr/bin/qemu")
    carried = OuterQemu(("unshare", "--mount", "--", "echo", "a b"), "unpacked")
    program = carried.ensure_emulator()
    assert program == carried.ensure_emulator()
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert "unshare --user --map-root-user --mount -- echo 'a b' \"$@\"" in program.read_text()
