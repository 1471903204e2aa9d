"""The pure parts of labs: command line, recipe, records, consoles, targets of faults."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from virtfabric.model.errors import InvalidValueError
from virtfabric.shim import guestimage
from virtfabric.shim.cache import BuildError, ensure_built, run_tool
from virtfabric.shim.guestimage import GuestImage
from virtfabric.shim.kvmprobe import can_nest
from virtfabric.shim.lab import box, debian, faults, recipe
from virtfabric.shim.lab import remote as remote_module
from virtfabric.shim.lab.boot import is_ready, read_told
from virtfabric.shim.lab.image import LabImage
from virtfabric.shim.lab.lab import State, choose_accel, read_status
from virtfabric.shim.lab.machine import format_arguments
from virtfabric.shim.lab.outer import OuterQemu, choose_outer
from virtfabric.shim.lab.payload import choose_files
from virtfabric.shim.lab.place import LabError, Place, Record, find_places, place_of
from virtfabric.shim.lab.remote import Keys, Remote
from virtfabric.shim.topology.kernel import kernel_arguments
from virtfabric.shim.topology.model import Cpu
from virtfabric.shim.topology.needs import device_needs
from virtfabric.shim.topology.shipped import read_shipped_topology, shipped_topologies

IMAGE = LabImage(Path("/c/vmlinux"), Path("/c/initrd"), Path("/c/root.ext4"))
RECORD = Record("one", "small", 2222, 0.0, "QEMU 10", "tcg")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("VIRTFABRIC_LABS", str(tmp_path))
    place = place_of("one")
    place.directory.mkdir()
    return place


@pytest.mark.parametrize("name", shipped_topologies())
def test_the_command_line_has_the_root_first_and_nothing_twice(place: Place, name: str) -> None:
    topology = read_shipped_topology(name)
    words = format_arguments(topology, IMAGE, place, accel="tcg", port=2222, epoch=7)
    disks = [word for word in words if word.startswith("virtio-blk-pci")]
    assert "drive=root" in disks[0], "the initrd mounts vda as the root"
    assert "drive=payload" in disks[1], "and vdb as the payload"
    assert all("snapshot=on" in word for word in words if word.startswith("file=/c/root"))
    assert words.count("-machine") == words.count("-smp") == words.count("-append") == 1
    assert "restrict=on,hostfwd=tcp:127.0.0.1:2222-:22" in " ".join(words)
    told = words[words.index("-append") + 1].split()
    assert {*kernel_arguments(topology), "vflab.name=one", "vflab.epoch=7"} <= {*told}


def test_kvm_needs_a_split_irqchip_for_the_iommu(place: Place) -> None:
    topology = read_shipped_topology("small")
    words = format_arguments(topology, IMAGE, place, accel="kvm", port=1, epoch=0)
    assert words[words.index("-accel") + 1] == "kvm,kernel-irqchip=split"
    assert words[words.index("-cpu") + 1].startswith("host,")


def test_a_comma_in_a_path_is_no_end_of_it(tmp_path: Path) -> None:
    place = Place(tmp_path / "a,b" / "one")
    image = replace(IMAGE, disk=Path("/c,d/root.ext4"))
    topology = read_shipped_topology("card")
    words = format_arguments(topology, image, place, accel="tcg", port=2222, epoch=7)
    escaped = str(place.directory).replace(",", ",,")
    told = [word for word in words if escaped in word]
    parts = [part.partition("=")[2] for word in told for part in re.split("(?<!,),(?!,)", word)]
    assert {f"{escaped}/payload.ext4", f"{escaped}/console", f"{escaped}/console.log"} <= {*parts}
    assert [word.partition(",server")[0] for word in told if word.startswith("unix:")] == [
        f"unix:{escaped}/{name}" for name in ("qmp", "qmp.card0", "qmp.card1")
    ]
    (root,) = (word for word in words if word.startswith("file=/c,,d/root.ext4,"))
    assert "snapshot=on" in root
    assert words[words.index("-pidfile") + 1] == str(place.pid_file), "QEMU takes it as it is"


def fake_qemu(directory: Path, version: str) -> OuterQemu:
    """A program that answers as a QEMU of this version, with every device of the lab with CXL."""
    program = directory / "qemu-system-x86_64"
    needs = device_needs(read_shipped_topology("cxl"))
    devices = "".join(f'name "{need.driver}", bus PCI\n' for need in needs)
    has = "".join(f"  {name}=<str>\n" for need in needs for name in need.properties)
    program.write_text(
        f"#!/bin/sh\ncase $* in\n--version) echo 'QEMU emulator version {version} (Debian)' ;;\n"
        f"'-device help') echo '{devices}' ;;\n*) echo '{has}' ;;\nesac\n"
    )
    program.chmod(0o755)
    return OuterQemu((str(program),), "a test's")


@pytest.mark.parametrize(
    ("version", "accel"),
    [("7.2.22", "tcg with one thread"), ("10.0.13", "tcg with one thread"), ("11.1.2", "tcg")],
)
def test_vcpus_share_a_thread_where_several_hang(tmp_path: Path, version: str, accel: str) -> None:
    outer = fake_qemu(tmp_path, version)
    cxl = read_shipped_topology("cxl")
    guest = GuestImage(Path("/c/vmlinux"), Path("/c/initrd"))
    assert choose_accel(cxl, guest, outer) == (accel, "")
    alone = replace(cxl, cpu=Cpu(sockets=1, cores=1, threads=1))
    assert choose_accel(alone, guest, outer) == ("tcg", "")


@pytest.mark.parametrize(
    ("module", "nested", "accel"),
    [
        ("kvm_intel", "Y\n", "kvm"),
        ("kvm_intel", "N\n", "tcg"),
        ("kvm_amd", "1\n", "kvm"),
        ("kvm_amd", "0\n", "tcg"),
        ("other", "Y\n", "tcg"),
    ],
)
def test_kvm_that_lets_no_guest_nest_carries_no_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, nested: str, accel: str
) -> None:
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / f"kvm-{boot}").write_text("yes")
    parameters = tmp_path / module / "parameters"
    parameters.mkdir(parents=True)
    (parameters / "nested").write_text(nested)
    guest = GuestImage(Path("/c/vmlinux"), Path("/c/initrd"))

    def choose(name: str) -> tuple[str, str]:
        return choose_accel(
            read_shipped_topology(name),
            guest,
            fake_qemu(tmp_path, "11.1.2"),
            nests=lambda: can_nest(tmp_path),
        )

    chosen, why = choose("small")
    assert chosen == accel
    assert ("nested=0" in why) == (accel == "tcg")
    assert choose("cxl") == ("tcg", ""), "TCG whatever KVM can do"


def test_a_qemu_whose_threads_hang_is_passed_over_where_they_cannot_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no mmdebstrap: another QEMU cannot be unpacked
    monkeypatch.setenv("VIRTFABRIC_CACHE", str(tmp_path / "cache"))
    needs = device_needs(read_shipped_topology("cxl"))
    old = fake_qemu(tmp_path, "10.0.13")
    assert choose_outer(needs, [].append).argv == old.argv
    with pytest.raises(BuildError, match="can carry") as caught:
        choose_outer(needs, [].append, threads=True)
    assert caught.value.log[0] == "the system's: QEMU 10.0.13 has no safe threads"
    assert [line for line in caught.value.log[1:] if "mmdebstrap is not installed" in line]
    new = fake_qemu(tmp_path, "11.1.2")
    assert choose_outer(needs, [].append, threads=True).argv == new.argv


@pytest.mark.parametrize("name", ["", "-x", "Upper", "a/b", "a.b", "x" * 32, "ümlaut"])
def test_what_cannot_be_a_labs_name(name: str) -> None:
    with pytest.raises(InvalidValueError, match="name"):
        place_of(name)


def test_a_record_survives_and_a_torn_one_is_none(place: Place) -> None:
    assert place.read_record() is None
    place.write_record(RECORD)
    assert place.read_record() == RECORD
    (place.directory / "lab.json").write_text('{"name": "o')
    assert place.read_record() is None
    assert [found.name for found in find_places()] == ["one"]


def test_a_reused_process_number_is_no_lab(place: Place) -> None:
    assert place.read_pid() is None
    place.pid_file.write_text("1\n")
    assert place.read_pid() is None


def test_one_command_at_a_time_starts_or_ends_a_lab(place: Place) -> None:
    with place.locked(), pytest.raises(LabError, match="is at work on it"), place.locked():
        pass


def test_what_a_console_tells(place: Place) -> None:
    assert read_told(place) == []
    place.console_log.write_bytes(b"[ 0.7] noise\r\nVFLAB 12.61 mounted\r\nVFLAB failed mount\r\n")
    assert read_told(place) == ["12.61 s: mounted", "failed mount"]
    assert not is_ready(place)
    place.console_log.write_bytes(b"VFLAB 22.10 ready\r\n\xff\x1b[?2004hroot@one:~# ")
    assert is_ready(place)


def test_a_dead_lab_has_its_last_words(place: Place) -> None:
    assert read_status(place).last_words == ()
    place.qemu_log.write_bytes(b"first\n" * 50 + b"Bail out! \xff igb.c:1: assertion failed\n")
    status = read_status(place)
    assert status.state is State.DEAD
    assert len(status.last_words) == 25
    assert status.last_words[-1].startswith("Bail out!")
    place.cpu_log.write_text("CPU Reset (CPU 0)\nEAX=0\nTriple fault\n")
    assert read_status(place).last_words[-2:] == (status.last_words[-1], "Triple fault")


def test_the_recipes_keys_follow_what_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (recipe.format_recipe_key, box._format_base_key)
    before = [key() for key in keys]
    assert before == [key() for key in keys]
    for module, name, value in (
        (recipe, "PACKAGES", (*recipe.PACKAGES, "cowsay")),
        (recipe, "_VERSION", 0),
        (debian, "MIRROR", "http://mirror.example/debian"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert all(key() != old for key, old in zip(keys, before, strict=True)), name
    for module, key in ((box, box._format_base_key), (guestimage, guestimage.format_recipe_key)):
        old = key()
        monkeypatch.setattr(module, "_VERSION", 0)
        assert key() != old


def test_the_payload_carries_programs_and_configuration() -> None:
    files = {place: (text, mode) for place, text, mode in choose_files()}
    assert files["lab/init"][1] == files["bin/virtfabricd"][1] == 0o755
    assert "HostKey /opt/virtfabric/lab/host_key" in files["lab/sshd_config"][0]


def test_ssh_trusts_one_key_and_copies_either_way(place: Place, tmp_path: Path) -> None:
    remote = Remote(place, RECORD, Keys(tmp_path))
    argv = remote.format_argv(["echo", "a b", "$x"])
    assert argv[0] == "ssh"
    assert argv[-1] == "echo 'a b' '$x'"
    assert "StrictHostKeyChecking=yes" in argv
    assert remote.format_copy(":/a", "/b")[-2:] == ["root@127.0.0.1:/a", "/b"]
    assert remote.format_copy("/b", ":/a")[-2:] == ["/b", "root@127.0.0.1:/a"]


def test_ssh_finds_keys_and_socket_whatever_their_paths_are_like(tmp_path: Path) -> None:
    odd = tmp_path / """a 'b' "c" %d \\e"""
    remote = Remote(Place(odd / "one"), RECORD, Keys(odd))
    ssh, *options = remote.format_argv([])
    done = subprocess.run([ssh, "-G", *options], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found["userknownhostsfile"] == f"{odd}/known_hosts"
    assert found["controlpath"] == f"{odd}/one/ssh"
    assert found["identityfile"].replace("%%", "%") == f"{odd}/client", "shown before it is read"


def test_a_lab_that_hangs_is_one_that_cannot_be_reached(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/sh\nfor last; do :; done\n[ "$last" != true ] || exec sleep 60\nexit 255'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(remote_module, "_ANSWER_S", 0.5)
    with pytest.raises(LabError, match="lab one cannot be reached"):
        Remote(place, RECORD, Keys(tmp_path)).run("uptime", timeout_s=30)


def test_every_fault_says_what_it_does_and_has_targets_somewhere() -> None:
    topologies = [read_shipped_topology(name) for name in shipped_topologies()]
    for name, fault in faults.FAULTS.items():
        assert fault.name == name
        assert fault.does
        assert fault.seen
        assert any(fault.choose(topology) for topology in topologies), name


def test_a_fault_is_refused_where_there_is_nothing_to_break(place: Place, tmp_path: Path) -> None:
    remote = Remote(place, RECORD, Keys(tmp_path))
    scene = faults.Scene(place, read_shipped_topology("small"), remote)
    with pytest.raises(InvalidValueError, match="this topology has none"):
        faults.inject_fault(faults.find_fault("cxl-poison"), scene, None)
    with pytest.raises(InvalidValueError, match="this topology has none"):
        faults.inject_fault(faults.find_fault("cxl-poison"), scene, "nonsense")
    for name in ("libvirtd-crash", "agent-kill"):
        with pytest.raises(InvalidValueError, match=f"nonsense.*{name} takes none"):
            faults.inject_fault(faults.find_fault(name), scene, "nonsense")
    with pytest.raises(InvalidValueError, match="is no NUMA node of this lab"):
        faults.inject_fault(faults.find_fault("memory-pressure"), scene, "7")
    with pytest.raises(InvalidValueError, match="is not a number of seconds"):
        faults.inject_fault(faults.find_fault("clock-jump"), scene, "soon")
    with pytest.raises(InvalidValueError, match="is not one"):
        faults.find_fault("earthquake")


def test_a_build_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "things" / "key"

    def fails(scratch: Path) -> Path:
        (scratch / "half").write_text("")
        raise BuildError("no luck")

    with pytest.raises(BuildError, match="no luck"):
        ensure_built(final, fails)
    assert [path.name for path in final.parent.iterdir()] == ["lock"]

    def works(scratch: Path) -> Path:
        (scratch / "out").mkdir()
        (scratch / "out" / "f").write_text("done")
        return scratch / "out"

    assert (ensure_built(final, works) / "f").read_text() == "done"
    assert (ensure_built(final, fails) / "f").read_text() == "done", "it is there: nothing is built"


def test_a_tool_that_fails_or_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is not installed"):
        run_tool(["no-such-tool-here"], tmp_path)
    with pytest.raises(BuildError, match="ended with 3") as caught:
        run_tool(["sh", "-c", "echo why >&2; exit 3"], tmp_path)
    assert caught.value.log == ("why",)
