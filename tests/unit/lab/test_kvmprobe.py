"""Whether KVM runs a guest: what is kept of the answer. The QEMU is a program that prints."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path

import pytest

from virtfabric.shim.guestimage import GuestImage
from virtfabric.shim.kvmprobe import _keep_answer, probe_kvm

IMAGE = GuestImage(Path("/c/vmlinux"), Path("/c/initrd"))
BOOTS = "echo 'Linux version 6.12'; sleep 0.1; echo VFREADY; exec sleep 60"
HANGS = "echo 'Linux version 6.12'; exec sleep 60"
ENDS = "echo 'qemu: cannot set up guest memory' >&2; exit 1"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Host:
    """A host of its own: its programs, its /dev/kvm, its cache."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs, self.cache = directory / "programs", directory / "cache"
        self.device = directory / "kvm"
        self.runs = directory / "runs"
        self.programs.mkdir()
        self.device.touch()
        monkeypatch.setenv("PATH", f"{self.programs}:/usr/bin:/bin")

    def install(self, does: str) -> None:
        qemu = self.programs / "qemu-system-x86_64"
        qemu.write_text(f"#!/bin/sh\necho >> {shlex.quote(str(self.runs))}\n{does}\n")
        qemu.chmod(0o755)

    def probe(self) -> bool:
        return probe_kvm(IMAGE, first_s=5, timeout_s=0.5, cache=self.cache, device=self.device)

    def started(self) -> int:
        return len(self.runs.read_text()) if self.runs.exists() else 0

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("*"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.mark.parametrize(("does", "works"), [(BOOTS, True), (HANGS, False)])
def test_a_boot_is_measured_once(host: Host, does: str, works: bool) -> None:
    host.install(does)
    assert host.probe() == host.probe() == works
    assert host.started() == 1
    assert host.kept() == [f"kvm-{BOOT}"]


def test_a_device_that_comes_later_counts(host: Host) -> None:
    host.install(BOOTS)
    host.device.unlink()
    assert not host.probe()
    host.device.touch()
    assert host.probe()


def test_a_qemu_that_comes_later_counts(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(host.programs))
    assert not host.probe()
    monkeypatch.setenv("PATH", f"{host.programs}:/usr/bin:/bin")
    host.install(BOOTS)
    assert host.probe()


def test_a_qemu_that_could_not_start_a_guest_says_nothing_of_kvm(host: Host) -> None:
    host.install(ENDS)
    assert not host.probe()
    host.install(BOOTS)
    assert host.probe()


def test_a_torn_answer_is_none_and_those_of_earlier_boots_go(host: Host) -> None:
    host.install(BOOTS)
    host.cache.mkdir()
    (host.cache / "kvm-earlier").write_text("no")
    (host.cache / f"kvm-{BOOT}").write_text("")
    assert host.probe()
    assert host.kept() == [f"kvm-{BOOT}"]


def test_an_answer_is_there_whole_whoever_measures(host: Host) -> None:
    """Readers while others write: none finds a file gone, or empty."""
    host.install(BOOTS)
    answer = host.cache / f"kvm-{BOOT}"
    host.probe()
    torn: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                text = answer.read_text()
            except FileNotFoundError:
                text = "gone"
            if text != "yes":
                torn.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        _keep_answer(answer, "yes")
    over.set()
    reader.join()
    assert torn == []
