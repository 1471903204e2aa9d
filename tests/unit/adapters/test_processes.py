"""QEMU's processes as /proc shows them: files stand in for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.libvirt.processes import QemuProcesses

if TYPE_CHECKING:
    from pathlib import Path

PID = 4711


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ("qemu -m 512 -smp 3,maxcpus=4,sockets=4,cores=1,threads=1 -S", 3),
        ("qemu -smp 16 -S", 16),
        ("qemu -smp cpus=2,maxcpus=4", 2),
        ("qemu -smp maxcpus=4", 1),
        ("qemu -m 512", 1),
        ("qemu -smp", 1),
        ("", 1),
    ],
)
def test_vcpus_of_the_start_are_read_from_the_command_line(
    tmp_path: Path, arguments: str, count: int
) -> None:
    (tmp_path / str(PID)).mkdir()
    line = "".join(f"{word}\0" for word in arguments.split())
    (tmp_path / str(PID) / "cmdline").write_text(line)
    assert QemuProcesses(tmp_path, tmp_path).read_boot_vcpus(PID) == count


def test_of_a_process_that_is_gone_it_is_one(tmp_path: Path) -> None:
    assert QemuProcesses(tmp_path, tmp_path).read_boot_vcpus(PID) == 1
